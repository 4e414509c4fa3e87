"""Hints for the daemon: the engine's queue, and what the engine or its application knows of the next requests.

    hints = client.hints()
    hints.set_queue([QueuedRequest("cmpl-7", session, starts_in_s=1.5), QueuedRequest("cmpl-8", chain)])
    if hints.readiness("cmpl-7").state is ReadyState.IN_DRAM:
        ...

The daemon promotes the blocks that the requests at the head of the queue will read, and reports how near they are. A
thread keeps the stream open, and opens it again after a restart of the daemon. Hints are advice: nothing depends on
them except the time of a later load.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kvservice_api.errors import InvalidRequest, KVError
from kvservice_api.keys import KEY_BYTES, BlockChain
from kvservice_api.v1 import blocks_pb2, types_pb2
from kvservice_api.v1 import hints_pb2 as pb
from kvservice_client import arguments, forks
from kvservice_client.attach_stream import AttachStream
from kvservice_client.channel import BLOCKS, HINTS, Channel
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline
from kvservice_client.session import Session

log = logging.getLogger(__name__)

_PAUSE_FIRST_S = 0.05
_PAUSE_MAX_S = 1.0
_TOO_OLD_PAUSE_S = 30.0  # Until a daemon that takes no hints is asked again.
_ATTACH_S = 5.0
_KEYS_MAX = 16_384  # Of one request.
_EVENTS_MAX = 256  # Hints that wait to be sent; more drop the oldest.
_EVENT_AGE_S = 5.0  # An older hint is not sent.
_CHANGES_MAX = 1024  # Changes that wait to be sent; more are replaced by the whole queue.
_MESSAGE_CHANGES, _MESSAGE_BYTES = 256, 1 << 20
_START_OFF_S = 0.2  # An expected start that moved by less, or by less than a quarter, is not sent again.
_MS_MAX = 2**32 - 1
_PRIORITY_MAX = 2**31 - 1
_TEXT_BYTES_MAX = 200

Reads = Session | BlockChain | Iterable[bytes]


class ReadyState(StrEnum):
    """How near the stored blocks of a queued request are."""

    IN_DRAM = "dram"
    COMING = "coming"  # They are being promoted to DRAM, or are the next to be promoted.
    ON_SSD = "ssd"
    ABSENT = "absent"  # No block is stored, or there is no such session.
    UNKNOWN = "unknown"  # The daemon has not answered yet, is away, or takes no hints.


class Readiness(NamedTuple):
    """`ready_in_s` is the daemon's estimate for COMING, in seconds from its answer; else 0."""

    state: ReadyState
    ready_in_s: float = 0.0


_UNKNOWN = Readiness(ReadyState.UNKNOWN)
_STATES: Mapping[int, ReadyState] = {
    pb.READINESS_IN_DRAM: ReadyState.IN_DRAM,
    pb.READINESS_COMING: ReadyState.COMING,
    pb.READINESS_ON_SSD: ReadyState.ON_SSD,
    pb.READINESS_ABSENT: ReadyState.ABSENT,
}


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request that waits for the engine.

    `request_id` is the engine's, 1 to 200 bytes. `reads` is the history that it will read: a session, a chain, or
    block keys, of which the first 16,384 count. `starts_in_s`: seconds until the engine expects to begin it, None if
    it cannot tell. Requests with a higher `priority` are promoted first, regardless of the order of the queue.
    """

    request_id: str
    reads: Reads
    starts_in_s: float | None = None
    priority: int = 0


class _Entry(NamedTuple):
    """A queued request, checked. `starts_at_s` is a time of the client's clock."""

    request_id: str
    subject: pb.HintSubject
    starts_at_s: float | None
    priority: int
    request: QueuedRequest | None = None  # What it was made of.

    def is_close_to(self, other: _Entry, now_s: float) -> bool:
        """Whether the daemon need not learn of the difference."""
        if self is other:
            return True
        if (self.priority, self.subject) != (other.priority, other.subject):
            return False
        if self.starts_at_s is None or other.starts_at_s is None:
            return self.starts_at_s is other.starts_at_s
        off_s = abs(self.starts_at_s - other.starts_at_s)
        return off_s < max(_START_OFF_S, 0.25 * (self.starts_at_s - now_s))


class _Put(NamedTuple):
    entry: _Entry
    before: str


class EngineHints:
    """The hints of one client. Get it from `Client.hints`.

    Every method may be called from any thread, returns at once, and makes no call to the daemon. None raises for a
    failure of the daemon; a wrong argument raises InvalidRequest. A forked child begins with an empty queue: the
    parent's requests are the parent's.
    """

    def __init__(self, channel: Channel, attach_stream: AttachStream, clock: Clock = SYSTEM_CLOCK) -> None:
        self._channel = channel
        self._attach_stream = attach_stream
        self._clock = clock
        self._log = RateLimitedLog(log)
        self._is_closed = False
        self._callbacks: list[Callable[[str, Readiness], object]] = []
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        """Begin with an empty queue, without a thread."""
        self._changed = threading.Condition()
        self._queue: dict[str, _Entry] = {}  # In the engine's order.
        self._changes: list[_Put | str] = []  # Since the last message; a text is the id of a removed request.
        self._send_whole = True
        self._events: deque[tuple[float, pb.Hint]] = deque()
        self._ready: dict[str, Readiness] = {}
        self._thread: threading.Thread | None = None
        self._stream_over = threading.Event()
        self.dropped = 0  # Hints that were never sent. Changes of the queue are always sent.

    # The queue

    def set_queue(self, requests: Sequence[QueuedRequest]) -> None:
        """Replace the whole queue, the next request first. Only what differs is sent.

        Its time grows with the queue, and is a tenth for requests that are the same objects as in the last call. `put`
        and `remove` tell of one change in a long queue in less time. Raises InvalidRequest.
        """
        known, entries = self._queue, dict[str, _Entry]()
        for request in arguments.sequence(requests, "requests"):
            former = known.get(request.request_id) if isinstance(request, QueuedRequest) else None
            entry = former if former is not None and former.request is request else self._entry(request)
            if entry.request_id in entries:
                raise InvalidRequest(f"the request {entry.request_id!r} is in the queue twice", field="request_id")
            entries[entry.request_id] = entry
        with self._changed:
            changes = _differences(self._queue, entries, self._clock.now_s())
            self._queue = entries
            for change in changes:
                if isinstance(change, str):
                    self._ready.pop(change, None)
            self._note(changes)

    def put(self, request: QueuedRequest, before: str = "") -> None:
        """Put a request in front of the one with the id `before`, or at the end of the queue. If it is in the queue,
        it moves. Raises InvalidRequest.
        """
        entry = self._entry(request)
        with self._changed:
            self._queue.pop(entry.request_id, None)
            following: list[_Entry] = []
            if before in self._queue:
                names = list(self._queue)
                following = [self._queue.pop(name) for name in names[names.index(before) :]]
            self._queue[entry.request_id] = entry
            self._queue |= {each.request_id: each for each in following}
            self._note([_Put(entry, before)])

    def remove(self, request_id: str) -> None:
        """The request left the queue: it runs, or it was given up. Unknown ids are ignored."""
        with self._changed:
            if self._queue.pop(request_id, None) is not None:
                self._ready.pop(request_id, None)
                self._note([request_id])

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread reports within is sent together, after the end, such as all that a step has changed. Other
        threads that report meanwhile wait.
        """
        with self._changed:
            yield

    # Other hints

    def turn_finished(self, reads: Reads, *, prompt_tokens: int, answer_tokens: int, stop_reason: str = "") -> None:
        """The engine has answered a turn. `answer_tokens` 0: not known. `stop_reason`: at most 200 bytes."""
        turn = arguments.message(
            pb.TurnFinished,
            prompt_tokens=arguments.whole(prompt_tokens, "prompt_tokens"),
            answer_tokens=arguments.whole(answer_tokens, "answer_tokens"),
            stop_reason=arguments.text(stop_reason, "stop_reason", _TEXT_BYTES_MAX),
        )
        self._report(pb.Hint(subject=_subject(reads), turn_finished=turn))

    def typing(self, reads: Reads) -> None:
        """A person has begun to write the next prompt: the daemon promotes the blocks."""
        self._report(pb.Hint(subject=_subject(reads), typing=pb.Typing()))

    def tool_call(self, reads: Reads, name: str, expected_s: float | None = None) -> None:
        """A tool was called, which usually takes `expected_s` seconds: the daemon promotes the blocks in time for its
        answer; at once if None.
        """
        call = pb.ToolCall(name=arguments.text(name, "name", _TEXT_BYTES_MAX))
        if expected_s is not None:
            call.expected_ms = min(_MS_MAX, round(arguments.seconds(expected_s, "expected_s") * 1e3))
        self._report(pb.Hint(subject=_subject(reads), tool_call=call))

    def session_ended(self, reads: Reads) -> None:
        """No further request reads these blocks: they are evicted first, unless other sessions name them or other
        clients used them. Send it before `Session.end`: the daemon then still knows the session's blocks.
        """
        self._report(pb.Hint(subject=_subject(reads), session_ended=pb.SessionEnded()))

    def do_not_keep(self, reads: Reads) -> None:
        """As `session_ended`; and blocks that are not on SSD yet are not written there."""
        self._report(pb.Hint(subject=_subject(reads), do_not_keep=pb.DoNotKeep()))

    # Answers

    def readiness(self, request_id: str) -> Readiness:
        """The daemon's last answer about a queued request. UNKNOWN for requests that are not in the queue."""
        return self._ready.get(request_id, _UNKNOWN)

    def on_readiness(self, callback: Callable[[str, Readiness], object]) -> None:
        """Call `callback` with the request's id and its readiness at each answer of the daemon, on the thread of the
        hints. It must return soon. It is not called when the daemon is lost, which makes all of them UNKNOWN.
        """
        self._callbacks.append(callback)

    # Inside

    def close(self) -> None:
        """Send nothing more. The thread ends once the channel is closed. Called with the client's end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _entry(self, request: QueuedRequest) -> _Entry:
        arguments.instance(request, QueuedRequest, "request")
        if not arguments.request_id(request.request_id):
            raise InvalidRequest("a queued request needs an id", field="request_id")
        starts_at_s = None
        if request.starts_in_s is not None:
            starts_at_s = self._clock.now_s() + arguments.seconds(request.starts_in_s, "starts_in_s")
        priority = arguments.whole(request.priority, "priority", -_PRIORITY_MAX, _PRIORITY_MAX)
        return _Entry(request.request_id, _subject(request.reads), starts_at_s, priority, request)

    def _note(self, changes: Sequence[_Put | str]) -> None:
        """Send these changes. The caller holds the lock."""
        if not changes:
            return
        if not self._send_whole:
            self._changes += changes
        if len(self._changes) > max(_CHANGES_MAX, len(self._queue)):
            self._send_whole = True
            self._changes.clear()
        self._wake()

    def _report(self, hint: pb.Hint) -> None:
        with self._changed:
            if len(self._events) == _EVENTS_MAX:
                self._events.popleft()
                self.dropped += 1
            self._events.append((self._clock.now_s(), hint))
            self._wake()

    def _wake(self) -> None:
        if self._thread is None and not self._is_closed:
            thread = threading.Thread(target=self._run, name="kvservice-hints", daemon=True)
            with suppress(RuntimeError):  # The process has too many threads: the next hint tries again.
                thread.start()
                self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        pause_s = _PAUSE_FIRST_S
        while not self._is_closed:
            over = self._stream_over = threading.Event()
            was_open = is_too_old = False
            try:
                attachment = self._attach_stream.current(Deadline(_ATTACH_S, self._clock))
                if is_too_old := not self._takes_hints():
                    self._log.warning("the daemon at %s is too old for hints", self._channel.address)
                else:
                    requests = self._requests(attachment.client_id, over)
                    for answer in self._channel.converse(HINTS + "Exchange", requests, pb.ExchangeResponse):
                        was_open = True
                        self._receive(answer)
            except KVError as error:
                log.debug("the stream of hints ended: %s", error.message)
            finally:
                self._end_stream(over)
            pause_s = _PAUSE_FIRST_S if was_open else min(2 * pause_s, _PAUSE_MAX_S)
            with self._changed:
                pause_s = _TOO_OLD_PAUSE_S if is_too_old else pause_s
                self._clock.wait_for(self._changed, lambda: self._is_closed, pause_s)

    def _takes_hints(self) -> bool:
        request, deadline = blocks_pb2.GetCapabilitiesRequest(), Deadline(_ATTACH_S, self._clock)
        answer = self._channel.call(BLOCKS + "GetCapabilities", request, blocks_pb2.GetCapabilitiesResponse, deadline)
        return answer.takes_hints

    def _end_stream(self, over: threading.Event) -> None:
        with self._changed:
            over.set()
            self._send_whole = True
            self._changes.clear()
            self._ready.clear()
            self._changed.notify_all()

    def _receive(self, answer: pb.ExchangeResponse) -> None:
        changed: list[tuple[str, Readiness]] = []
        with self._changed:
            for each in answer.readiness:
                if each.request_id in self._queue:
                    state = _STATES.get(each.readiness, ReadyState.UNKNOWN)
                    ready = self._ready[each.request_id] = Readiness(state, each.ready_in_ms / 1e3)
                    changed.append((each.request_id, ready))
        for callback in list(self._callbacks):
            for name, ready in changed:
                try:
                    callback(name, ready)
                except Exception:  # The stream must continue.
                    log.exception("a callback for the readiness of requests failed")

    def _requests(self, client_id: bytes, over: threading.Event) -> Iterator[pb.ExchangeRequest]:
        """Messages as long as the stream is open. On gRPC's own thread, which takes them as fast as the daemon."""
        yield pb.ExchangeRequest(client_id=client_id)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: over.is_set() or self._send_whole or self._changes or self._events)
                if over.is_set():
                    return
                is_whole = self._send_whole
                changes = [_Put(entry, "") for entry in self._queue.values()] if is_whole else self._changes
                self._send_whole, self._changes = False, []
                now_s = self._clock.now_s()
                events = [hint for at_s, hint in self._events if now_s - at_s <= _EVENT_AGE_S]
                self.dropped += len(self._events) - len(events)
                self._events.clear()
            yield from _messages(changes, events, is_whole, now_s)


def _messages(
    changes: Sequence[_Put | str], events: Sequence[pb.Hint], is_whole: bool, now_s: float
) -> Iterator[pb.ExchangeRequest]:
    """The changes, then the hints, in messages of at most about 1 MiB; at least one."""
    message, size = pb.ExchangeRequest(whole_queue=is_whole), 0
    remaining: Iterator[pb.QueueChange | pb.Hint] = iter((*(_change(each, now_s) for each in changes), *events))
    for each in remaining:
        if size > _MESSAGE_BYTES or len(message.changes) + len(message.hints) == _MESSAGE_CHANGES:
            yield message
            message, size = pb.ExchangeRequest(), 0
        if isinstance(each, pb.QueueChange):
            message.changes.append(each)
        else:
            message.hints.append(each)
        size += each.ByteSize()
    yield message


def _change(change: _Put | str, now_s: float) -> pb.QueueChange:
    if isinstance(change, str):
        return pb.QueueChange(remove=change)
    entry, before = change
    put = pb.QueuedRequest(request_id=entry.request_id, reads=entry.subject, priority=entry.priority, before=before)
    if entry.starts_at_s is not None:
        put.starts_in_ms = min(_MS_MAX, max(0, round((entry.starts_at_s - now_s) * 1e3)))
    return pb.QueueChange(put=put)


def _differences(old: dict[str, _Entry], new: dict[str, _Entry], now_s: float) -> list[_Put | str]:
    """Changes that turn one queue into the other. Requests between the first and the last one that moved are put
    again, so a single move to the front or to the back costs as many changes as it passes requests.
    """
    changes: list[_Put | str] = [name for name in old if name not in new]
    before = [name for name in old if name in new]
    after = [name for name in new if name in old]
    first, last = 0, len(before)
    while first < last and before[first] == after[first]:
        first += 1
    while last > first and before[last - 1] == after[last - 1]:
        last -= 1
    moved = set(after[first:last])
    following = ""
    for name in reversed(new):
        entry = new[name]
        if name in moved or name not in old or not entry.is_close_to(old[name], now_s):
            changes.append(_Put(entry, following))
        following = name
    return changes


def _subject(reads: Reads) -> pb.HintSubject:
    if isinstance(reads, Session):
        fingerprint = reads.layout.fingerprint
        name = types_pb2.SessionName(session_id=reads.session_id, layout_fingerprint=fingerprint)
        return pb.HintSubject(session=name)
    if isinstance(reads, BlockChain):
        packed = reads.packed_keys[: _KEYS_MAX * KEY_BYTES]
    else:
        packed = next(arguments.packed_keys(reads, _KEYS_MAX), b"")
    if not packed:
        raise InvalidRequest("reads has no keys", field="reads")
    return pb.HintSubject(keys=packed)
