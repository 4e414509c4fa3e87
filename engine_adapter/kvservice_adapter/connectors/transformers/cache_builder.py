"""Puts a history together from what was found: planned, on its way, and in place of it, how to compute it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.connectors.transformers.cache import StoredCache
from kvservice_adapter.connectors.transformers.forward_saver import BackgroundWriting, Row
from kvservice_adapter.connectors.transformers.history import Buffers, Head, LoadedHistory, NoHistory, Recompute
from kvservice_adapter.connectors.transformers.model_layout import torch_dtype
from kvservice_adapter.connectors.transformers.recompute import computed
from kvservice_adapter.connectors.transformers.rows import Sequences
from kvservice_adapter.connectors.transformers.unrotated import RotatesOnLoad, UnrotatedCache
from kvservice_adapter.cost import Kind, Plan, Rates, plan
from kvservice_adapter.device.base import Device, Stream
from kvservice_adapter.engine.prefix_lookup import Found
from kvservice_adapter.engine.request_report import Request
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.rope import Rope
from kvservice_adapter.save import LayerSaver
from kvservice_adapter.schedule import perfect_buffer_layers
from kvservice_adapter.session import Keys
from kvservice_api.errors import KVError
from kvservice_api.layout import Layout
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

_BUFFER_LAYERS_MIN = 2  # So that the hand-over between threads is hidden.


@dataclass(frozen=True, slots=True)
class Restored:
    """A cache for the next turn, and what of it comes from the daemon."""

    cache: DynamicCache
    tokens: int = 0  # Of all rows together, computed heads included. The cache has `cache.get_seq_length()` columns.
    size_bytes: int = 0
    tier: str = "none"  # Where it lay when asked for: "dram", "ssd", "mixed", or "none".
    plan: Plan | None = None  # None where nothing was found.
    not_found: KVError | None = None

    @property
    def loaded_tokens(self) -> int:
        """Of `tokens`, those that come from the daemon: without a mixed plan's head. 0 once all was computed again."""
        if self.error is not None or self.plan is None:
            return 0
        return self.tokens - (self.plan.compute_tokens if self.plan.kind is Kind.MIXED else 0)

    @property
    def error(self) -> BaseException | None:
        """Why nothing was restored, unless it just was not stored; or why it was computed again after all."""
        if self.not_found is not None or not isinstance(self.cache, StoredCache):
            return self.not_found
        return self.cache.history.error


class _Part(NamedTuple):
    """Which of the slices that were found hold the tokens that are loaded."""

    first: int
    token_counts: tuple[int, ...]


class Restorer:
    """Makes the caches of one connector. Thread-safe."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        device: Device,
        saver: LayerSaver,
        breaker: Breaker,
        rates: Rates,
        keys: Callable[[], Keys],
        *,
        wait_s: float,
        tokens_max: int | None,
        rope: Rope | None,
        on_prompt: Callable[[NDArray[Any], NDArray[np.bool_]], None],
    ) -> None:
        """`rope` is for layouts that keep keys before rotation.

        `on_prompt` is called once a prompt's forward has begun, with its tokens ``[row, column]`` and which of them
        the attention mask hides.
        """
        self._model = model
        self._layout = layout
        self._device = device
        self._saver = saver
        self._breaker = breaker
        self._rates = rates
        self._keys = keys
        self._wait_s = wait_s
        self._tokens_max = tokens_max
        self._rope = rope
        self._on_prompt = on_prompt
        self._lines = RateLimitedLog(log)
        self._loads: Stream
        self._releases: Stream
        self.close()
        self._transport = ""  # Of the last load.

    def close(self) -> None:
        """Let the threads go, once what is under way has come. Later caches have others."""
        self._loads = self._device.stream("kvservice-load")
        self._releases = self._device.stream("kvservice-release")

    def restored(
        self,
        given: Sequences,
        keys: Keys,
        found: Sequence[Found | None],
        request: Request,
        recompute_cut: Recompute | None,
    ) -> Restored:
        """The cache of what was found, as far as loading it is the faster way.

        `recompute_cut` computes a history that was cut; it is of one sequence, and used whole or not at all.
        """
        columns = min(pad + _tokens(each) for pad, each in zip(given.pads, found, strict=True))
        reused = [max(0, columns - pad) for pad in given.pads]
        request.tokens = sum(reused)
        chosen = request.plan = self._plan(given, found, reused) if any(reused) else None
        if chosen is None or chosen.kind is Kind.RECOMPUTE:
            self.release(found)
            plain = [each if each is not None and not each.kept_tokens else None for each in found]
            rows = [_row(pad, each, _tokens(each), keys) for pad, each in zip(given.pads, plain, strict=True)]
            nothing = NoHistory(self._model.dtype, self._model.device)
            return Restored(self._cache(nothing, rows, given, 0, request), plan=chosen)
        began_s = time.perf_counter()
        request.tier = tier = _tier(found)
        head_tokens = chosen.compute_tokens
        parts = [_part(each, tokens, head_tokens) for each, tokens in zip(found, reused, strict=True)]
        self.release([each for each, part in zip(found, parts, strict=True) if part is None])
        begins = [pad + head_tokens for pad in given.pads]
        ends = [begin + sum(part.token_counts) for begin, part in zip(begins, parts, strict=True) if part is not None]
        buffers = Buffers(self._layout, given.pads, max(columns, *ends), self._model.dtype)
        buffer_layers = self._layout.layers  # While a head is computed, all have time to come.
        if not head_tokens:
            buffer_layers = self._buffer_layers(sum(reused), given.columns - columns, columns, tier)
        unrotated = None
        if self._rope is not None:
            places = zip(begins, given.pads, strict=True)
            unrotated = [
                RotatesOnLoad(buffers, row, begin, begin - pad, self._rope) for row, (begin, pad) in enumerate(places)
            ]
        loaders = [
            LayerLoader(
                self._device,
                self._loads,
                partial(each.load, part.first, len(part.token_counts)),
                partial(buffers.pages, row, begins[row]) if unrotated is None else unrotated[row].pages,
                part.token_counts,
                layer_count=self._layout.layers,
                rotation=each.rotation if unrotated is None else unrotated[row],
                buffer_layers=buffer_layers,
                release=each.release,
            )
            for row, (each, part) in enumerate(zip(found, parts, strict=True))
            if each is not None and part is not None
        ]
        for loader in loaders:
            loader.start()
        self._rates.observe_overhead(time.perf_counter() - began_s)
        history = LoadedHistory(
            buffers,
            columns,
            loaders,
            recompute_cut or partial(computed, self._model, given.ids[:, :columns], given.visible(columns)),
            layer_count=self._layout.layers,
            wait_s=self._wait_s,
            dtype=self._model.dtype,
            device=self._model.device,
            head=self._head(given, head_tokens, request) if head_tokens else None,
            recompute_masked=None if recompute_cut else partial(computed, self._model, given.ids[:, :columns]),
            unrotate=partial(_unrotated, self._rope, given.pads) if self._rope is not None else None,
            on_end=partial(self._history_ended, tier, request),
            lines=self._lines,
        )
        rows = [_row(pad, each, tokens, keys) for pad, each, tokens in zip(given.pads, found, reused, strict=True)]
        cache = self._cache(history, rows, given, columns, request)
        size_bytes = (sum(reused) - head_tokens) * self._layout.bytes_per_token
        return Restored(cache, sum(reused), size_bytes, tier, chosen)

    def release(self, found: Sequence[Found | None]) -> None:
        """End leases, on another thread: it takes a call to the daemon."""
        for each in found:
            if each is not None:
                self._releases.submit(each.release)

    def _plan(self, given: Sequences, found: Sequence[Found | None], reused: Sequence[int]) -> Plan:
        """Rows of a batch count as if they were computed one after another."""
        new_tokens = sum(given.columns - pad for pad in given.pads) - sum(reused)
        return plan(
            self._rates,
            sum(reused),
            new_tokens,
            self._layout.bytes_per_token,
            _tier(found),
            self._layout.block_tokens,
            transport=self._transport,
            layers=self._layout.layers,
            may_mix=self._rope is None and len(found) == 1 and found[0] is not None and found[0].may_begin_later,
        )

    def _buffer_layers(self, load_tokens: int, new_tokens: int, context_tokens: int, tier: str) -> int:
        """How many layers may come in ahead: as many as it takes that computing never waits."""
        layers = self._layout.layers
        load_s = self._rates.load_s(load_tokens * self._layout.bytes_per_token, tier, self._transport)
        compute_s = self._rates.prefill_s(new_tokens, context_tokens)
        if load_s is None or compute_s is None:
            return layers
        return max(_BUFFER_LAYERS_MIN, perfect_buffer_layers(layers, load_s, compute_s))

    def _head(self, given: Sequences, tokens: int, request: Request) -> Head:
        """Compute the beginning of a history while the rest of it comes in."""
        began_s = time.perf_counter()
        layers = computed(self._model, given.ids[:, :tokens], given.visible(tokens))
        request.head_s = time.perf_counter() - began_s
        self._rates.observe_prefill(tokens, 0, request.head_s)
        return Head(dict(enumerate(layers)), tokens)

    def _cache(
        self,
        history: LoadedHistory | NoHistory,
        rows: Sequence[Row],
        given: Sequences,
        columns: int,
        request: Request,
    ) -> StoredCache:
        """`columns` of the prompt are the history."""
        request.rows = len(rows)
        writing = BackgroundWriting(
            self._saver,
            self._breaker,
            self._keys,
            rows,
            given.ids[:, :columns],
            given.hidden[:, :columns],
            self._layout.block_tokens,
            torch_dtype(self._layout),
            self._tokens_max,
            may_hide=self._rope is None,
            on_prompt=self._on_prompt,
        )
        made = self._model.config, history, writing, partial(request.forward_ended, history)
        return StoredCache(*made) if self._rope is None else UnrotatedCache(self._layout, *made)

    def _history_ended(self, tier: str, request: Request, history: LoadedHistory) -> None:
        """What there is to learn from a history that came, or did not."""
        error = history.error
        is_late = error is not None and (not isinstance(error, KVError) or not answered(error))
        self._breaker.record(not is_late)
        self._transport = request.transport or self._transport
        for loader in history.loaders:
            report = loader.report
            if report.size_bytes:
                seconds = report.busy_s if error is None else max(report.busy_s, history.lost_s)
                self._rates.observe_load(report.size_bytes, seconds, tier, self._transport)
        if is_late:  # Its thread may still be waiting for the daemon: later loads do not queue behind it.
            self._loads.close()
            self._loads = self._device.stream("kvservice-load")


def _unrotated(rope: Rope, pads: Sequence[int], keys: torch.Tensor) -> torch.Tensor:
    """Keys ``[row, head, column, dim]`` as they were before the model rotated them, up to rounding."""
    raw = keys.clone()
    for row, pad in enumerate(pads):
        rope.unrotate(raw[row, :, pad:], np.arange(raw.shape[2] - pad))
    return raw


def _tokens(found: Found | None) -> int:
    return found.tokens if found is not None else 0


def _tier(found: Sequence[Found | None]) -> str:
    tiers = {each.tier for each in found if each is not None}
    return tiers.pop() if len(tiers) == 1 else "mixed"


def _part(found: Found | None, tokens: int, head_tokens: int) -> _Part | None:
    """What holds the tokens behind the head. None where none of the row's tokens are used."""
    if found is None or not tokens:
        return None
    counts = found.token_counts
    if not found.may_begin_later:
        return _Part(0, counts)
    first = before = 0
    while before < head_tokens:
        before += counts[first]
        first += 1
    end = first
    while before < tokens:
        before += counts[end]
        end += 1
    return _Part(first, counts[first:end])


def _row(pad: int, found: Found | None, tokens: int, keys: Keys) -> Row:
    if found is None or not tokens:
        return Row(pad, pad, keys.root)
    whole = (tokens - found.kept_tokens) // keys.layout.block_tokens
    return Row(pad, pad + found.kept_tokens, found.parent, list(found.keys[:whole]))
