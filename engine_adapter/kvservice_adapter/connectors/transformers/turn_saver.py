"""Saves what is left of a turn when it has ended, and updates its session."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.connectors.transformers.cache import StoredCache, Tensors
from kvservice_adapter.connectors.transformers.forward_saver import ForwardSaver
from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel, dynamic_layers
from kvservice_adapter.connectors.transformers.rows import Sequences, common_tokens
from kvservice_adapter.connectors.transformers.unrotated import UnrotatedLayer
from kvservice_adapter.device.base import Device, Pages
from kvservice_adapter.engine import session_sync
from kvservice_adapter.session import Conversation, Keys
from kvservice_api.errors import InvalidRequest, KVError, StorageFailed
from kvservice_api.image import layer_starts
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout
from kvservice_client import BlockCache, Client, Durability
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0  # For what else is being saved. Only the connector's own thread waits that long.


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


@dataclass(frozen=True, slots=True)
class Saving:
    """One sequence's part of a save: blocks whose first token lies in a column of its row."""

    chain: BlockChain
    row: int
    column: int
    session_id: str = ""
    cuts: int | None = None  # Of its conversation; None where there is only a session.
    kept_tokens: int = 0  # What the last cut left, before the chain.


class TurnSaver:
    """Saves of one connector. `prepare` is for the engine's thread, `save` may take as long as the daemon does."""

    def __init__(
        self,
        client: Client,
        blocks: BlockCache,
        model: PreTrainedModel,
        device: Device,
        breaker: Breaker,
        tokens_max: int | None,
    ) -> None:
        self._client = client
        self._blocks = blocks
        self._model = model
        self._breaker = breaker
        self._tokens_max = tokens_max
        self._copies = device.stream("kvservice-copy")
        self._lines = RateLimitedLog(log)

    @property
    def _layout(self) -> Layout:
        return self._blocks.layout

    def close(self) -> None:
        """There is nothing more to save."""
        self._copies.close()

    def prepare(
        self,
        given: Sequences,
        cache: Cache,
        keys: Keys,
        session_ids: Sequence[str],
        conversation: Conversation | None,
    ) -> list[Saving]:
        """What of each row is to be stored. Raises InvalidRequest where the tokens are not those of the cache."""
        saver = forward_saver_of(cache)
        if saver is None and conversation is not None and conversation.cuts:
            raise InvalidRequest(
                "a conversation that was cut is saved with the cache that restore gave: no other knows the cut"
            )
        columns = cache.get_seq_length()
        longest = columns - min(given.pads)
        found = []
        for row, pad in enumerate(given.pads):
            row_end = saver.end_of_row(row) if saver is not None else None
            tokens = given.tokens(row, columns if row_end is None else row_end)
            if saver is not None and not saver.stopped:
                known = saver.token_ids(row)
                common = common_tokens(tokens, known)
                if common < min(len(tokens), len(known)):
                    raise InvalidRequest(f"token {common} is not the one that the cache was computed with")
            if self._tokens_max is not None and longest > self._tokens_max:
                tokens = tokens[:0]  # The last ones are rotated in another way, since an unknown token.
            if conversation is None:
                name = session_ids[row]
                hidden = saver.hidden_tokens(row) if saver is not None else None
                saving = Saving(keys.chain(tokens, with_partial=bool(name), hidden=hidden), row, pad, name)
            else:
                saving = _of_conversation(conversation, tokens, keys, row, pad)
            if saver is not None and not saver.continues(row, saving.column, saving.chain.parent):
                raise InvalidRequest("the cache's history was cut: save it with its conversation, as it was then")
            found.append(saving)
        return found

    def save(
        self, saving: Saving, states: Sequence[Tensors], meanwhile: ForwardSaver | None, durability: Durability
    ) -> Saved:
        """Store what is not stored of a sequence, and have its session name it. Waits for the daemon.

        `meanwhile` is what saved blocks while the model computed them.
        """
        chain = saving.chain
        if meanwhile is not None:
            meanwhile.saves.wait(_PATIENCE_S)
        try:
            stored_before = self._blocks.contains(chain)
            refused: list[tuple[int, KVError]] = []
            stored = already_stored = 0
            if stored_before < len(chain):
                new = chain[stored_before:]
                column = saving.column + stored_before * self._layout.block_tokens
                result = self._blocks.save(new, self._slices(states, saving.row, column, new), durability)
                stored, already_stored, refused = result.stored, result.already_stored, result.refused
            self._breaker.record(True)
        except KVError as error:
            self._breaker.record(answered(error))
            self._lines.warning("a turn was not saved: %s: %s", error.reason, error.message, kind=error.reason)
            return Saved(refused=len(chain), error=error)
        stored_meanwhile = meanwhile.saves.take_stored(chain) if meanwhile is not None else 0
        why = refused[0][1] if refused else None
        if why is not None:
            self._lines.warning(
                "%d blocks were not saved: %s: %s", len(refused), why.reason, why.message, kind=why.reason
            )
        already_stored += stored_before - stored_meanwhile
        saved = Saved(stored + stored_meanwhile, max(0, already_stored), len(refused), why)
        if not saving.session_id:
            return saved
        kept = stored_before + refused[0][0] if refused else len(chain)
        try:
            self._sync(saving, chain[:kept])
        except KVError as error:
            self._lines.warning(
                "session %s was not continued: %s: %s",
                saving.session_id,
                error.reason,
                error.message,
                kind=error.reason,
            )
            return replace(saved, error=saved.error or error)
        return saved

    def states(self, cache: Cache, rows: int) -> list[Tensors]:
        """Keys and values of each layer. Raises UnsupportedModel where they are not what the layout describes."""
        layout, dtype = self._layout, self._model.dtype
        columns = cache.get_seq_length()
        found = []
        for index, layer in enumerate(dynamic_layers(cache, layout.layers)):
            keys, values = layer.keys, layer.values
            if keys is not None and not layout.rotated:
                keys = layer.raw_keys if isinstance(layer, UnrotatedLayer) else None
                if keys is None:
                    raise UnsupportedModel(f"the keys of layer {index} were not seen before they were rotated")
            if keys is None or values is None:
                raise UnsupportedModel(f"layer {index} of the cache is empty")
            group = layout.group_of(index)
            for states, dim in ((keys, group.k_head_dim), (values, group.v_head_dim)):
                expected = (rows, group.kv_heads, columns, dim)
                if tuple(states.shape) != expected or states.dtype != dtype:
                    would = "one sequence of this model" if rows == 1 else f"{rows} sequences of this model"
                    raise UnsupportedModel(
                        f"layer {index} of the cache is {tuple(states.shape)} of {states.dtype}; "
                        f"{would} would be {expected} of {dtype}"
                    )
            found.append((keys, values))
        return found

    def _sync(self, saving: Saving, chain: BlockChain) -> None:
        if saving.cuts is None:
            session_sync.sync_session(self._client, self._layout, saving.session_id, chain)
            return
        session_sync.sync_conversation(
            self._client, self._layout, saving.session_id, chain, saving.cuts, saving.kept_tokens
        )

    def _slices(self, states: Sequence[Tensors], row: int, column: int, chain: BlockChain) -> list[NDArray[Any]]:
        """Each layer's slices of a chain's blocks, one after another in new memory of the host."""
        starts = layer_starts(self._layout, self._blocks.shard, chain.token_counts)
        layers = [np.empty(of_layer[-1], np.uint8) for of_layer in starts]
        events = [
            self._copies.gather(Pages(keys, values, [row], column), chain.token_counts, into)
            for (keys, values), into in zip(states, layers, strict=True)
        ]
        for event in events:
            if not event.wait(_PATIENCE_S):
                raise StorageFailed("the KV could not be copied in time")
            if event.error is not None:
                raise event.error
        return layers


def forward_saver_of(cache: Cache) -> ForwardSaver | None:
    """The saver of a cache that this connector made; None for one of the library's own."""
    if not isinstance(cache, StoredCache):
        return None
    assert isinstance(cache.observer, ForwardSaver)  # The only one that a connector makes.
    return cache.observer


def _of_conversation(conversation: Conversation, tokens: NDArray[Any], keys: Keys, row: int, pad: int) -> Saving:
    """Let the conversation go on to these tokens. What was said since its last cut is to be stored."""
    if not conversation.is_prefix_of(tokens):
        if conversation.cuts:
            raise InvalidRequest("the tokens do not begin with what is left of the conversation")
        conversation.reset()  # It was edited.
    conversation.extend(tokens[conversation.token_count :])
    kept_tokens = conversation.kept_tokens
    chain = keys.chain(conversation.tokens_since_cut, conversation.parent(keys), with_partial=True)
    return Saving(chain, row, pad + kept_tokens, conversation.session_id, len(conversation.cuts), kept_tokens)
