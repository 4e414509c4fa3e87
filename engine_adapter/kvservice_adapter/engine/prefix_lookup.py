"""Finds the stored prefix of a prompt: by its tokens, or as the history of a session."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.rotation import Rotation, UnsupportedRotation
from kvservice_adapter.layer_source import HostLayer, layers_of
from kvservice_adapter.session import Conversation, Keys
from kvservice_api.errors import SessionNotFound
from kvservice_api.keys import BlockChain
from kvservice_client import BlockCache, Client, ResidencyRun, SessionState
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import Deadline

log = logging.getLogger(__name__)

_LAYER_S = 10.0  # For a layer that is promoted from SSD. Engines wait less, and compute the history instead.


class KeyRotations(Protocol):
    """How a model's keys are rotated to other positions: `rope.ModelRopes`."""

    def check_shift(self, total_tokens: int) -> None: ...

    def rotations(self, stored: Any, read: Any) -> Sequence[Rotation] | None: ...


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """The leading tokens of a prompt that are stored. They are leased until `release`."""

    tokens: int
    token_counts: tuple[int, ...]  # Of the slices that hold them; the last may hold more.
    load: Callable[[int, int], Iterator[HostLayer]]  # `load(first, count)` loads these slices.
    release: Callable[[], None]
    residency: tuple[ResidencyRun, ...]
    keys: tuple[bytes, ...]  # The keys of the whole blocks among them, after the last cut.
    parent: bytes  # The key that the first of those continues.
    kept_tokens: int = 0  # How many of the tokens the last cut has kept, before those blocks.
    rotations: Sequence[Rotation] | None = None  # One per layer, where keys are read elsewhere than stored.
    may_begin_later: bool = True  # Whether `load` can leave slices out.

    @property
    def tier(self) -> str:
        """ "dram", "ssd" or "mixed"."""
        return tier_of(self.residency)


def tier_of(residency: Sequence[ResidencyRun]) -> str:
    """ "dram", "ssd" or "mixed": where the blocks of a hit are."""
    in_dram = {run.dram for run in residency if run.count}
    if len(in_dram) > 1:
        return "mixed"
    return "dram" if in_dram.pop() else "ssd"


class PrefixLookup:
    """Asks one daemon about the blocks of one layout. Any thread may call it; calls wait for the daemon."""

    def __init__(
        self,
        client: Client,
        blocks: BlockCache,
        turns: Callable[[], KeyRotations],
        *,
        in_place: Callable[[], bool] = lambda: False,
    ) -> None:
        """`turns` may raise UnsupportedRotation; it is called where keys are read elsewhere than stored. Where
        `in_place` says so, a prefix's layers are given where they are, if that is in shared memory.
        """
        self._in_place = in_place
        self._client = client
        self._blocks = blocks
        self._turns = turns
        self._lines = RateLimitedLog(log)

    def by_tokens(
        self,
        token_ids: NDArray[Any],
        hidden: NDArray[np.bool_],
        tokens_max: int,
        keys: Keys,
        session_id: str,
        deadline: Deadline,
        request_id: str,
    ) -> StoredPrefix | None:
        """The longest stored prefix: whole blocks, and one of the newest partial blocks that continue them.

        With a session its last block is found too if it is not one of the newest, unless more whole blocks are stored.
        `hidden` marks the tokens that the attention mask hides. At most `tokens_max` tokens of the prefix are to be
        used. Raises KVError.
        """
        if not tokens_max:
            return None
        of_session = self._session_chain(token_ids, hidden, keys, session_id, deadline) if session_id else None
        builder = keys.builder(token_ids, hidden=hidden)
        if of_session is not None and self._has_more(builder.chain, of_session, deadline):
            of_session = None
        lease = self._blocks.lookup(of_session or builder, timeout_s=deadline.remaining_s, request_id=request_id)
        if not lease.hit_blocks:
            return None
        tokens = min(lease.hit_tokens, tokens_max)
        return StoredPrefix(
            tokens,
            lease.token_counts,
            partial(layers_of, lease, in_place=self._in_place(), layer_timeout_s=_LAYER_S),
            lease.release,
            tuple(lease.residency),
            builder.chain.keys[: tokens // keys.layout.block_tokens],
            builder.parent,
        )

    def by_conversation(
        self, conversation: Conversation, tokens_max: int, keys: Keys, deadline: Deadline
    ) -> StoredPrefix | None:
        """All of a history that was cut, at its new positions. None if the session is not this conversation's,
        or not all of it is stored. Raises KVError.
        """
        state = self._state(conversation.session_id, deadline)
        if state is None or not conversation.is_of(state, keys) or state.stored_slices < len(state.slices):
            why = "there is no such session" if state is None else "it is not this conversation, or partly gone"
            log.info("the cut history of session %s is not used: %s", conversation.session_id, why)
            return None
        try:
            rotations = self._rotations(state) if keys.layout.rotated else None
        except UnsupportedRotation as error:
            self._lines.warning("a cut history is not used: %s", error)
            return None
        session = self._client.session(keys.layout, conversation.session_id)
        history = session.lookup(state, timeout_s=deadline.remaining_s)
        if history.tokens < state.token_count:
            history.release()
            return None
        tokens = min(history.tokens, tokens_max)
        parent = conversation.parent(keys)
        said = conversation.tokens_since_cut[: tokens - conversation.kept_tokens]
        return StoredPrefix(
            tokens,
            history.token_counts,
            lambda first, count: history.load(),
            history.release,
            tuple(history.residency),
            keys.chain(said, parent).keys,
            parent,
            conversation.kept_tokens,
            rotations,
            may_begin_later=False,
        )

    def _session_chain(
        self,
        token_ids: NDArray[Any],
        hidden: NDArray[np.bool_],
        keys: Keys,
        session_id: str,
        deadline: Deadline,
    ) -> BlockChain | None:
        """The session's history, with its tail, if the tokens begin with it; else None."""
        state = self._state(session_id, deadline)
        if state is None or state.cuts:  # The remaining tokens alone do not show what was cut.
            return None
        chain = keys.chain(token_ids[: state.token_count], with_partial=True, hidden=hidden)
        return chain[: common_blocks(chain.keys, state)] or None

    def _has_more(self, chain: BlockChain, of_session: BlockChain, deadline: Deadline) -> bool:
        """Whether more whole blocks of a chain are stored than its session names, which may name another branch of the
        conversation, or an earlier turn.
        """
        if chain.token_count <= of_session.token_count:
            return False
        stored = self._blocks.contains(chain, deadline.remaining_s)
        return chain[:stored].token_count > of_session.token_count

    def _state(self, session_id: str, deadline: Deadline) -> SessionState | None:
        try:
            return self._client.session(self._blocks.layout, session_id).get(deadline.remaining_s)
        except SessionNotFound:
            return None

    def _rotations(self, state: SessionState) -> Sequence[Rotation] | None:
        """The rotations that turn the keys of each layer from their stored positions to those where they are read.

        Raises UnsupportedRotation.
        """
        stored = [
            each.stored_positions or range(each.stored_position or 0, (each.stored_position or 0) + each.token_count)
            for each in state.slices
        ]
        positions = np.concatenate([np.asarray(each, np.int64) for each in stored])
        read = np.arange(len(positions))
        if (positions == read).all():
            return None
        turns = self._turns()
        turns.check_shift(max(int(positions.max()) + 1, len(positions)))
        return turns.rotations(positions, read)


def common_blocks(keys: tuple[bytes, ...], state: SessionState, first_slice: int = 0) -> int:
    """How many leading blocks a chain and a session's slices from `first_slice` on share."""
    slices = state.slices[first_slice:]
    pairs = zip(keys, slices, strict=False)
    return next((at for at, (key, each) in enumerate(pairs) if key != each.key), min(len(keys), len(slices)))
