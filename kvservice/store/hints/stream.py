"""One engine's stream of hints: its queue and expectations as it reports them, and the readiness that it learns."""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from itertools import islice
from typing import NamedTuple, Protocol

from kvservice.counters import Counters
from kvservice.policy.base import Hint, hint_kind
from kvservice.store.caller import Caller
from kvservice.store.hints.queue_mirror import HintSubject, HintTotals, QueueEntry, QueueLimits, QueueMirror
from kvservice.store.leases import Client
from kvservice.store.tasks import LoopBudget

TICK_S = 0.05  # Readiness is evaluated, and sent to an engine, at most so often.
_EXPECTED_MAX = 1024  # Typing persons and running tools, per client.
_TYPING_S = 3.0


class Nearness(Enum):
    """How near the blocks of a queued request are."""

    IN_DRAM = auto()
    COMING = auto()
    ON_SSD = auto()
    ABSENT = auto()


class Ready(NamedTuple):
    """`ready_at_s` is a time of the monotonic clock for COMING, else 0."""

    nearness: Nearness
    ready_at_s: float = 0.0

    def differs(self, sent: Ready | None, now_s: float) -> bool:
        """Whether a client that knows `sent` needs this: an estimate that is a quarter off is sent again."""
        if sent is None or sent.nearness is not self.nearness:
            return True
        return abs(sent.ready_at_s - self.ready_at_s) > max(TICK_S, 0.25 * (self.ready_at_s - now_s))


class QueuedReadiness(NamedTuple):
    """What the engine learns of one queued request. `ready_in_s` is an estimate for COMING, else 0."""

    request_id: str
    nearness: Nearness
    ready_in_s: float


class Exchange(Protocol):
    """What all streams share. Its methods do not wait, except `pause_until`."""

    counters: Counters
    totals: HintTotals
    loop_budget: LoopBudget

    def now_s(self) -> float: ...

    async def pause_until(self, time_s: float) -> None: ...

    def note(self) -> None:
        """A queue or an expectation changed, or a stream ended."""

    def is_known(self, caller: Caller, subject: HintSubject) -> bool:
        """Count a hint. Whether it is about keys, or about a session of the caller's tenant."""

    def queue_ended(self, ended: Ended) -> None:
        """Act soon on what has ended."""


class HintStream:
    """One engine's hints, until its stream ends. Its methods only take notes, and never wait or raise."""

    def __init__(self, exchange: Exchange, caller: Caller, client: Client, limits: QueueLimits) -> None:
        """Use `HintExchange.open`."""
        self._exchange = exchange
        self.caller = caller
        self.client = client
        self.queue = QueueMirror(limits, exchange.totals)
        self.limits = limits
        #: When the next request is due, the reason, and the tool's kind (see `hint_kind`); the oldest hint first.
        self.expected: dict[HintSubject, tuple[float, Hint, int]] = {}
        self.cursor = ""  # The last request whose readiness was evaluated.
        self.unevaluated = 0  # Entries after it that may have another readiness than the known one.
        self.is_over = False
        self._known: dict[str, Ready] = {}
        self._unsent: dict[str, None] = {}
        self._sends_at_s = 0.0
        self._wake = asyncio.Event()

    # What the engine reports

    def clear_queue(self) -> None:
        self.queue.clear()
        self._known.clear()
        self._unsent.clear()
        self._exchange.note()

    def put(self, request_id: str, subject: HintSubject, starts_in_s: float | None, priority: int, before: str) -> None:
        """Put a request into the queue. What exceeds the limits is counted and ignored."""
        self._exchange.is_known(self.caller, subject)
        due_s = None if starts_in_s is None else self._exchange.now_s() + starts_in_s
        if not self.queue.put(QueueEntry(request_id, subject, due_s, priority), before):
            self._exchange.counters.hints_over_limit += 1
            self._forget(request_id)
        self._exchange.note()

    def remove(self, request_id: str) -> None:
        if self.queue.remove(request_id):
            self._forget(request_id)
            self._exchange.note()

    def expect(self, subject: HintSubject, within_s: float | None, hint: Hint, tool: str = "") -> None:
        """The next request of this subject comes so soon; None if that is not known. `hint` is the reason."""
        if not self._exchange.is_known(self.caller, subject):
            return
        self.expect_no_more(subject)
        if len(self.expected) == _EXPECTED_MAX:
            self.expect_no_more(next(iter(self.expected)))
            self._exchange.counters.hints_over_limit += 1
        if not self._exchange.totals.add(subject):
            self._exchange.counters.hints_over_limit += 1
            return
        self.expected[subject] = (
            self._exchange.now_s() + (_TYPING_S if within_s is None else within_s),
            hint,
            hint_kind(tool),
        )
        self._exchange.note()

    def expect_no_more(self, subject: HintSubject) -> None:
        if self.expected.pop(subject, None) is not None:
            self._exchange.totals.remove(subject)

    def turn_finished(self, subject: HintSubject, answer_tokens: int) -> None:
        """The engine has answered a request. `answer_tokens` 0: it does not say how long the answer is."""
        if self._exchange.is_known(self.caller, subject):
            self.expect_no_more(subject)
            if answer_tokens:
                self._exchange.queue_ended(Ended(self, subject, answer_tokens))

    def not_needed(self, subject: HintSubject, *, write: bool) -> None:
        """No further request reads these blocks; without `write`, they need not be written to SSD."""
        if self._exchange.is_known(self.caller, subject):
            self.expect_no_more(subject)
            self._exchange.queue_ended(Ended(self, subject, None, write))

    def note_invalid(self) -> None:
        """Count a hint that cannot be read."""
        self._exchange.counters.hints_received += 1
        self._exchange.counters.hints_invalid += 1

    # What the engine learns

    def set_ready(self, request_id: str, ready: Ready, now_s: float) -> None:
        if ready.differs(self._known.get(request_id), now_s):
            self._known[request_id] = ready
            self._unsent[request_id] = None
            self._wake.set()

    async def slot(self) -> None:
        """Await it before each part of many hints: a part may take a millisecond of the event loop."""
        await self._exchange.loop_budget.slot()

    async def changed(self, count_max: int) -> list[QueuedReadiness] | None:
        """The requests whose readiness changed since the last call, at least one; None at the end of the stream."""
        await self._exchange.pause_until(self._sends_at_s)
        while not self._unsent and not self.is_over:
            self._wake.clear()
            await self._wake.wait()
        if self.is_over:
            return None
        self._sends_at_s = self._exchange.now_s() + TICK_S
        names = list(islice(self._unsent, count_max))
        for name in names:
            del self._unsent[name]
        self._exchange.counters.hint_readiness_sent += len(names)
        now_s = self._exchange.now_s()
        known = ((name, self._known[name]) for name in names)
        return [QueuedReadiness(name, ready.nearness, max(0.0, ready.ready_at_s - now_s)) for name, ready in known]

    def end(self) -> None:
        """End the stream, as if the client had ended it, and forget what it reported."""
        self.is_over = True
        self.queue.clear()
        for subject in list(self.expected):
            self.expect_no_more(subject)
        self._wake.set()

    def _forget(self, request_id: str) -> None:
        self._known.pop(request_id, None)
        self._unsent.pop(request_id, None)


class Ended(NamedTuple):
    """A turn that has ended, or blocks that no further request reads."""

    stream: HintStream
    subject: HintSubject
    answer_tokens: int | None  # Of the turn; None: the blocks are not needed any more.
    write: bool = True  # They may still be written to SSD.
