"""Keeps the KV of Hugging Face transformers models: it comes in while the model computes, and is saved meanwhile.

    connector = TransformersConnector(client, model, model_id="SmolLM2-135M-Instruct", model_revision=revision)

    history = connector.restore(input_ids)
    output = model.generate(input_ids, past_key_values=history.cache)      # prefills what is not there
    connector.save(output[0, : history.cache.get_seq_length()], history.cache)

Both take a `session_id`: then the last block is kept too, though it is not full, and all of a
conversation's history is there again at its next turn. With a `Conversation` it may also be cut.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvservice_adapter.breaker import Breaker, answered, probe_of
from kvservice_adapter.connectors.transformers import remembering
from kvservice_adapter.connectors.transformers.cache import StoredCache, Tensors
from kvservice_adapter.connectors.transformers.finding import Finder, Found
from kvservice_adapter.connectors.transformers.forwards import watch
from kvservice_adapter.connectors.transformers.history import Buffers, Head, LoadedHistory, NoHistory
from kvservice_adapter.connectors.transformers.model_layout import (
    UnsupportedModel,
    dynamic_layers,
    has_adapters,
    layout_of,
)
from kvservice_adapter.connectors.transformers.recompute import computed, replayed
from kvservice_adapter.connectors.transformers.rows import Sequences, TokenIds, common_tokens, sequences
from kvservice_adapter.connectors.transformers.writing import BackgroundWriting, Row
from kvservice_adapter.cost import Kind, Plan, Rates, plan
from kvservice_adapter.device.base import Device, Event, Pages, Stream, StreamClosed
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.rope import Rope
from kvservice_adapter.save import LayerSaver
from kvservice_adapter.session import Conversation, Keys
from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, InvalidRequest, KVError
from kvservice_api.keys import BlockChain, extra_identity
from kvservice_client import Client, Durability
from kvservice_client.retry import Deadline

log = logging.getLogger(__name__)

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Restored:
    """A cache for the next turn, and what of it comes from the daemon."""

    cache: DynamicCache
    tokens: int = 0  # Of all rows together. The cache has `cache.get_seq_length()` columns.
    size_bytes: int = 0
    tier: str = "none"  # Where it lay when asked for: "dram", "ssd", "mixed", or "none".
    plan: Plan | None = None  # None where nothing was found.
    not_found: KVError | None = None

    @property
    def error(self) -> BaseException | None:
        """Why nothing was restored, unless it just was not stored; or why it was computed again after all."""
        if self.not_found is not None or not isinstance(self.cache, StoredCache):
            return self.not_found
        return self.cache.history.error


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a save: counts of blocks, and why the first one was not stored, or the session not continued.

    Blocks that were stored while the model computed count as stored, once.
    """

    stored: int = 0
    already_stored: int = 0
    refused: int = 0
    error: KVError | None = None

    def __add__(self, other: Saved) -> Saved:
        return Saved(
            self.stored + other.stored,
            self.already_stored + other.already_stored,
            self.refused + other.refused,
            self.error or other.error,
        )


@dataclass(slots=True)
class _Saving:
    """One sequence's part of a save."""

    chain: BlockChain
    row: int
    column: int  # Where the chain's first token lies.
    session_id: str = ""
    conversation: Conversation | None = None
    cuts: int = 0
    kept_tokens: int = 0
    saved: Saved = field(default_factory=Saved)


class TransformersConnector:
    """One model's caches in one daemon. Thread-safe; keeps nothing of a conversation between calls.

    No method raises for what the daemon does, or does not: the engine computes, after waits that `wait_s`
    bounds. They raise UnsupportedModel for caches of other kinds and once the model has adapters that
    `lora_id` does not name, and InvalidRequest for what are no token ids.
    """

    def __init__(
        self,
        client: Client,
        model: PreTrainedModel,
        *,
        model_id: str,
        model_revision: str,
        block_tokens: int = 256,
        lora_id: str = "",
        salt: bytes = b"",
        wait_s: float = 0.25,
        save_wait_s: float = 1.0,
        staging_bytes: int = 256 * _MIB,
        rates: Rates | None = None,
    ) -> None:
        """`model_revision` tells weights apart that share a name: a commit, or a hash of the files, and
        how they were quantized, if the engine did that.

        `lora_id` names the adapter that is active, if any. Caches of another `salt` are never found.
        `wait_s` bounds each wait for the daemon: for what it has, and for each layer; `save_wait_s` how long
        `save` and `truncate` wait for what goes on without them. `staging_bytes` of memory hold what is being
        saved. `rates` may be shared by connectors of one model on one machine.
        """
        self._model, self._lora_id = model, lora_id
        self._check_adapters()
        self.layout = layout_of(model, model_id=model_id, model_revision=model_revision, block_tokens=block_tokens)
        self.rates = rates or Rates()
        self._client = client
        self._blocks = client.open_layout(self.layout)
        self._salt = salt
        self._wait_s, self._save_wait_s = wait_s, save_wait_s
        self._rope: Rope | None = None
        self._tokens_max = self._rope_of_model().tokens_max if self.layout.rotary.kind == "dynamic" else None
        self._finder = Finder(client, self._blocks, self._rope_of_model)
        self._device: Device = CpuDevice()
        self._loads: Stream = self._device.stream("kvservice-load")
        self._copies = self._device.stream("kvservice-copy")
        self._work = self._device.stream("kvservice-save")  # In order: what a turn saves, the next one finds.
        self._saver = LayerSaver(self._device, self._blocks, staging_bytes=staging_bytes)
        self._breaker = Breaker(probe_of(self._blocks))
        watch(model)

    def close(self) -> None:
        """Take no more saves; what is under way is still sent. Caches go on working. Waits for nothing."""
        self._breaker.close(0.0)
        self._saver.close()
        self._work.close()

    def restore(
        self,
        token_ids: TokenIds,
        *,
        session_id: str | Sequence[str] = "",
        conversation: Conversation | None = None,
        attention_mask: Any = None,
        request_id: str = "",
    ) -> Restored:
        """A cache with the longest stored prefix of `token_ids`, to hand to `generate`.

        Returns at once: the model waits for each layer when it comes to it. In whole blocks, but for the end of
        what was saved under `session_id`, or by `conversation`. `token_ids` is one prompt from its first token
        on, or a batch ``[row, column]`` with its `attention_mask`, padded on the left; then `session_id` has one
        a row, if any. At least one token is left to compute, for the model has to give its logits.
        `request_id` names the request to `kvctl explain`.
        """
        began_s = time.perf_counter()
        given = sequences(token_ids, attention_mask)
        if conversation is not None and len(given.pads) != 1:
            raise UnsupportedModel("a conversation is restored by itself, not in a batch")
        if conversation is not None and not conversation.leads_to(given.tokens(0)):
            conversation.begin_anew()
        keys = self._keys()
        found: list[Found | None] = [None] * len(given.pads)
        error: KVError | None = None
        if not self._breaker.allow():
            error = DaemonUnavailable("the daemon did not answer lately: it is not asked")
        else:
            try:
                found = self._find(given, keys, session_id, conversation, request_id)
            except KVError as raised:
                error = raised
            self._breaker.record(answered(error))
        if error is not None:
            log.warning("the history is computed again", extra={"reason": error.reason, "why": error.message})
        restored = self._restored(given, keys, found, conversation, began_s)
        if conversation is not None and conversation.parts and not restored.tokens:
            conversation.begin_anew()  # What is left of it is computed without what was cut.
        return replace(restored, not_found=error) if error is not None else restored

    def save(
        self,
        token_ids: TokenIds,
        cache: Cache,
        durability: Durability = Durability.DRAM,
        *,
        session_id: str | Sequence[str] = "",
        conversation: Conversation | None = None,
        attention_mask: Any = None,
        wait_s: float | None = None,
    ) -> Saved:
        """Store the blocks of `token_ids` that are not stored yet. `cache` starts with these tokens' KV.

        Whole blocks only, unless a `session_id` or a `conversation` is given: then the last one too, which belongs
        to the session until a later turn brings a fuller one. A session that was cut goes on with its
        conversation only. Waits at most `wait_s` (by default what the connector was made with); what is not done
        by then goes on, and the answer has DeadlineExceeded.
        """
        states = self._states(cache, given := sequences(token_ids, attention_mask))
        writing = cache.writing if isinstance(cache, StoredCache) else None
        assert writing is None or isinstance(writing, BackgroundWriting)
        savings = self._savings(given, cache.get_seq_length(), writing, session_id, conversation)
        block_count = sum(len(each.chain) for each in savings)
        if not block_count:
            return Saved()
        wrong = writing.misplaced if writing is not None else ""
        if wrong:
            return Saved(refused=block_count, error=InvalidRequest(wrong))
        if not self._breaker.allow():
            error: KVError = DaemonUnavailable("the daemon did not answer lately: nothing is sent to it")
            return Saved(refused=block_count, error=error)

        def work() -> None:
            if writing is not None:
                writing.wait(self._patience_s)
            for each in savings:
                each.saved = self._save(each, states, writing, durability)

        if not self._wait_for(work, self._save_wait_s if wait_s is None else wait_s):
            error = DeadlineExceeded("the save is not done yet; it goes on in the background")
            return Saved(refused=block_count, error=error)
        return sum((each.saved for each in savings), Saved())

    def truncate(self, conversation: Conversation, keep: Sequence[tuple[int, int]]) -> bool:
        """Cut a conversation that was saved: only these ranges of its tokens, (first, count) each, stay.

        `truncation.keep_on_overflow` gives those that a full context window leaves. Its next `restore` gives the
        KV of `conversation.token_ids`, at the positions where they are now. False where the daemon could not be
        told in time: the conversation is cut all the same, and computed again. Raises ValueError for ranges
        that are not ascending, disjoint and inside the conversation.
        """
        before = conversation.copy()
        conversation.truncate(keep)
        keys, ranges = self._keys(), [(int(first), int(count)) for first, count in keep]
        outcome: list[bool] = []

        def work() -> None:
            try:
                remembering.truncate(self._client, keys, before, ranges)
                outcome.append(True)
            except KVError as error:
                self._breaker.record(answered(error))
                log.warning("a session was not cut", extra={"session_id": before.session_id, "why": error.message})

        return self._breaker.allow() and self._wait_for(work, self._save_wait_s) and bool(outcome)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait for all that is being saved. Whether it is done."""
        deadline = Deadline(timeout_s)
        return self._saver.flush(timeout_s) and self._wait_for(lambda: None, deadline.remaining_s)

    # Restoring

    def _find(
        self,
        given: Sequences,
        keys: Keys,
        session_id: str | Sequence[str],
        conversation: Conversation | None,
        request_id: str,
    ) -> list[Found | None]:
        """For each row what is stored of it, leased. Raises KVError."""
        deadline = Deadline(self._wait_s)
        found: list[Found | None] = []
        try:
            for row in range(len(given.pads)):
                tokens = given.tokens(row)
                tokens_max = len(tokens) - 1
                if self._tokens_max is not None and len(tokens) > self._tokens_max:
                    tokens_max = 0  # The whole prompt is rotated in another way.
                if conversation is not None and conversation.parts:
                    found.append(self._finder.of_conversation(conversation, tokens_max, keys, deadline))
                    continue
                name = conversation.session_id if conversation is not None else _of_row(session_id, row)
                found.append(self._finder.of_tokens(tokens, tokens_max, keys, name, deadline, request_id))
        except KVError:
            self._release(found)
            raise
        return found

    def _restored(
        self,
        given: Sequences,
        keys: Keys,
        found: Sequence[Found | None],
        conversation: Conversation | None,
        began_s: float,
    ) -> Restored:
        """The cache of what was found, as far as loading it is the faster way."""
        ends = [pad + (each.tokens if each is not None else 0) for pad, each in zip(given.pads, found, strict=True)]
        columns = min(ends)
        reused = [max(0, columns - pad) for pad in given.pads]
        chosen = self._plan(given, found, reused) if any(reused) else None
        if chosen is None or chosen.kind is Kind.RECOMPUTE:
            self._release(found)
            return Restored(self._empty_cache(given), plan=chosen)
        if conversation is None or not conversation.parts:
            recompute = partial(computed, self._model, given.ids[:, :columns], given.pads)
        else:
            recompute = partial(replayed, self._model, conversation.copy(), self._rope_or_none(), columns)
        head_tokens = chosen.compute_tokens
        loads = [
            _part(each, tokens, head_tokens) if each is not None and tokens else None
            for each, tokens in zip(found, reused, strict=True)
        ]
        self._release([each for each, load in zip(found, loads, strict=True) if load is None])
        filled = [pad + head_tokens + sum(load[2]) for pad, load in zip(given.pads, loads, strict=True) if load]
        buffers = Buffers(self.layout, given.pads, max(columns, *filled), self._model.dtype, self._model.device)
        loaders = []
        for row, (each, load) in enumerate(zip(found, loads, strict=True)):
            if each is None or load is None:
                continue
            first, count, token_counts = load
            column = given.pads[row] + head_tokens
            loaders.append(
                LayerLoader(
                    self._device,
                    self._loads,
                    partial(each.load, first, count),
                    partial(buffers.pages, row, column),
                    token_counts,
                    layer_count=self.layout.layers,
                    rotation=each.rotation,
                    buffer_layers=self.layout.layers,
                    wait_s=self._wait_s,
                    release=each.release,
                )
            )
        self.rates.observe_overhead(time.perf_counter() - began_s)
        for loader in loaders:
            loader.start()
        head = self._head(given, head_tokens) if head_tokens else None
        tiers = {each.tier for each in found if each is not None}
        tier = tiers.pop() if len(tiers) == 1 else "mixed"
        history = LoadedHistory(
            buffers,
            columns,
            loaders,
            recompute,
            layer_count=self.layout.layers,
            dtype=self._model.dtype,
            device=self._model.device,
            head=head,
            on_end=partial(self._history_ended, tier),
        )
        rows = [_row(pad, each, tokens, keys) for pad, each, tokens in zip(given.pads, found, reused, strict=True)]
        cache = self._cache(history, rows, given.ids[:, :columns])
        size_bytes = (sum(reused) - head_tokens) * self.layout.bytes_per_token
        return Restored(cache, sum(reused), size_bytes, tier, chosen)

    def _plan(self, given: Sequences, found: Sequence[Found | None], reused: Sequence[int]) -> Plan:
        tiers = {each.tier for each in found if each is not None}
        new_tokens = sum(len(given.tokens(row)) for row in range(len(given.pads))) - sum(reused)
        is_plain = len(reused) == 1 and found[0] is not None and not found[0].kept_tokens
        return plan(
            self.rates,
            sum(reused),
            new_tokens,
            self.layout.bytes_per_token,
            tiers.pop() if len(tiers) == 1 else "mixed",
            self.layout.block_tokens,
            layers=self.layout.layers,
            may_mix=is_plain,
        )

    def _head(self, given: Sequences, tokens: int) -> Head:
        """Compute the beginning of a history while the rest of it comes in."""
        began_s = time.perf_counter()
        layers = computed(self._model, given.ids[:, :tokens], given.pads)
        self.rates.observe_prefill(tokens, 0, time.perf_counter() - began_s)
        return Head(layers, tokens)

    def _empty_cache(self, given: Sequences) -> StoredCache:
        root = self._keys().root
        rows = [Row(pad, pad, root) for pad in given.pads]
        return self._cache(NoHistory(self._model.dtype, self._model.device), rows, given.ids[:, :0])

    def _cache(self, history: LoadedHistory | NoHistory, rows: Sequence[Row], token_ids: NDArray[Any]) -> StoredCache:
        writing = BackgroundWriting(
            self._saver, self._keys, rows, token_ids, self.layout.block_tokens, self._tokens_max
        )
        return StoredCache(self._model.config, history, writing, partial(_forward_ended, self.rates, len(rows)))

    def _history_ended(self, tier: str, history: LoadedHistory) -> None:
        """What there is to learn from a history that came, or did not."""
        error = history.error
        if error is None:
            self._breaker.record(True)
            for loader in history.loaders:
                self.rates.observe_load(loader.report.size_bytes, loader.report.busy_s, tier)
            return
        is_late = not isinstance(error, KVError) or not answered(error)
        self._breaker.record(not is_late)
        if is_late:  # Its thread may still be waiting for the daemon: later loads do not queue behind it.
            self._loads.close()
            self._loads = self._device.stream("kvservice-load")

    def _release(self, found: Sequence[Found | None]) -> None:
        """End leases, on another thread: it takes a call to the daemon."""
        for each in found:
            if each is not None:
                self._copies.submit(each.release)

    # Saving

    @property
    def _patience_s(self) -> float:
        """How long the background waits for what else is being saved."""
        return 10.0

    def _savings(
        self,
        given: Sequences,
        columns: int,
        writing: BackgroundWriting | None,
        session_id: str | Sequence[str],
        conversation: Conversation | None,
    ) -> list[_Saving]:
        keys = self._keys()
        found = []
        for row, pad in enumerate(given.pads):
            tokens = given.tokens(row, columns)
            if writing is not None and not writing.stopped:
                known = writing.token_ids(row)
                if (common := common_tokens(tokens, known)) < min(len(tokens), len(known)):
                    raise InvalidRequest(f"token {common} is not the one that the cache was computed with")
            if self._tokens_max is not None and len(tokens) > self._tokens_max:
                tokens = tokens[:0]
            if conversation is None:
                name = _of_row(session_id, row)
                found.append(_Saving(keys.chain(tokens, with_partial=bool(name)), row, pad, name))
                continue
            if not conversation.leads_to(tokens):
                conversation.begin_anew()
            conversation.extend(tokens[conversation.token_count :])
            kept_tokens = conversation.kept_tokens
            chain = keys.chain(conversation.said, conversation.parent(keys), with_partial=True)
            cuts = len(conversation.parts)
            found.append(
                _Saving(chain, row, pad + kept_tokens, conversation.session_id, conversation, cuts, kept_tokens)
            )
        return found

    def _save(
        self, saving: _Saving, states: Sequence[Tensors], writing: BackgroundWriting | None, durability: Durability
    ) -> Saved:
        """On the connector's own thread."""
        chain = saving.chain
        try:
            stored_before = self._blocks.contains(chain)
            refused: list[tuple[int, KVError]] = []
            stored = already_stored = 0
            if stored_before < len(chain):
                new = chain[stored_before:]
                column = saving.column + stored_before * self.layout.block_tokens
                result = self._blocks.save(new, self._slices(states, saving.row, column, new), durability)
                stored, already_stored, refused = result.stored, result.already_stored, result.refused
            self._breaker.record(True)
        except KVError as error:
            self._breaker.record(answered(error))
            log.warning("a turn was not saved", extra={"reason": error.reason, "why": error.message})
            return Saved(refused=len(chain), error=error)
        meanwhile = writing.take_stored(chain) if writing is not None else 0
        error_of_first = refused[0][1] if refused else None
        if error_of_first is not None:
            log.warning("blocks were not saved", extra={"blocks": len(refused), "why": error_of_first.message})
        already_stored += stored_before - meanwhile
        saved = Saved(stored + meanwhile, max(0, already_stored), len(refused), error_of_first)
        if not saving.session_id:
            return saved
        kept = stored_before + refused[0][0] if refused else len(chain)
        try:
            self._remember(saving, chain[:kept])
        except KVError as error:
            log.warning("a session was not continued", extra={"session_id": saving.session_id, "why": error.message})
            return replace(saved, error=saved.error or error)
        return saved

    def _remember(self, saving: _Saving, chain: BlockChain) -> None:
        if saving.conversation is None:
            remembering.remember(self._client, self.layout, saving.session_id, chain)
            return
        remembering.remember_conversation(
            self._client, self.layout, saving.session_id, chain, saving.cuts, saving.kept_tokens
        )

    def _slices(self, states: Sequence[Tensors], row: int, column: int, chain: BlockChain) -> list[NDArray[np.uint8]]:
        """Each layer's slices of a chain's blocks, one after another in new memory of the host."""
        size_bytes = sum(map(self._blocks.slice_bytes, chain.token_counts))
        layers = [np.empty(size_bytes, np.uint8) for _ in states]
        events: list[Event] = [
            self._copies.gather(Pages(keys, values, [row], column), chain.token_counts, into)
            for (keys, values), into in zip(states, layers, strict=True)
        ]
        for event in events:
            event.wait(self._patience_s)
            if event.error is not None:
                raise event.error
        return layers

    def _states(self, cache: Cache, given: Sequences) -> list[Tensors]:
        """Keys and values of each layer. Raises UnsupportedModel where they are not what the layout describes."""
        layers = dynamic_layers(cache, self.layout.layers)
        rows = len(given.pads)
        expected = (rows, self.layout.kv_heads, cache.get_seq_length(), self.layout.k_head_dim)
        found = []
        for index, layer in enumerate(layers):
            keys, values = layer.keys, layer.values
            if keys is None or values is None:
                raise UnsupportedModel(f"layer {index} of the cache is empty")
            for states in (keys, values):
                if tuple(states.shape) != expected or states.dtype != self._model.dtype:
                    would = "one sequence of this model" if rows == 1 else f"{rows} sequences of this model"
                    raise UnsupportedModel(
                        f"layer {index} of the cache is {tuple(states.shape)} of {states.dtype}; "
                        f"{would} would be {expected} of {self._model.dtype}"
                    )
            found.append((keys, values))
        return found

    # Both

    def _wait_for(self, work: Any, timeout_s: float) -> bool:
        """Have it done on the connector's own thread, after what was given to it before. Whether it is done in time."""
        try:
            event = self._work.submit(work)
        except StreamClosed:
            return False
        is_done = event.wait(timeout_s)
        if is_done and event.error is not None:
            raise event.error
        return is_done

    def _check_adapters(self) -> None:
        if not self._lora_id and has_adapters(self._model):
            raise UnsupportedModel("the model has adapters loaded; name the active one by lora_id")

    def _keys(self) -> Keys:
        """What keys depend on. Asked for each chain: an adapter may have been loaded meanwhile."""
        self._check_adapters()
        return Keys(self.layout, self._salt, extra_identity(self._lora_id))

    def _rope_of_model(self) -> Rope:
        if self._rope is None:
            self._rope = Rope.from_model(self._model)
        return self._rope

    def _rope_or_none(self) -> Rope | None:
        return self._rope_of_model() if self.layout.rotary.kind != "none" and self.layout.rotated else None


def _part(found: Found, tokens: int, head_tokens: int) -> tuple[int, int, tuple[int, ...]]:
    """Which slices hold the tokens behind the head: the first of them, how many, and their token counts."""
    counts, first, before = found.token_counts, 0, 0
    while before < head_tokens:
        before += counts[first]
        first += 1
    end = first
    while before < tokens:
        before += counts[end]
        end += 1
    return first, end - first, counts[first:end]


def _row(pad: int, found: Found | None, tokens: int, keys: Keys) -> Row:
    if found is None or not tokens:
        return Row(pad, pad, keys.root)
    whole = (tokens - found.kept_tokens) // keys.layout.block_tokens
    return Row(pad, pad + found.kept_tokens, found.parent, list(found.keys[:whole]))


def _of_row(session_id: str | Sequence[str], row: int) -> str:
    return session_id if isinstance(session_id, str) else session_id[row]


def _forward_ended(rates: Rates, rows: int, new_tokens: int, context_tokens: int, seconds: float) -> None:
    if rows == 1 and new_tokens > 1:
        rates.observe_prefill(new_tokens, context_tokens, seconds)
