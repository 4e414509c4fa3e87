"""Keeps the KV of Hugging Face transformers models: it is loaded while the model computes, and saved meanwhile.

    connector = TransformersConnector(client, model, model_id="SmolLM2-135M-Instruct", model_revision=revision)

    history = connector.restore(input_ids)
    output = model.generate(input_ids, past_key_values=history.cache)      # prefills what is not there
    connector.save(output[0, : history.cache.get_seq_length()], history.cache)

The last block is kept too, though it is not full. Without a `session_id` it is found if it is one of the newest that
continue the same whole block; a session names it. With a `Conversation` the history may also be cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvservice_adapter.breaker import Breaker, answered, probe_of
from kvservice_adapter.connectors.transformers.cache_builder import CacheBuilder, Restored
from kvservice_adapter.connectors.transformers.forward_saver import SaverParts
from kvservice_adapter.connectors.transformers.generation import hidden_token
from kvservice_adapter.connectors.transformers.model_hooks import ModelHooks
from kvservice_adapter.connectors.transformers.model_layout import (
    UnsupportedModel,
    has_adapters,
    layout_of,
    torch_dtype,
)
from kvservice_adapter.connectors.transformers.prompt_queue import PromptQueue
from kvservice_adapter.connectors.transformers.recompute import replayed
from kvservice_adapter.connectors.transformers.rows import Sequences, TokenIds, sequences
from kvservice_adapter.connectors.transformers.turns import Turns, forward_saver_of
from kvservice_adapter.connectors.transformers.unrotated import KeyHooks
from kvservice_adapter.device.base import Device, StreamClosed
from kvservice_adapter.engine import session_sync
from kvservice_adapter.engine.metrics import EngineMetrics
from kvservice_adapter.engine.prefix_lookup import PrefixLookup, StoredPrefix
from kvservice_adapter.engine.request_report import Request
from kvservice_adapter.engine.turn_saver import Saved, TurnSaver
from kvservice_adapter.rates import Rates
from kvservice_adapter.rope import ModelRopes, UnsupportedRotation
from kvservice_adapter.save import LayerSaver
from kvservice_adapter.session import Conversation, Keys
from kvservice_adapter.torch_device import device_for
from kvservice_api import spans
from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, InvalidRequest, KVError
from kvservice_api.keys import extra_identity
from kvservice_api.session_ids import checked_session_id
from kvservice_client import BlockChain, Client, Durability, Session, arguments, forks
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import Deadline

log = logging.getLogger(__name__)

_MIB = 2**20


class TransformersConnector:
    """One model's caches in one daemon. Thread-safe; keeps nothing of a conversation between calls.

    No method raises for a failure of the daemon: the engine computes instead, after waits that `wait_s` bounds.
    They raise UnsupportedModel for caches of other kinds, and once the model has adapters that `lora_id` does not
    name, or another dtype; InvalidRequest for invalid token ids, and for a `session_id` that is not 1 to 200
    letters, digits and ``-_.:@/+=~``. With "" a sequence has no session.
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
        rotated: bool = True,
        rates: Rates | None = None,
        device: Device | None = None,
    ) -> None:
        """`model_revision` distinguishes weights that share a name: a commit, or a hash of the files, and
        how the engine quantized them, if it did.

        `lora_id` names the adapter that is active, if any. Caches of another `salt` are never found.
        `wait_s` bounds each wait for the daemon: for a lookup, and for each layer. `save_wait_s` bounds how long
        `save` and `truncate` wait; their work continues after that. `staging_bytes` of memory hold the blocks
        that are being saved. With `rotated=False` keys are stored as they are before rotation, which is best for
        codecs, and rotated when they are loaded. `rates` may be shared by connectors of one model on one machine.
        `device` copies between the model's memory and the host's; by default the model's device decides.

        Computes a few tokens in the model's first layers, to see what its cache holds and that its attention is
        causal (`model_probe`). Asks nothing of the daemon. Raises UnsupportedModel, with the reason, for a model, or
        any other object, whose KV could not be restored exactly, and InvalidRequest for any other argument of a wrong
        type or out of range.
        """
        if not callable(getattr(client, "open_layout", None)):
            raise InvalidRequest(
                f"client is of type {type(client).__name__}; give a kvservice_client.Client", field="client"
            )
        arguments.instance(lora_id, str, "lora_id")
        arguments.instance(salt, bytes, "salt")
        arguments.seconds(wait_s, "wait_s")
        arguments.seconds(save_wait_s, "save_wait_s")
        arguments.whole(staging_bytes, "staging_bytes", 0, 2**60)
        if rates is not None:
            arguments.instance(rates, Rates, "rates")
        if device is not None:
            arguments.instance(device, Device, "device")  # type: ignore[type-abstract]  # It is not made.
        self._generation = forks.generation
        self._lines = RateLimitedLog(log)
        self._model, self._lora_id = model, lora_id
        self._check_adapters()
        self.layout = layout_of(
            model, model_id=model_id, model_revision=model_revision, block_tokens=block_tokens, rotated=rotated
        )
        self.rates = rates or Rates(client.clock.now_s)
        self._client = client
        self._blocks = client.open_layout(self.layout)
        self._salt = salt
        self._wait_s, self._save_wait_s = wait_s, save_wait_s
        self._ropes: ModelRopes | None = None
        self._tokens_max = self._ropes_for_all().tokens_max if self._is_dynamic else None
        self._metrics = metrics = EngineMetrics(model_id)
        self._breaker = Breaker(probe_of(self._blocks), clock=client.clock, on_change=metrics.breaker_changed)
        self._device = device = device or device_for(model.device)
        if device.arena_observer is not None:
            client.observe_arenas(device.arena_observer)
        self._lookup = PrefixLookup(client, self._blocks, self._ropes_of_model, in_place=lambda: device.reads_in_place)
        dropped = metrics.save_dropped
        self._saver = LayerSaver(device, self._blocks, staging_bytes=staging_bytes, on_dropped=dropped)
        parts = SaverParts(
            self._saver,
            self._breaker,
            self._keys,
            block_tokens,
            torch_dtype(self.layout),
            self._tokens_max,
            may_hide=rotated,
            on_prompt=self._learn_hidden_token,
        )
        key_hooks = None if rotated else self._key_hooks()
        self._builder = CacheBuilder(
            model, self.layout, device, self.rates, parts, client.clock, wait_s, key_hooks, metrics.add
        )
        # What `generate` is expected to hide where it is given no mask; each prompt's first forward shows what it does.
        self._hidden_token = hidden_token(getattr(model, "generation_config", None))
        self._turns = Turns(model, self.layout, self._tokens_max)
        self._turn_saver = TurnSaver(client, self._blocks, device, self._breaker, dropped)
        self._work = device.stream("kvservice-save")  # One thread, so that a turn finds what the turn before it saved.
        self._hooks: ModelHooks | None = None

    def close(self) -> None:
        """Take no more saves; what was begun is still sent. Does not wait.

        Caches still work. The hooks on the model are removed with the last of them.
        """
        self._hooks = None
        self._breaker.close(0.0)
        self._saver.close()
        self._builder.close()
        with suppress(StreamClosed):  # It was closed before.
            self._work.submit(self._turn_saver.close)
        self._work.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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

        Returns at once: the model waits for each layer when it needs it. The last, partial block is found if it is one
        of the newest that continue the same whole block, or if the session or the conversation names it.
        `token_ids` is one prompt from its first token on, or a batch ``[row, column]`` with its `attention_mask`,
        padded on the left; then `session_id` is a list with one id per row, if any. At least one token is left to
        compute, because the model has to give its logits.
        `request_id` names the request to `kvctl explain`.
        """
        given = sequences(token_ids, attention_mask)
        if conversation is not None and len(given.pads) != 1:
            raise UnsupportedModel("a conversation is restored by itself, not in a batch")
        if given.hidden.any() and (conversation is not None or not self.layout.rotated):
            raise UnsupportedModel("tokens can be hidden neither in a conversation nor where keys are stored unrotated")
        if attention_mask is None and conversation is None and self.layout.rotated:
            given = given.hiding(self._hidden_token)
        if conversation is not None and not conversation.is_prefix_of(given.tokens(0)):
            conversation.reset()
        names = _names(session_id, len(given.pads))
        keys = self._keys()
        request = Request(self._client, self.rates, request_id, self._metrics.add)
        found: list[StoredPrefix | None] = [None] * len(given.pads)
        error = self._refusal()
        if error is None:
            try:
                found = self._find(given, keys, names, conversation, request_id)
            except KVError as raised:
                error = raised
            self._breaker.record(answered(error))
            request.looked_up()
        else:
            request.was_asked = False
        if error is not None:
            self._lines.warning(
                "the history is computed, not loaded: %s: %s", error.reason, error.message, kind=error.reason
            )
        request.not_found = error
        replay = None
        if conversation is not None and conversation.cuts:
            tokens = found[0].tokens if found[0] is not None else 0
            replay = partial(replayed, self._model, self._device, conversation.copy(), self._ropes_of_model, tokens)
        self._hooks = hooks = self._hooks or ModelHooks(self._model)
        restored = self._builder.build(given, keys, found, request, replay, hooks)
        if replay is not None and conversation is not None and not restored.tokens:
            conversation.reset()  # What is left of it is computed without what was cut.
        return replace(restored, not_found=error)

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

        The last, partial block is stored too. With a `session_id` or a `conversation` it belongs to the session until a
        later turn replaces it with a fuller one. A session that was cut can be continued only with its conversation and
        with the cache that `restore` returned. Waits at most `wait_s` (default: the connector's `save_wait_s`). Work
        that is not done by then continues, and the result has DeadlineExceeded.
        """
        given = sequences(token_ids, attention_mask, may_have_ended=True)
        turns = self._turns.of(given, cache, self._keys(), _names(session_id, len(given.pads)), conversation)
        block_count = sum(len(turn.chain) for turn in turns)
        if not block_count:
            return Saved()
        saver = forward_saver_of(cache)
        if saver is not None and saver.misplaced:
            return Saved(refused=block_count, error=InvalidRequest(saver.misplaced))
        if saver is not None and saver.has_hidden and conversation is not None:
            hidden = InvalidRequest("the attention mask hides tokens: they are not what the conversation says")
            return Saved(refused=block_count, error=hidden)
        if (refusal := self._refusal()) is not None:
            self._metrics.save_dropped("BREAKER_OPEN", block_count)
            return Saved(refused=block_count, error=refusal)
        saved: list[Saved] = []
        computed = self._device.computed()

        def work() -> None:
            meanwhile = saver.saves if saver is not None else None
            saved.extend(self._turn_saver.save(turn, durability, computed, meanwhile) for turn in turns)

        if not self._in_background(work, self._save_wait_s if wait_s is None else wait_s):
            error = DeadlineExceeded("the save is not done yet; it continues in the background")
            return Saved(refused=block_count, error=error)
        return sum(saved, Saved())

    def truncate(self, conversation: Conversation, keep: Sequence[tuple[int, int]]) -> bool:
        """Cut a conversation that was saved: only these ranges of its tokens, (first, count) each, stay.

        `truncation.keep_on_overflow` gives those that a full context window leaves. Its next `restore` gives the
        KV of `conversation.token_ids`, at the positions where they are now. False if the daemon could not be
        updated in time: the conversation is cut all the same, and computed again. Raises InvalidRequest for ranges
        that are not ascending, disjoint and inside the conversation.
        """
        before = conversation.copy()
        conversation.truncate(keep)
        if not conversation.cuts or conversation.cuts == before.cuts:
            return True
        keys, ranges = self._keys(), [(int(first), int(count)) for first, count in keep]
        outcome: list[bool] = []

        def work() -> None:
            try:
                session_sync.truncate(self._client, keys, before, ranges)
                outcome.append(True)
            except KVError as error:
                self._breaker.record(answered(error))
                self._lines.warning(
                    "session %s was not cut: %s: %s",
                    before.session_id,
                    error.reason,
                    error.message,
                    kind=error.reason,
                )

        return self._breaker.allow() and self._in_background(work, self._save_wait_s) and bool(outcome)

    def queue(self, *, patience_s: float = 2.0) -> PromptQueue:
        """A queue of prompts that wait for a batch of this model. Those whose history needs no read from SSD come
        first, and those that waited for `patience_s` before them. Queues of one client must not share request ids.
        """
        return PromptQueue(self._client, self._reads_of, patience_s)

    def _reads_of(self, token_ids: TokenIds, session_id: str) -> tuple[NDArray[Any], Session | BlockChain]:
        """The tokens of one prompt, and what `restore` will look up. Raises InvalidRequest, UnsupportedModel."""
        given = sequences(token_ids)
        if self.layout.rotated:
            given = given.hiding(self._hidden_token)
        if session_id:
            return given.tokens(0), self._client.session(self.layout, session_id)
        return given.tokens(0), self._keys().chain(given.tokens(0), hidden=given.hidden_tokens(0))

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait for all running saves. Returns whether they are done."""
        deadline = Deadline(timeout_s, self._client.clock)
        return self._saver.flush(timeout_s) and self._in_background(lambda: None, deadline.remaining_s)

    def _find(
        self,
        given: Sequences,
        keys: Keys,
        session_ids: Sequence[str],
        conversation: Conversation | None,
        request_id: str,
    ) -> list[StoredPrefix | None]:
        """For each row what is stored of it, leased. Raises KVError."""
        deadline = Deadline(self._wait_s, self._client.clock)
        found: list[StoredPrefix | None] = []
        try:
            for row in range(len(given.pads)):
                tokens = given.tokens(row)
                tokens_max = len(tokens) - 1
                if self._tokens_max is not None and len(tokens) > self._tokens_max:
                    tokens_max = 0  # The whole prompt is rotated in another way.
                if conversation is not None and conversation.cuts:
                    found.append(self._lookup.by_conversation(conversation, tokens_max, keys, deadline))
                else:
                    name = session_ids[row] if conversation is None else conversation.session_id
                    hidden = given.hidden_tokens(row)
                    found.append(self._lookup.by_tokens(tokens, hidden, tokens_max, keys, name, deadline, request_id))
        except KVError:
            self._builder.release(found)
            raise
        return found

    def _in_background(self, work: Callable[[], None], timeout_s: float) -> bool:
        """Run it on the connector's own thread, after all earlier work. Returns whether it was done in time."""
        try:
            event = self._work.submit(spans.carried(work))
        except StreamClosed:
            return False
        is_done = event.wait(timeout_s)
        if is_done and event.error is not None:
            raise event.error
        return is_done

    def _learn_hidden_token(self, token_ids: NDArray[Any], hidden: NDArray[np.bool_]) -> None:
        """Remember which token this prompt's forward hid, if any: the next prompt is looked up with the same token."""
        if len(token_ids) != 1:
            return
        tokens = np.unique(token_ids[hidden])
        if not len(tokens):
            if self._hidden_token is not None and (token_ids == self._hidden_token).any():
                self._hidden_token = None
        elif len(tokens) == 1 and bool(((token_ids == tokens[0]) == hidden).all()):
            self._hidden_token = int(tokens[0])

    def _check_adapters(self) -> None:
        if not self._lora_id and has_adapters(self._model):
            raise UnsupportedModel("the model has adapters loaded; name the active one by lora_id")

    def _refusal(self) -> KVError | None:
        """Why the daemon is not asked now; None if it is asked."""
        if self._generation != forks.generation:
            return DaemonUnavailable(
                "the connector was made before fork() and its threads are the parent's: make one here"
            )
        if not self._breaker.allow():
            return DaemonUnavailable("the daemon did not answer lately: it is not asked")
        return None

    def _keys(self) -> Keys:
        """What keys depend on. Read per chain, because the model's adapter or dtype may have changed."""
        self._check_adapters()
        if self._model.dtype != torch_dtype(self.layout):
            raise UnsupportedModel(f"the model computes in {self._model.dtype} now; its layout has {self.layout.dtype}")
        return Keys(self.layout, self._salt, extra_identity(self._lora_id))

    @property
    def _is_dynamic(self) -> bool:
        """Whether keys of long prompts are rotated in another way."""
        return any(group.rotary.kind == "dynamic" for group in self.layout.groups)

    def _key_hooks(self) -> KeyHooks:
        """For layouts of keys before rotation. Raises UnsupportedModel if the model does not show them."""
        ropes = self._ropes_for_all()
        try:
            return KeyHooks(self._model, self.layout, ropes)
        except UnsupportedModel:
            raise
        except Exception as error:  # The model's modules may give anything, of any shape.
            why = f"{type(error).__name__}: {error}"
            raise UnsupportedModel(f"its keys before rotation are not available: {why}; keep them rotated") from error

    def _ropes_of_model(self) -> ModelRopes:
        """Raises UnsupportedRotation."""
        if self._ropes is None:
            self._ropes = ModelRopes.from_model(self._model)
        return self._ropes

    def _ropes_for_all(self) -> ModelRopes:
        """For layouts whose keys are rotated whenever they are loaded. Raises UnsupportedModel."""
        try:
            return self._ropes_of_model()
        except UnsupportedRotation as error:
            raise UnsupportedModel(str(error)) from error
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise UnsupportedModel(f"its keys cannot be rotated: {why}") from error


def _names(session_id: str | Sequence[str], rows: int) -> Sequence[str]:
    """The id of each row's session; "" where a row has none. Raises InvalidRequest for ids that are not allowed."""
    if session_id is None or (isinstance(session_id, str) and not session_id):
        return [""] * rows
    one = isinstance(session_id, str) or not isinstance(session_id, Sequence)
    names: Sequence[object] = [session_id] if one else session_id
    ids = [checked_session_id(name) if name != "" else "" for name in names]
    if len(ids) != rows:
        raise InvalidRequest(f"{len(ids)} sessions are named for {rows} sequences", field="session_id")
    named = [name for name in ids if name]
    if len(set(named)) != len(named):
        raise InvalidRequest("two sequences of a batch cannot be turns of the same session", field="session_id")
    return ids
