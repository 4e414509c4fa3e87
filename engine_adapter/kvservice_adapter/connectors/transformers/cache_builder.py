"""Makes a prompt's cache from its stored prefix: plans it, starts its loads, and prepares its recomputation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from kvservice_adapter.connectors.transformers.cache import StoredCache
from kvservice_adapter.connectors.transformers.forward_saver import ForwardSaver, Row, SaverParts
from kvservice_adapter.connectors.transformers.history import Buffers, Head, History, LoadedHistory, Recompute
from kvservice_adapter.connectors.transformers.recompute import computed
from kvservice_adapter.connectors.transformers.rows import Sequences
from kvservice_adapter.connectors.transformers.unrotated import KeyHooks, UnrotatedCache
from kvservice_adapter.device.base import Device, Stream
from kvservice_adapter.engine.metrics import Add, reason_of
from kvservice_adapter.engine.planning import LoadPlanner
from kvservice_adapter.engine.prefix_lookup import StoredPrefix
from kvservice_adapter.engine.request_report import Request
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.rates import Rates
from kvservice_adapter.session import Keys
from kvservice_api.cost import Kind, Plan
from kvservice_api.errors import KVError
from kvservice_api.layout import Layout
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import Clock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """A cache for the next turn, and how much of it is loaded from the daemon."""

    cache: DynamicCache
    tokens: int = 0  # Of all rows together, computed heads included. The cache has `cache.get_seq_length()` columns.
    size_bytes: int = 0
    tier: str = "none"  # The tier of the stored blocks at the lookup: "dram", "ssd", "mixed", or "none".
    plan: Plan | None = None  # None if nothing was found.
    not_found: KVError | None = None

    @property
    def loaded_tokens(self) -> int:
        """Of `tokens`, those that are loaded from the daemon: without a mixed plan's head. 0 after all was
        recomputed.
        """
        if self.error is not None or self.plan is None:
            return 0
        return self.tokens - (self.plan.compute_tokens if self.plan.kind is Kind.MIXED else 0)

    @property
    def error(self) -> BaseException | None:
        """Why nothing was restored, or why the history was recomputed. Empty for a plain miss."""
        if self.not_found is not None or not isinstance(self.cache, StoredCache):
            return self.not_found
        return self.cache.history.error


class _Slices(NamedTuple):
    """Which slices of a stored prefix hold the tokens that are loaded."""

    first: int
    token_counts: tuple[int, ...]


class _Reuse(NamedTuple):
    """The part of the stored prefixes that a cache begins with."""

    columns: int
    tokens: tuple[int, ...]  # Per row: the length of the shortest row's prefix.
    tier: str

    @property
    def total(self) -> int:
        return sum(self.tokens)


class _Asked(NamedTuple):
    """One call of `restore`: its sequences, and their stored prefixes."""

    given: Sequences
    keys: Keys
    found: Sequence[StoredPrefix | None]
    request: Request
    hooks: object


@dataclass(eq=False)
class CacheBuilder:
    """Makes the caches of one connector. For the engine's thread; it waits for no daemon."""

    model: PreTrainedModel
    layout: Layout
    device: Device
    rates: Rates
    saver_parts: SaverParts
    clock: Clock
    wait_s: float
    key_hooks: KeyHooks | None  # For layouts that keep keys before rotation.
    add: Add  # Counts into `ENGINE_METRICS`.

    def __post_init__(self) -> None:
        self._planner = LoadPlanner(self.layout, self.rates, self.saver_parts.breaker)
        self._lines = RateLimitedLog(log)
        self._loads, self._releases = self._new_streams()

    def close(self) -> None:
        """Drop the streams: they, and their threads, end with the caches that still load. Later caches get new ones."""
        self._loads, self._releases = self._new_streams()

    def build(
        self,
        given: Sequences,
        keys: Keys,
        found: Sequence[StoredPrefix | None],
        request: Request,
        recompute_cut: Recompute | None,
        hooks: object,
    ) -> Restored:
        """The cache of the stored prefix, or of the part of it for which a load is faster than computing.

        `recompute_cut` computes a history that was cut; it is of one sequence, and used whole or not at all.
        """
        asked = _Asked(given, keys, found, request, hooks)
        reuse = _common(given, found)
        request.tokens = reuse.total
        chosen = request.plan = self._plan(asked, reuse) if reuse.total else None
        if chosen is None or chosen.kind is Kind.RECOMPUTE:
            self.release(found)
            return Restored(self._empty_cache(asked), plan=chosen)
        begin_s = self.clock.now_s()
        request.tier = reuse.tier
        head_tokens = chosen.compute_tokens
        slices = [_slices(each, tokens, head_tokens) for each, tokens in zip(found, reuse.tokens, strict=True)]
        self.release([each for each, part in zip(found, slices, strict=True) if part is None])
        try:
            buffers, loaders = self._start_loads(asked, slices, reuse, head_tokens)
        except torch.OutOfMemoryError as error:  # Of the GPU; what computes the history may need less at a time.
            self._lines.warning("nothing is loaded: no memory for the history: %s", error, kind="memory")
            self.add("failed_loads", 1.0, reason_of(error))
            self.release([each for each, part in zip(found, slices, strict=True) if part is not None])
            request.tokens, request.plan = 0, None
            return Restored(self._empty_cache(asked))
        self.rates.observe_overhead(self.clock.now_s() - begin_s)
        head = self._compute_head(asked, head_tokens) if head_tokens else None
        history = self._history(asked, buffers, loaders, reuse, head, recompute_cut)
        cache = self._cache(asked, history, _rows(asked, found, reuse.tokens), reuse.columns)
        size_bytes = (reuse.total - head_tokens) * self.layout.bytes_per_token
        return Restored(cache, reuse.total, size_bytes, reuse.tier, chosen)

    def release(self, found: Sequence[StoredPrefix | None]) -> None:
        """End leases, on another thread, because it needs a call to the daemon."""
        for each in found:
            if each is not None:
                self._releases.submit(each.release)

    def _new_streams(self) -> tuple[Stream, Stream]:
        return self.device.stream("kvservice-load"), self.device.stream("kvservice-release")

    def _plan(self, asked: _Asked, reuse: _Reuse) -> Plan:
        given, found = asked.given, asked.found
        new_tokens = sum(given.columns - pad for pad in given.pads) - reuse.total
        may_mix = self.key_hooks is None and len(found) == 1 and found[0] is not None and found[0].may_begin_later
        return self._planner.plan(reuse.total, new_tokens, reuse.tier, may_mix=may_mix)

    def _empty_cache(self, asked: _Asked) -> StoredCache:
        """What is stored is computed, and need not be saved again. A history that was cut begins as another one."""
        uncut = [each if each is not None and not each.kept_tokens else None for each in asked.found]
        rows = _rows(asked, uncut, [_tokens(each) for each in uncut])
        return self._cache(asked, History(0, self.model.dtype, self.model.device), rows, 0)

    def _start_loads(
        self, asked: _Asked, slices: Sequence[_Slices | None], reuse: _Reuse, head_tokens: int
    ) -> tuple[Buffers, list[LayerLoader]]:
        """One load per row that has slices, into buffers of all rows."""
        given = asked.given
        begins = [pad + head_tokens for pad in given.pads]
        ends = [begin + sum(part.token_counts) for begin, part in zip(begins, slices, strict=True) if part is not None]
        columns = max(reuse.columns, *ends)
        buffers = Buffers(self.layout, given.pads, columns, self.model.dtype, self.model.device)
        if self.model.device.type != "cpu":  # Its allocator orders memory by the engine's thread.
            buffers.make(with_raw_keys=self.key_hooks is not None)
        buffer_layers = self.layout.layers  # While the head is computed, there is time to load all layers.
        if not head_tokens:
            new_tokens = given.columns - reuse.columns
            buffer_layers = self._planner.buffer_layers(reuse.total, new_tokens, reuse.columns, reuse.tier)
        loaders = []
        for row, (each, part) in enumerate(zip(asked.found, slices, strict=True)):
            if each is None or part is None:
                continue
            loader = LayerLoader(
                self.device,
                self._loads,
                self._source(each, part, buffers, row, begins[row], begins[row] - given.pads[row]),
                partial(buffers.pages, row, begins[row]),
                layer_count=self.layout.layers,
                buffer_layers=buffer_layers,
                release=each.release,
                clock=self.clock,
            )
            loader.start()
            loaders.append(loader)
        return buffers, loaders

    def _source(
        self, prefix: StoredPrefix, part: _Slices, buffers: Buffers, row: int, column: int, position: int
    ) -> HostLayers:
        """A row's slices, whose first token has this column and this position."""
        load = partial(prefix.load, part.first, len(part.token_counts))
        if self.key_hooks is None:
            return HostLayers(self._loads, load, part.token_counts, rotations=prefix.rotations)
        return HostLayers(
            self._loads,
            load,
            part.token_counts,
            rotations=self.key_hooks.placing(position, sum(part.token_counts)),
            unrotated_pages=partial(buffers.raw_pages, row, column),
        )

    def _history(
        self,
        asked: _Asked,
        buffers: Buffers,
        loaders: Sequence[LayerLoader],
        reuse: _Reuse,
        head: Head | None,
        recompute_cut: Recompute | None,
    ) -> LoadedHistory:
        given, columns = asked.given, reuse.columns
        recompute_masked = partial(computed, self.model, given.ids[:, :columns])
        key_hooks = self.key_hooks
        return LoadedHistory(
            buffers,
            columns,
            loaders,
            recompute_cut or partial(recompute_masked, given.visible(columns)),
            layer_count=self.layout.layers,
            wait_s=self.wait_s,
            clock=self.clock,
            dtype=self.model.dtype,
            device=self.model.device,
            head=head,
            recompute_masked=None if recompute_cut else recompute_masked,
            unrotate=partial(key_hooks.captured_of, self.device, given.pads, {}) if key_hooks is not None else None,
            on_end=partial(self._history_ended, reuse.tier, asked.request),
            lines=self._lines,
        )

    def _compute_head(self, asked: _Asked, tokens: int) -> Head:
        """Compute the beginning of a history while the rest of it is loaded."""
        begin_s = self.clock.now_s()
        layers = computed(self.model, asked.given.ids[:, :tokens], asked.given.visible(tokens))
        head_s = asked.request.head_s = self.clock.now_s() - begin_s
        self.rates.observe_prefill(tokens, 0, head_s)
        return Head(dict(enumerate(layers)), tokens)

    def _cache(self, asked: _Asked, history: History, rows: Sequence[Row], columns: int) -> StoredCache:
        """`columns` of the prompt are the history."""
        given, request = asked.given, asked.request
        request.rows = len(rows)
        saver = ForwardSaver(self.saver_parts, rows, given.ids[:, :columns], given.hidden[:, :columns])
        made = self.model.config, history, saver, partial(request.forward_ended, history), asked.hooks
        if self.key_hooks is None:
            return StoredCache(*made)
        return UnrotatedCache(self.layout, self.key_hooks, *made)

    def _history_ended(self, tier: str, request: Request, history: LoadedHistory) -> None:
        """Give the planner, and the metrics, the figures of a load, also of one that failed."""
        if history.error is not None:
            self.add("failed_loads", 1.0, reason_of(history.error))
        for report in history.load_reports:
            for waited_s in report.waited_s[: report.layers]:
                self.add("load_wait_seconds", waited_s, "")
        is_late = self._planner.load_ended(history.load_reports, history.error, history.lost_s, tier, request.transport)
        if is_late:  # Its thread may still be waiting for the daemon: later loads do not queue behind it.
            self._loads.close()
            self._loads = self.device.stream("kvservice-load")


def _common(given: Sequences, found: Sequence[StoredPrefix | None]) -> _Reuse:
    """The length of the prefix that is stored for all rows."""
    columns = min(pad + _tokens(each) for pad, each in zip(given.pads, found, strict=True))
    tiers = {each.tier for each in found if each is not None}
    tier = tiers.pop() if len(tiers) == 1 else "mixed"
    return _Reuse(columns, tuple(max(0, columns - pad) for pad in given.pads), tier)


def _tokens(found: StoredPrefix | None) -> int:
    return found.tokens if found is not None else 0


def _slices(found: StoredPrefix | None, tokens: int, head_tokens: int) -> _Slices | None:
    """The slices that hold the tokens after the head. None if none of the row's tokens are used."""
    if found is None or not tokens:
        return None
    counts = found.token_counts
    if not found.may_begin_later:
        return _Slices(0, counts)
    first = before = 0
    while before < head_tokens:
        before += counts[first]
        first += 1
    end = first
    while before < tokens:
        before += counts[end]
        end += 1
    return _Slices(first, counts[first:end])


def _rows(asked: _Asked, found: Sequence[StoredPrefix | None], tokens: Sequence[int]) -> list[Row]:
    """For each row, the blocks that are stored of its first tokens."""
    keys, rows = asked.keys, []
    for pad, each, count in zip(asked.given.pads, found, tokens, strict=True):
        if each is None or not count:
            rows.append(Row(pad, pad, keys.root))
        else:
            whole = (count - each.kept_tokens) // keys.layout.block_tokens
            rows.append(Row(pad, pad + each.kept_tokens, each.parent, list(each.keys[:whole])))
    return rows
