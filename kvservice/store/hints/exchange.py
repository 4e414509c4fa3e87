"""The hints of all attached engines: their queues, and the readiness of each queued request.

Hints arrive at any time and in any number. They are only noted when they arrive; `HintExchange.tick` evaluates them,
at most 20 times per second, in parts that fit into an iteration of the event loop, and for at most a fifth of the
time. What does not fit waits for a later tick.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from kvservice.blocks import NO_ROW, BlockTable, Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.caller import Caller
from kvservice.store.hints.placement import ExpectedRead, HintPlacement
from kvservice.store.hints.queue_mirror import HintSubject, HintTotals, QueueEntry, QueueLimits
from kvservice.store.hints.stream import TICK_S, Ended, HintStream, Nearness, Ready
from kvservice.store.leases import Client, Leases
from kvservice.store.sessions.sessions import Sessions
from kvservice.store.tails import Tails
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice.tiers.base import Tier
from kvservice_api.errors import KVError, UnknownClient
from kvservice_api.keys import KEY_BYTES

log = logging.getLogger(__name__)

_SHARE_OF_TIME = 5  # A tick that took this long is followed by a pause of four times that.
_TOOK_MAX_S = 0.25  # What a tick may count as: the process may have been stopped meanwhile.
_WINDOW_ENTRIES = 1024  # Of all queues, per tick: the windows.
_OTHER_ENTRIES = 512  # Of all queues, per tick: readiness of entries behind the windows.
_KEYS_PER_TICK = 4096  # Of each queue: the window, and the entries behind it.
_KEYS_A_TURN = 512  # They take half a millisecond of the event loop; so do 32 requests of few blocks.
_ENTRY_KEYS = _KEYS_A_TURN // 32
_TAILS_MAX = 16  # So many of the newest partial blocks after a key are looked at, which may be of other tenants.
_CLIENTS_WORTH = 16  # All hints together have at most so many entries and keys as the queues of so many clients.
_ENDED_MAX = 1024  # Reports of what has ended that wait to be acted on, of all clients.
_ANSWERS_MAX = _ENDED_MAX // 2
_BATCH = 256
_LEAD_S = 10.0  # An expected request counts as queued this long before it is due,
_LATE_S = 60.0  # and until this long after.
_NEXT_S = 0.1  # A queued request without a time is expected this long after the one in front of it.


@dataclass(frozen=True, slots=True)
class HintLimits:
    """`dram_share` is for the hints of all clients together; clients with a queue get equal parts of it."""

    queue: QueueLimits = field(default_factory=lambda: QueueLimits(8192, 262_144))
    dram_share: float = 0.5
    bytes_per_s_max: int = 2 << 30


class _Window(NamedTuple):
    """A request of a stream's window, and its rows that no earlier request of the window reads."""

    stream: HintStream
    entry: QueueEntry
    due_s: float
    rows: Rows


class HintExchange:
    """All streams. Call it on the event loop's thread."""

    def __init__(
        self,
        blocks: BlockTable,
        tails: Tails,
        dram: Tier,
        sessions: Sessions,
        leases: Leases,
        placement: HintPlacement,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        loop_budget: LoopBudget,
        settings: HintLimits,
    ) -> None:
        self._blocks = blocks
        self._tails = tails
        self._dram = dram
        self._sessions = sessions
        self._leases = leases
        self._placement = placement
        self._clock = clock
        self.counters = counters
        self._tasks = tasks
        self.loop_budget = loop_budget
        self._settings = settings
        queue = settings.queue
        self.totals = HintTotals(QueueLimits(_CLIENTS_WORTH * queue.entries_max, _CLIENTS_WORTH * queue.keys_max))
        self._streams: dict[bytes, HintStream] = {}  # By client id.
        self._changes = 0  # Of queues and expectations.
        self._evaluated = (-1, -1, -1)  # The state of changes at the last tick.
        self._next_s = 0.0  # When an expectation begins or ends to count.
        self._work = asyncio.Event()
        self._ended: deque[Ended] = deque()
        self._answers = 0  # Of them: lengths of answers.
        self._is_telling = False

    def start(self) -> None:
        self._tasks.start(self._tick_forever(), "hints")

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    def queued_of(self, client: Client) -> int | None:
        """How many requests the client's queue has; None if it sends no hints."""
        stream = self._streams.get(client.client_id)
        return None if stream is None else len(stream.queue)

    @property
    def queued_count(self) -> int:
        """Requests in the queues of all clients."""
        return sum(len(stream.queue) for stream in list(self._streams.values()))

    def now_s(self) -> float:
        return self._clock.monotonic_s()

    async def pause_until(self, time_s: float) -> None:
        if (pause_s := time_s - self.now_s()) > 0:
            await self._clock.sleep(pause_s)

    @contextmanager
    def open(self, caller: Caller) -> Iterator[HintStream]:
        """A stream for the caller's client, which replaces its earlier one. It also ends with the client's attachment.
        Raises UnknownClient.
        """
        if not caller.client:
            raise UnknownClient("the first message must name an attached client: attach, then ask again",
                                field="client_id")  # fmt: skip
        client = self._leases.client(caller)
        if (former := self._streams.get(client.client_id)) is not None:
            former.end()
        stream = self._streams[client.client_id] = HintStream(self, caller, client, self._settings.queue)
        client.on_detach.add(stream.end)
        try:
            yield stream
        finally:
            stream.end()
            client.on_detach.discard(stream.end)
            if self._streams.get(client.client_id) is stream:
                del self._streams[client.client_id]
            self.note()

    # What streams note

    def note(self) -> None:
        """A queue or an expectation changed, or a stream ended."""
        self._changes += 1
        self._work.set()

    def is_known(self, caller: Caller, subject: HintSubject) -> bool:
        """Count a hint. Whether it is about keys, or about a session of the caller's tenant."""
        self.counters.hints_received += 1
        known = bool(subject.packed_keys) or self._sessions.peek(caller, *subject[:2]) is not None
        self.counters.hints_unknown += not known
        return known

    def queue_ended(self, ended: Ended) -> None:
        """Tell placement soon. Reports of answers, which are many, leave places for the others."""
        is_answer = ended.answer_tokens is not None
        is_full = len(self._ended) == _ENDED_MAX or (is_answer and self._answers == _ANSWERS_MAX)
        if is_full or not self.totals.add(ended.subject):
            self.counters.hints_over_limit += 1
        else:
            self._ended.append(ended)
            self._answers += is_answer
        if self._ended and not self._is_telling:
            self._is_telling = True
            self._tasks.start(self._tell_ended(), "turns and sessions that have ended")

    # Ticks

    async def _tick_forever(self) -> None:
        while True:
            await self._work.wait()
            began_s = self.now_s()
            try:
                await self.tick()
            except KVError as error:
                log.warning("hints could not be evaluated: %s", error.message)
            except Exception:  # An error of ours: without the next ticks, no engine's hints would count any more.
                log.exception("hints could not be evaluated")
            if not any(stream.queue or stream.expected for stream in self._streams.values()):
                self._work.clear()
            took_s = min(self.now_s() - began_s, _TOOK_MAX_S)
            await self._clock.sleep(max(TICK_S, (_SHARE_OF_TIME - 1) * took_s))

    async def tick(self) -> None:
        """Evaluate what changed: the windows first, then a part of the other queued requests."""
        state = (self._blocks.changes, self._sessions.changes, self._changes)
        now_s = self.now_s()
        streams = list(self._streams.values())
        if state != self._evaluated or self._placement.pause_over() or now_s >= self._next_s:
            await self._evaluate_windows(streams, now_s)
            self._evaluated = state
            for stream in streams:
                stream.unevaluated = len(stream.queue)
        for stream in streams:
            await self._evaluate_others(stream, max(16, _OTHER_ENTRIES // len(streams)))

    async def _evaluate_windows(self, streams: Sequence[HintStream], now_s: float) -> None:
        """Give placement the reads of all windows, then set the readiness of these requests."""
        busy = [stream for stream in streams if stream.queue or stream.expected]
        found: list[_Window] = []
        self._next_s = float("inf")
        for stream in busy:
            share_bytes = int(self._settings.dram_share * self._dram.capacity_bytes / len(busy))
            entries = list(self._awaited(stream, max(8, _WINDOW_ENTRIES // len(busy)), now_s))
            found += await self._window(stream, entries, share_bytes, now_s)
        found.sort(key=lambda each: (-each.entry.priority, each.due_s))
        wanted = [
            ExpectedRead(each.rows, each.due_s, each.entry.hint, each.entry.kind) for each in found if len(each.rows)
        ]
        self._placement.want(wanted, self.queued_count)
        examined = _KEYS_A_TURN
        for each in found:
            if examined >= _KEYS_A_TURN:
                examined = 0
                await self.loop_budget.slot()
            if (entry := each.stream.queue.get(each.entry.request_id)) is not None:
                examined += _weight(entry, self._evaluate(each.stream, entry, now_s))

    async def _window(
        self, stream: HintStream, entries: Sequence[QueueEntry], share_bytes: int, now_s: float
    ) -> list[_Window]:
        """The leading requests whose blocks fit into the stream's share of DRAM, each block counted once.

        The last request may be cut to what fits.
        """
        window: list[_Window] = []
        blocks = self._blocks
        seen = np.zeros(blocks.row_end, np.bool_)
        due_s, keys_left, examined = now_s, _KEYS_PER_TICK, _KEYS_A_TURN
        for entry in entries:
            if examined >= _KEYS_A_TURN:
                examined = 0
                await self.loop_budget.slot()
                seen = np.pad(seen, (0, blocks.row_end - len(seen)))  # Blocks were stored meanwhile.
            rows = self._rows(stream, entry.subject)
            examined += _weight(entry, len(rows))
            rows = rows[~seen[rows]]
            seen[rows] = True
            ends = np.cumsum(blocks.size_bytes[rows].astype(np.int64))
            fitting = int(np.searchsorted(ends, share_bytes, "right"))
            due_s = due_s + _NEXT_S if entry.due_s is None else entry.due_s
            window.append(_Window(stream, entry, due_s, rows[:fitting]))
            share_bytes -= int(ends[fitting - 1]) if fitting else 0
            keys_left -= len(rows)
            if fitting < len(rows) or keys_left < 0:
                break
        return window

    def _awaited(self, stream: HintStream, entries: int, now_s: float) -> Iterator[QueueEntry]:
        """The head of the queue, then the requests that typing persons and tools will cause, without an id."""
        yield from islice(stream.queue, entries)
        for subject, (due_s, hint, kind) in list(stream.expected.items()):
            begins_s, ends_s = due_s - _LEAD_S, due_s + _LATE_S
            if now_s >= ends_s:
                stream.expect_no_more(subject)
                continue
            self._next_s = min(self._next_s, begins_s if now_s < begins_s else ends_s)
            if now_s >= begins_s:
                yield QueueEntry("", subject, due_s, 0, hint, kind)

    async def _evaluate_others(self, stream: HintStream, entries: int) -> None:
        """Set the readiness of a part of the requests behind the last part, and of the first ones after the last."""
        keys_left, examined, now_s = _KEYS_PER_TICK, _KEYS_A_TURN, self.now_s()
        for _ in range(min(entries, stream.unevaluated)):
            if examined >= _KEYS_A_TURN:
                examined = 0
                await self.loop_budget.slot()
            entry = next(stream.queue.after(stream.cursor), None) or next(iter(stream.queue), None)
            if entry is None:
                return
            stream.cursor = entry.request_id
            row_count = self._evaluate(stream, entry, now_s)
            examined += _weight(entry, row_count)
            keys_left -= row_count
            stream.unevaluated -= 1
            if keys_left < 0:
                return

    def _evaluate(self, stream: HintStream, entry: QueueEntry, now_s: float) -> int:
        """Set the readiness of a request. Returns how many rows it has."""
        rows = self._rows(stream, entry.subject)
        missing = rows[~self._blocks.lie_in(rows, self._blocks.first_tier)]
        coming_s = self._placement.coming_s(missing) if len(missing) else None
        if not len(rows):
            ready = Ready(Nearness.ABSENT)
        elif not len(missing):
            ready = Ready(Nearness.IN_DRAM)
        elif coming_s is None:
            ready = Ready(Nearness.ON_SSD)
        else:
            ready = Ready(Nearness.COMING, now_s + coming_s)
        stream.set_ready(entry.request_id, ready, now_s)
        return len(rows)

    def _rows(self, stream: HintStream, subject: HintSubject) -> Rows:
        """The rows of the leading stored blocks that belong to the caller's tenant.

        Keys that an engine knows are of whole blocks: the newest partial block that continues them belongs to them.
        """
        blocks, keys = self._blocks, self._keys(stream.caller, subject)
        rows = stored_rows(blocks, stream.caller, keys)
        if not subject.packed_keys or not len(rows) or blocks.key_of(int(rows[-1])) != keys[-1]:
            return rows
        for tail in islice(self._tails.newest_first(keys[-1]), _TAILS_MAX):
            if blocks.tenant[tail] == stream.caller.tenant.number:
                return np.append(rows, stored_rows(blocks, stream.caller, [blocks.key_of(tail)]))
        return rows

    def _keys(self, caller: Caller, subject: HintSubject) -> list[bytes]:
        if subject.packed_keys:
            keys: list[bytes] = np.frombuffer(subject.packed_keys, f"V{KEY_BYTES}").tolist()
            return keys
        manifest = self._sessions.peek(caller, *subject[:2])
        return [] if manifest is None else list(dict.fromkeys(manifest.slices["key"].tolist()))

    # Turns that have ended, and blocks that are not needed any more

    async def _tell_ended(self) -> None:
        try:
            while self._ended:
                began_s = self.now_s()
                batch = [self._ended.popleft() for _ in range(min(_BATCH, len(self._ended)))]
                for each in batch:
                    self.totals.remove(each.subject)
                    self._answers -= each.answer_tokens is not None
                try:
                    await self._tell_batch(batch)
                except Exception:  # An error of ours: the next batches count all the same.
                    log.exception("reports of what has ended could not be evaluated")
                await self._clock.sleep((_SHARE_OF_TIME - 1) * (self.now_s() - began_s))
        finally:
            self._is_telling = False

    async def _tell_batch(self, batch: Sequence[Ended]) -> None:
        for each in batch:
            if each.answer_tokens is not None:
                await self.loop_budget.slot()
                self._placement.answered(self._rows(each.stream, each.subject), each.answer_tokens)
        if dropped := [each for each in batch if each.answer_tokens is None]:
            await self._drop_batch(dropped)

    async def _drop_batch(self, batch: Sequence[Ended]) -> None:
        """Rank blocks as the first to be evicted, except those that other sessions name or other clients use."""
        keys = [self._keys(each.stream.caller, each.subject) for each in batch]
        own = {each.subject[:2] for each in batch if not each.subject.packed_keys}
        elsewhere = await self._sessions.named_elsewhere(keys, own)
        for (stream, _, _, write), names in zip(batch, keys, strict=True):
            await self.loop_budget.slot()
            rows = stored_rows(self._blocks, stream.caller, [key for key in names if key not in elsewhere])
            self._placement.not_needed(rows[self._blocks.used_only_by(rows, stream.client.number)], write=write)


def _weight(entry: QueueEntry, row_count: int) -> int:
    """What a request takes of a turn of the event loop, in keys."""
    return max(_ENTRY_KEYS, row_count, entry.subject.key_count)


def stored_rows(blocks: BlockTable, caller: Caller, keys: Sequence[bytes]) -> Rows:
    """All rows of the leading keys that are stored for the caller's tenant."""
    first = blocks.rows_of_keys(keys)
    missing = np.flatnonzero((first == NO_ROW) | (blocks.tenant[first] != caller.tenant.number))
    first = first[: missing[0]] if len(missing) else first
    if (blocks.next_shard[first] == NO_ROW).all():
        return first
    return np.array([row for start in first.tolist() for row in blocks.shards_of(start)], np.int64)
