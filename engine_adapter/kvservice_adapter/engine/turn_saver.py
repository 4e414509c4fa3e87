"""Saves the remaining blocks of a turn at its end, and updates its session."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.device.base import Computed, Device, NotOrdered, Pages
from kvservice_adapter.engine import session_sync
from kvservice_adapter.engine.forward_saves import ForwardSaves
from kvservice_adapter.save import OnDropped
from kvservice_api.errors import KVError, StorageFailed
from kvservice_api.image import layer_starts
from kvservice_api.keys import BlockChain
from kvservice_client import BlockCache, Client, Durability, SaveResult
from kvservice_client.buffers import Bytes
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0  # Bounds the wait for copies and for other saves. The engine's thread does not wait that long.


@dataclass(frozen=True, slots=True)
class Saved:
    """The outcome of a save: counts of blocks, and why the first failed block or the session's update failed.

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
class Turn:
    """One sequence when its turn has ended: the blocks that are to be stored, and the session that is to name them."""

    chain: BlockChain
    pages: Callable[[int, int], Pages]  # Of a layer, from the chain's n-th token on: (layer, n).
    session_id: str = ""  # "" for none.
    cuts: int | None = None  # Of its conversation; None if there is only a session.
    kept_tokens: int = 0  # How many tokens the last cut has kept, before the chain.


class TurnSaver:
    """Saves of one engine. `save` waits for the daemon: call it beside the engine's thread."""

    def __init__(
        self,
        client: Client,
        blocks: BlockCache,
        device: Device,
        breaker: Breaker,
        on_dropped: OnDropped = lambda reason, blocks: None,
    ) -> None:
        """`on_dropped` is called on the thread of `save`, for blocks that were not stored."""
        self._on_dropped = on_dropped
        self._client = client
        self._blocks = blocks
        self._breaker = breaker
        self._copies = device.stream("kvservice-copy")
        self._lines = RateLimitedLog(log)

    def close(self) -> None:
        """No more saves will come."""
        self._copies.close()

    def save(
        self, turn: Turn, durability: Durability, computed: Computed, meanwhile: ForwardSaves[Any] | None = None
    ) -> Saved:
        """Store what is not stored of a sequence, once it is computed, and have its session name it. Raises no KVError.

        `meanwhile` saved blocks of it while the model computed them. The arrays must not change until this returns.
        """
        chain = turn.chain
        if meanwhile is not None:
            meanwhile.wait(_PATIENCE_S)
        try:
            stored_before = self._blocks.contains(chain)
            result = SaveResult(0, 0, [])
            if stored_before < len(chain):
                result = self._blocks.save(
                    chain[stored_before:], self._slices(turn, stored_before, computed), durability
                )
            self._breaker.record(True)
        except KVError as error:
            self._breaker.record(answered(error))
            self._on_dropped(error.reason, len(chain))
            self._lines.warning("a turn was not saved: %s: %s", error.reason, error.message, kind=error.reason)
            return Saved(refused=len(chain), error=error)
        stored_meanwhile = meanwhile.take_stored(chain) if meanwhile is not None else 0
        already_stored = max(0, result.already_stored + stored_before - stored_meanwhile)
        saved = Saved(result.stored + stored_meanwhile, already_stored, len(result.refused))
        kept_blocks = len(chain)
        if result.refused:
            block, why = result.refused[0]
            kept_blocks = stored_before + block
            saved = replace(saved, error=why)
            for _, each in result.refused:
                self._on_dropped(each.reason, 1)
            self._lines.warning(
                "%d blocks were not saved: %s: %s", len(result.refused), why.reason, why.message, kind=why.reason
            )
        not_synced = self._sync(turn, chain[:kept_blocks]) if turn.session_id else None
        return saved if not_synced is None else replace(saved, error=saved.error or not_synced)

    def _sync(self, turn: Turn, chain: BlockChain) -> KVError | None:
        layout = self._blocks.layout
        try:
            if turn.cuts is None:
                session_sync.sync_session(self._client, layout, turn.session_id, chain)
            else:
                session_sync.sync_conversation(
                    self._client, layout, turn.session_id, chain, turn.cuts, turn.kept_tokens
                )
        except KVError as error:
            self._lines.warning(
                "session %s was not continued: %s: %s",
                turn.session_id,
                error.reason,
                error.message,
                kind=error.reason,
            )
            return error
        return None

    def _slices(self, turn: Turn, first_block: int, computed: Computed) -> list[Bytes]:
        """Each layer's slices of the blocks from one on, one after another in new memory of the host."""
        chain = turn.chain[first_block:]
        first_token = sum(turn.chain.token_counts[:first_block])
        starts = layer_starts(self._blocks.layout, self._blocks.shard, chain.token_counts)
        layers = [np.empty(of_layer[-1], np.uint8) for of_layer in starts]
        try:
            self._copies.after(computed)
        except NotOrdered as error:
            raise StorageFailed(f"the KV could not be copied: {error}") from error
        events = [
            self._copies.gather(turn.pages(layer, first_token), chain.token_counts, into)
            for layer, into in enumerate(layers)
        ]
        for event in events:
            if not event.wait(_PATIENCE_S):
                raise StorageFailed("the KV could not be copied in time")
            if event.error is not None:
                raise StorageFailed(f"the KV could not be copied: {event.error}") from event.error
        return layers
