"""A conversation whose history the daemon knows by name: a manifest of slices of blocks.

    session = client.session(layout, "chat-17")
    state = session.append(chain)                               # begins it; the last block may be partial
    state = session.append(more, state.revision)                # continues `state.tip`, in the tail's place
    state = session.truncate([(0, 4), (900, 600)], state.revision)

    with session.lookup() as history:                           # the stored part of the history
        for layer in history.load():                            # slice after slice
            ...

Blocks are saved and loaded by a `BlockCache`, as without a session. A session only lists which tokens of which blocks
make up the history, in order. So it also keeps blocks that no other conversation looks up: a last block that is not
full, and the blocks after a truncation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from kvservice_api.errors import BlockNotFound, InvalidRequest, SessionChanged
from kvservice_api.keys import KEY_BYTES, BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_api.session_ids import checked_session_id
from kvservice_api.v1 import sessions_pb2 as pb
from kvservice_client import arguments
from kvservice_client.block_cache import BlockCache
from kvservice_client.buffers import Bytes
from kvservice_client.channel import SESSIONS
from kvservice_client.connection import Connection
from kvservice_client.lease import Lease, LoadedLayer, ResidencyRun
from kvservice_client.retry import Deadline


class Slice(NamedTuple):
    """Tokens of one block that belong to a history."""

    key: bytes
    first_token: int  # Of the block.
    token_count: int
    block_tokens: int  # How many the block has.
    stored_position: int | None  # Of its first token's key, when rotated. None: see the next field, or not rotated.
    stored_positions: tuple[int, ...] = ()  # One per token, if they are not consecutive.

    @property
    def is_whole(self) -> bool:
        return self.token_count == self.block_tokens


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session at one revision."""

    session_id: str
    layout_fingerprint: bytes
    revision: int
    tip: bytes  # The key that the next block continues; an open tail continues it too.
    tail_tokens: int  # Tokens of the last slice, if it is partial and the next append replaces it; else 0.
    token_count: int
    slice_count: int
    cuts: int
    expires_at: datetime
    slices: tuple[Slice, ...] = ()  # Set by `Session.get`, and by SessionChanged if there are few.
    stored_slices: int = 0  # How many leading slices are stored. Set by `Session.get`.
    stored_tokens: int = 0
    residency: tuple[ResidencyRun, ...] = ()

    @property
    def read_positions(self) -> list[int]:
        """The position at which each slice is read: the sum of the token counts before it. Empty without `slices`."""
        return list(accumulate((each.token_count for each in self.slices), initial=0))[:-1]


class SessionHistory:
    """The stored part of a session's history, leased. A context manager: leaving it releases the lease."""

    def __init__(self, blocks: BlockCache, state: SessionState, lease: Lease | None, block_of_slice: list[int]) -> None:
        self._blocks = blocks
        self._lease = lease
        hit_blocks = lease.hit_blocks if lease is not None else 0
        self._block_of_slice = [block for block in block_of_slice if block < hit_blocks]
        self.state = state
        self.slices = state.slices[: len(self._block_of_slice)]

    @property
    def lease(self) -> Lease | None:
        """The lease on the blocks behind the slices; each block once, in the order of its first slice."""
        return self._lease

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The token count of each slice in a loaded layer."""
        return tuple(each.token_count for each in self.slices)

    @property
    def tokens(self) -> int:
        """How many tokens of the history are stored, from its first one on."""
        return sum(self.token_counts)

    @property
    def residency(self) -> list[ResidencyRun]:
        return self._lease.residency if self._lease is not None else []

    def load(self, timeout_s: float | None = None) -> Iterator[LoadedLayer]:
        """Layer by layer, slice after slice, each `[K, V][head][token][dim]` of the slice's own tokens.

        As `Lease.load`, and with its errors. Raises BlockNotFound if nothing is stored.
        """
        if self._lease is None:
            raise BlockNotFound("nothing of this session's history is stored")
        whole = self._block_of_slice == list(range(self._lease.hit_blocks)) and all(s.is_whole for s in self.slices)
        for layer in self._lease.load(timeout_s=timeout_s):
            yield layer if whole else replace(layer, data=self._cut(layer))

    def _cut(self, layer: LoadedLayer) -> Bytes:
        """The slices' tokens out of one layer of whole blocks."""
        assert self._lease is not None
        arrays = self._blocks.layer_arrays(layer.data, self._lease.token_counts, layer.index)
        parts = []
        for block, each in zip(self._block_of_slice, self.slices, strict=True):
            tokens = slice(each.first_token, each.first_token + each.token_count)
            parts += [np.ascontiguousarray(part[:, tokens]).reshape(-1).view(np.uint8) for part in arrays[block]]
        return np.concatenate(parts)

    def release(self, timeout_s: float | None = None) -> None:
        """End the lease, as `Lease.release`. Never raises."""
        if self._lease is not None:
            self._lease.release(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Session:
    """One session in one layout. Thread-safe; keeps nothing between calls. Made by `Client.session`.

    Changes name the revision that they start from; at another one they raise SessionChanged, and
    `current` returns the session as it is then. All except `append` and `end` raise SessionNotFound if the
    session does not exist.
    """

    def __init__(self, connection: Connection, blocks: BlockCache, session_id: str) -> None:
        self._connection = connection
        self._blocks = blocks
        self.session_id = session_id

    def __repr__(self) -> str:
        return f"Session({self.session_id!r}, {self.layout.model_id!r}, {self.layout.fingerprint.hex()[:8]})"

    @property
    def layout(self) -> Layout:
        return self._blocks.layout

    @property
    def shard(self) -> Shard:
        return self._blocks.shard

    def get(self, timeout_s: float | None = None) -> SessionState:
        """The session with all its slices, and how many of them are stored now."""
        deadline = self._connection.deadline(timeout_s)

        def attempt() -> pb.GetSessionResponse:
            request = pb.GetSessionRequest(**self._named(deadline), shard=self.shard.to_proto())
            return self._connection.channel.call(SESSIONS + "GetSession", request, pb.GetSessionResponse, deadline)

        answer = self._connection.retried(attempt, deadline)
        state = state_of(answer.session)
        runs = tuple(ResidencyRun(run.count, run.dram, run.ssd) for run in answer.runs)
        return replace(
            state,
            stored_slices=answer.stored_slices,
            stored_tokens=answer.stored_tokens,
            residency=runs,
        )

    def append(
        self,
        chain: BlockChain,
        expected_revision: int = 0,
        *,
        stored_position: int | None = None,
        stored_positions: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> SessionState:
        """Add saved blocks to the session's end; revision 0 begins it. Only the last block may be partial.

        The chain's parent is the session's tip. If the session has an open tail, the first block begins with the
        tail's tokens. If keys were rotated at other positions than those where they will be read, `stored_position` is
        the position of the first key, or `stored_positions` has one per key. The call is tried again if the connection
        breaks; if the daemon had executed the first attempt, the second recognizes that.
        """
        arguments.chain(chain)
        deadline = self._connection.deadline(timeout_s)
        attempts = 0

        def attempt() -> pb.Session:
            nonlocal attempts
            attempts += 1
            request = arguments.message(
                pb.AppendTurnRequest,
                **self._named(deadline),
                expected_revision=expected_revision,
                parent_key=chain.parent,
                keys=chain.packed_keys,
                last_block_tokens=chain.token_counts[-1] if len(chain) else 0,
                stored_position=stored_position,
                stored_positions=stored_positions,
            )
            call = self._connection.channel.call
            try:
                return call(SESSIONS + "AppendTurn", request, pb.AppendTurnResponse, deadline).session
            except SessionChanged as error:
                now = error.attached
                if attempts > 1 and now is not None and self._is_ours(now, chain, expected_revision, deadline):
                    return now
                raise

        return replace(state_of(self._connection.retried(attempt, deadline)), slices=())

    def truncate(
        self, keep: Sequence[tuple[int, int]], expected_revision: int, timeout_s: float | None = None
    ) -> SessionState:
        """Keep only these ranges of tokens, (first, count) each: ascending and disjoint.

        If the connection broke meanwhile, SessionChanged may be the result of this call's own first attempt.
        """
        deadline = self._connection.deadline(timeout_s)
        ranges = _ranges(keep)

        def attempt() -> pb.Session:
            request = arguments.message(
                pb.TruncateSessionRequest,
                **self._named(deadline),
                expected_revision=expected_revision,
                keep=ranges,
            )
            call = self._connection.channel.call
            return call(SESSIONS + "TruncateSession", request, pb.TruncateSessionResponse, deadline).session

        return state_of(self._connection.retried(attempt, deadline))

    def fork(
        self, new_session_id: str, expected_revision: int = 0, timeout_s: float | None = None
    ) -> tuple[Session, SessionState]:
        """A second session with the same history so far. Revision 0 accepts any revision.

        If the connection broke meanwhile, SessionChanged may be the result of this call's own first attempt.
        """
        checked_session_id(new_session_id, "new_session_id")
        deadline = self._connection.deadline(timeout_s)

        def attempt() -> pb.Session:
            request = arguments.message(
                pb.ForkSessionRequest,
                **self._named(deadline),
                new_session_id=new_session_id,
                expected_revision=expected_revision,
            )
            call = self._connection.channel.call
            return call(SESSIONS + "ForkSession", request, pb.ForkSessionResponse, deadline).session

        state = state_of(self._connection.retried(attempt, deadline))
        return Session(self._connection, self._blocks, new_session_id), state

    def end(self, timeout_s: float | None = None) -> bool:
        """Delete the session. False if there was none."""
        deadline = self._connection.deadline(timeout_s)

        def attempt() -> pb.EndSessionResponse:
            request = pb.EndSessionRequest(**self._named(deadline))
            return self._connection.channel.call(SESSIONS + "EndSession", request, pb.EndSessionResponse, deadline)

        return self._connection.retried(attempt, deadline).ended

    def lookup(
        self, state: SessionState | None = None, lease_ttl_s: float = 30.0, timeout_s: float | None = None
    ) -> SessionHistory:
        """Lease the stored part of the history, up to the first slice that is not stored.

        `state` is the answer of an earlier `get`; without it, this makes the call.
        """
        state = self.get(timeout_s) if state is None else arguments.instance(state, SessionState, "state")
        slices = state.slices[: state.stored_slices]  # The daemon has verified the token counts of these blocks.
        place: dict[bytes, int] = {}  # After a truncation a block may have several slices; it is loaded once.
        block_of_slice = [place.setdefault(each.key, len(place)) for each in slices]
        tokens = {each.key: each.block_tokens for each in slices}
        chain = BlockChain(b"", tuple(place), tuple(tokens[key] for key in place))
        lease = self._blocks.lookup(chain, lease_ttl_s, timeout_s) if len(chain) else None
        return SessionHistory(self._blocks, state, lease, block_of_slice)

    def _is_ours(self, now: pb.Session, chain: BlockChain, expected_revision: int, deadline: Deadline) -> bool:
        """Whether the session is the result of this client's append, whose answer was lost."""
        if now.revision == expected_revision + 1 and not now.HasField("slices"):
            request = pb.GetSessionRequest(**self._named(deadline))
            now = self._connection.channel.call(
                SESSIONS + "GetSession", request, pb.GetSessionResponse, deadline
            ).session
        return now.revision == expected_revision + 1 and now.slices.keys.endswith(chain.packed_keys)

    def _named(self, deadline: Deadline) -> dict[str, Any]:
        """The fields of every request. Opens the layout in the daemon first."""
        self._connection.session(self.layout, deadline)
        return {"session_id": self.session_id, "layout_fingerprint": self.layout.fingerprint}


def _ranges(keep: Sequence[tuple[int, int]]) -> list[pb.TokenRange]:
    try:
        pairs = [(first, count) for first, count in keep]
    except (TypeError, ValueError) as error:
        raise InvalidRequest("keep must be a sequence of pairs: (first token, count)", field="keep") from error
    return [arguments.message(pb.TokenRange, first=first, count=count) for first, count in pairs]


def current(error: SessionChanged) -> SessionState | None:
    """The present session, with which a change conflicted. Without its slices if there are many."""
    return state_of(error.attached) if error.attached is not None else None


def state_of(message: pb.Session) -> SessionState:
    columns = message.slices
    listed = {each.slice: tuple(each.positions) for each in columns.positions}
    positions = columns.stored_position or [-1] * len(columns.token_count)
    slices = tuple(
        Slice(
            columns.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES],
            columns.first_token[at],
            columns.token_count[at],
            columns.block_tokens[at],
            positions[at] if positions[at] >= 0 else None,
            listed.get(at, ()),
        )
        for at in range(len(columns.token_count))
    )
    return SessionState(
        message.session_id,
        message.layout_fingerprint,
        message.revision,
        message.tip,
        message.tail_tokens,
        message.token_count,
        message.slice_count,
        message.cuts,
        message.expires_at.ToDatetime(UTC),
        slices,
    )
