"""Records the turns of a live load, in the form that the simulator replays: arrival, tokens, and the chain as hash ids.

A turn begins with a lookup. Further lookups of the same prefix while it runs (per rank, or for a tail), and saves that
continue its chain, belong to it. It has ended once its leases have, and nothing came for some seconds. A save without a
lookup is a turn too. Nothing is noted while no stream records.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvservice.blocks import NO_ROW, BlockTable
from kvservice.clock import Clock
from kvservice.store.caller import Caller
from kvservice.store.leases import Lease, Leases
from kvservice.store.operations.requests import ReportRecord
from kvservice.store.sessions.manifests import SessionAppend
from kvservice.store.tasks import LoopBudget
from kvservice_api.errors import Overloaded
from kvservice_api.image import block_geometry
from kvservice_api.layout import Layout, Shard

TRACE_MAX_S = 30 * 86400.0
_STREAMS_MAX = 4
_TURNS_MAX, _KEYS_MAX = 4096, 1 << 18  # Of turns that run, and of those that a stream has not sent: up to 40 MB each.
_KEYS_PER_TURN = 16_384
_SETTLED_S = 2.0
_SEND_EVERY_S = 0.5
_HASHES_A_TURN = 512  # They take half a millisecond of the event loop.
_ID_BITS = 63


class RecordedTurn(NamedTuple):
    """One turn. `hash_ids` name the whole blocks of its prompt and answer, each with all blocks before it."""

    at_s: float  # When it arrived, from the recording's begin.
    prompt_tokens: int  # With the history.
    answer_tokens: int
    hash_ids: list[int]


class TraceStep(NamedTuple):
    """What ended since the step before. `layout` is None before the first turn."""

    layout: Layout | None
    kv_bytes_per_token: int
    turns: list[RecordedTurn]
    dropped: int  # Since the begin: turns beyond the limits, and turns of other layouts.
    done: bool


@dataclass(slots=True, eq=False)
class _Turn:
    at_s: float
    layout_id: int
    tenant: int
    keys: list[bytes]  # Of whole blocks, and at the end perhaps of a partial one.
    asked: int  # How many of them the lookup asked for.
    request_id: str
    lease_ids: set[int] = field(default_factory=set)
    last_s: float = 0.0
    partial_tokens: int = 0  # Of the last block that was saved; 0: it is whole, or none was.
    prompt_tokens: int = 0  # As an engine reported; 0 without.


@dataclass(slots=True, eq=False)
class _Stream:
    tenant: int
    layout_id: int | None
    began_s: float
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    turns: deque[_Turn] = field(default_factory=deque)
    key_count: int = 0
    dropped: int = 0


class TraceRecorder:
    """Call it on the event loop's thread."""

    def __init__(
        self,
        blocks: BlockTable,
        layouts: Callable[[], Mapping[int, Layout]],
        leases: Leases,
        clock: Clock,
        loop_budget: LoopBudget,
    ) -> None:
        self._blocks = blocks
        self._layouts = layouts
        self._leases = leases
        self._clock = clock
        self._loop_budget = loop_budget
        self._streams: list[_Stream] = []
        self._running: dict[_Turn, None] = {}
        self._by_key: dict[bytes, _Turn] = {}  # The last turn with this block.
        self._key_count = 0
        self._dropped = 0  # Turns that were not noted, of any tenant.
        self._stopping = asyncio.Event()

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    def stop(self) -> None:
        """The daemon ends: the streams send what they have, and end."""
        self._stopping.set()

    # What the store notes. Each returns at once where no stream records.

    def looked_up(
        self, caller: Caller, layout_id: int, keys: Sequence[bytes], lease: Lease | None, request_id: str
    ) -> None:
        """A client asked for these blocks of a prefix. Without a lease and a request id it was no engine's request."""
        if not self._streams or not keys or (lease is None and not request_id):
            return
        turn = self._same_request(keys, request_id)
        if turn is None:
            turn = self._begin(caller, layout_id, list(keys[:_KEYS_PER_TURN]), len(keys), request_id)
        if turn is not None:
            turn.last_s = self._clock.monotonic_s()
            if lease is not None:
                turn.lease_ids.add(lease.lease_id)

    def saved(
        self, caller: Caller, layout_id: int, parent_key: bytes, keys: Sequence[bytes], last_block_tokens: int
    ) -> None:
        """A client began to save these blocks. All except the last are whole."""
        if not self._streams or not keys or self._extended(parent_key, keys, last_block_tokens):
            return
        row = int(self._blocks.rows_of_keys([parent_key])[0])
        before = [] if row == NO_ROW else [row, *self._blocks.ancestors(row, _KEYS_PER_TURN)]
        known = [self._blocks.key_of(each) for each in reversed(before)]
        turn = self._begin(caller, layout_id, [*known, *keys][:_KEYS_PER_TURN], 0, "")
        if turn is not None:
            turn.partial_tokens = last_block_tokens

    def appended(self, turn: SessionAppend) -> None:
        """A client added these blocks to a session."""
        if self._streams and turn.keys:
            self._extended(turn.parent_key, turn.keys, turn.last_block_tokens)

    def _extended(self, parent_key: bytes, keys: Sequence[bytes], last_block_tokens: int) -> bool:
        """Whether a turn runs that these blocks belong to. They are the end of its chain then, if it lacks the last."""
        turn = self._by_key.get(keys[0]) or self._by_key.get(parent_key)
        if turn is None:
            return False
        turn.last_s = self._clock.monotonic_s()
        kept = turn.keys.index(keys[0]) if keys[0] in turn.keys else turn.keys.index(parent_key) + 1
        more = list(keys[: _KEYS_PER_TURN - kept])
        if kept + len(more) < len(turn.keys) and turn.keys[kept : kept + len(more)] == more:
            return True  # Blocks before the end, as when a shard of them is saved later.
        if self._key_count + kept + len(more) - len(turn.keys) > _KEYS_MAX:
            self._dropped += 1
            self._remove(turn)
            return True
        for key in turn.keys[kept:]:
            self._by_key.pop(key, None)
        self._key_count += kept + len(more) - len(turn.keys)
        turn.keys[kept:] = more
        self._by_key.update(dict.fromkeys(more, turn))
        turn.partial_tokens = last_block_tokens
        return True

    def reported(self, request_id: str, report: ReportRecord) -> None:
        """An engine reported a request, with the tokens of its prompt."""
        if not self._streams:
            return
        for turn in self._running:
            if turn.request_id == request_id:
                turn.prompt_tokens = report.message.history_tokens + report.message.new_tokens
                turn.last_s = self._clock.monotonic_s()

    # Recording

    async def record(self, caller: Caller, layout_id: int | None, duration_s: float) -> AsyncGenerator[TraceStep, None]:
        """The turns that end from now on, twice per second; the last step has `done`.

        Of one layout: `layout_id`, or, if it is None, that of the first turn. Raises Overloaded.
        """
        if len(self._streams) == _STREAMS_MAX:
            raise Overloaded(f"{_STREAMS_MAX} recordings run, the most that this daemon takes: end one of them")
        began_s = self._clock.monotonic_s()
        stream = _Stream(caller.tenant.number, layout_id, began_s)
        self._streams.append(stream)
        not_noted, sent_dropped = self._dropped, -1
        try:
            while True:
                left_s = began_s + duration_s - self._clock.monotonic_s()
                with suppress(TimeoutError):
                    async with self._clock.timeout(max(0.0, min(left_s, _SEND_EVERY_S))):
                        await self._stopping.wait()
                over = self._stopping.is_set() or self._clock.monotonic_s() >= began_s + duration_s
                self._end_settled()
                if over:
                    for turn in self._running:
                        if not turn.lease_ids:
                            self._give(stream, replace(turn, keys=turn.keys.copy()))
                turns = [await self._recorded(stream) for _ in range(len(stream.turns))]
                dropped = stream.dropped + self._dropped - not_noted
                if turns or over or dropped != sent_dropped:
                    sent_dropped = dropped
                    yield self._step(stream, turns, dropped, over)
                if over:
                    return
        finally:
            self._streams.remove(stream)
            if not self._streams:
                self._running.clear()
                self._by_key.clear()
                self._key_count = 0

    def _step(self, stream: _Stream, turns: list[RecordedTurn], dropped: int, done: bool) -> TraceStep:
        if stream.layout_id is None:
            return TraceStep(None, 0, turns, dropped, done)
        layout = self._layouts()[stream.layout_id]
        image_bytes = block_geometry(layout, Shard.whole(layout), layout.block_tokens).image_bytes
        return TraceStep(layout, -(-image_bytes // layout.block_tokens), turns, dropped, done)

    async def _recorded(self, stream: _Stream) -> RecordedTurn:
        turn = stream.turns.popleft()
        stream.key_count -= len(turn.keys)
        block_tokens = self._layouts()[turn.layout_id].block_tokens
        is_partial = 0 < turn.partial_tokens < block_tokens
        whole = turn.keys[:-1] if is_partial else turn.keys
        tokens = len(whole) * block_tokens + (turn.partial_tokens if is_partial else 0)
        prompt_tokens = turn.prompt_tokens or (min(turn.asked * block_tokens, tokens) if turn.asked else tokens)
        ids = []
        for count, key in enumerate(whole):
            if count % _HASHES_A_TURN == 0:
                await self._loop_budget.slot()
            digest = hashlib.blake2b(key, digest_size=8, key=stream.salt).digest()
            ids.append(int.from_bytes(digest) >> (64 - _ID_BITS))
        return RecordedTurn(turn.at_s - stream.began_s, prompt_tokens, max(0, tokens - prompt_tokens), ids)

    # Turns that run

    def _same_request(self, keys: Sequence[bytes], request_id: str) -> _Turn | None:
        """The running turn that looked up these blocks before, or all of them except a partial one at the end."""
        for end in (keys[-1:], keys[-2:-1]):
            turn = self._by_key.get(end[0]) if end else None
            if turn is None or len(turn.keys) != turn.asked or turn.keys[-1] != end[0]:
                continue
            if request_id and turn.request_id:
                return turn if request_id == turn.request_id else None
            if any(self._leases.find(lease_id) is not None for lease_id in turn.lease_ids):
                return turn
        return None

    def _begin(self, caller: Caller, layout_id: int, keys: list[bytes], asked: int, request_id: str) -> _Turn | None:
        if len(self._running) == _TURNS_MAX or self._key_count + len(keys) > _KEYS_MAX:
            self._dropped += 1
            return None
        now_s = self._clock.monotonic_s()
        turn = _Turn(now_s, layout_id, caller.tenant.number, keys, asked, request_id, last_s=now_s)
        self._running[turn] = None
        self._key_count += len(keys)
        self._by_key.update(dict.fromkeys(keys, turn))
        return turn

    def _remove(self, turn: _Turn) -> None:
        del self._running[turn]
        self._key_count -= len(turn.keys)
        for key in turn.keys:
            if self._by_key.get(key) is turn:
                del self._by_key[key]

    def _end_settled(self) -> None:
        """End the turns whose leases have ended, and of which nothing came for some time."""
        latest_s = self._clock.monotonic_s() - _SETTLED_S
        for turn in list(self._running):
            turn.lease_ids = {each for each in turn.lease_ids if self._leases.find(each) is not None}
            if turn.lease_ids or turn.last_s > latest_s:
                continue
            self._remove(turn)
            for stream in self._streams:
                self._give(stream, turn)

    def _give(self, stream: _Stream, turn: _Turn) -> None:
        if stream.tenant != turn.tenant or turn.at_s < stream.began_s:
            return
        if stream.layout_id is None:
            stream.layout_id = turn.layout_id
        too_many = len(stream.turns) == _TURNS_MAX or stream.key_count + len(turn.keys) > _KEYS_MAX
        if too_many or stream.layout_id != turn.layout_id:
            stream.dropped += 1
            return
        stream.turns.append(turn)
        stream.key_count += len(turn.keys)
