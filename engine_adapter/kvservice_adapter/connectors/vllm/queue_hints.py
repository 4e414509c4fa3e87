"""Reports vLLM's queue and ended turns to the daemon, so that it has their KV in DRAM in time.

The hooks of a step take notes, which are sent at once at the step's end, by a thread of the client: a request that runs
in the step in which it came is never sent. Without a daemon the notes stay within their bounds, and the client sends
the queue whole once there is one.
"""

from __future__ import annotations

import functools
import heapq
import logging
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

from kvservice_adapter.connectors.vllm.request_parameters import RequestHints
from kvservice_client import BlockChain, EngineHints, QueuedRequest, ReadyState, Session

log = logging.getLogger(__name__)

# The daemon's queue has the next requests only. Their keys are by default as many as it takes of one client.
_SENT_MAX = 256
_KEYS_MAX = 1024  # Of one request: its first blocks.
_WAITING_MAX = 8192  # Requests behind them. Those that come while there are so many are never sent.
_PUTS_PER_STEP = 16  # Each takes some microseconds of the step.
_REPORTS_PER_STEP = 256
_ID_LENGTH_MAX = 200
_PRIORITY_MAX = 2**30

Reads = Session | BlockChain


class _Waiting(NamedTuple):
    """In the order in which they are sent."""

    urgency: int  # The lowest first.
    number: int  # Negative for those that are put in front of the queue.
    request_id: str
    reads: Reads


def _advice(method: Callable[..., None]) -> Callable[..., None]:
    """An error in hints costs the hints, never a step: they end, and a line in the log says why."""

    @functools.wraps(method)
    def call(self: QueueHints, *args: Any, **kwargs: Any) -> None:
        if self.hints is None:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.hints = None
            log.exception("KVService: hints are not sent any more, because %s failed", method.__name__)
            self.on_error(error)

    return call


class QueueHints:
    """All methods are called on vLLM's scheduler thread. None waits for the daemon, or raises."""

    def __init__(self, hints: EngineHints | None, on_error: Callable[[Exception], object]) -> None:
        """With `hints` None, nothing is sent."""
        self.hints = hints
        self.on_error = on_error
        self._numbers = count(1)
        self._waiting: list[_Waiting] = []  # A heap; also of requests that have left since.
        self._live: dict[str, int] = {}  # Those of it that have not left: request id -> number.
        self._sent: dict[str, str] = {}  # The daemon's queue: request id -> the id that the daemon knows.
        self._gone: list[str] = []  # Ids that the daemon knows, to be removed.
        self._reports: list[Callable[[], None]] = []

    @_advice
    def arrived(self, request_id: str, reads: Reads, priority: int, *, is_first: bool = False) -> None:
        """A request waits, behind all others or in front of them. Those with a higher `priority` are promoted first."""
        if len(self._waiting) < _WAITING_MAX:
            number = next(self._numbers)
            number = self._live[request_id] = -number if is_first else number
            urgency = -max(-_PRIORITY_MAX, min(priority, _PRIORITY_MAX))  # vLLM's own may be any number.
            heapq.heappush(self._waiting, _Waiting(urgency, number, request_id, reads))

    @_advice
    def left(self, request_id: str) -> None:
        """A request does not wait any more: it runs, its load begins, or it has ended. Unknown ids are ignored."""
        self._live.pop(request_id, None)
        if (known := self._sent.pop(request_id, None)) is not None:
            self._gone.append(known)

    @_advice
    def ended(
        self,
        reads: Reads,
        session: Session | None,
        prompt_tokens: int,
        answer_tokens: int,
        why: str,
        known: RequestHints,
    ) -> None:
        """A request has ended. `reads` are all whole blocks of its conversation; `why` is vLLM's finish reason."""
        hints, reports = self.hints, self._reports
        assert hints is not None
        if answer_tokens:  # Else it was given up before it was answered.
            reports.append(
                functools.partial(
                    hints.turn_finished,
                    reads,
                    prompt_tokens=prompt_tokens,
                    answer_tokens=answer_tokens,
                    stop_reason=why,
                )
            )
            if (call := known.tool_call) is not None:
                reports.append(functools.partial(hints.tool_call, reads, call.name, call.expected_s))
            if known.typing:
                reports.append(functools.partial(hints.typing, reads))
        # The session, where there is one: its blocks are spared because of every other session that names them.
        if known.do_not_keep:
            reports.append(functools.partial(hints.do_not_keep, session or reads))
        elif known.session_ended:
            reports.append(functools.partial(hints.session_ended, session or reads))

    @_advice
    def send(self) -> None:
        """Send what the hooks have noted since the last call. Called once per step."""
        if not (self._gone or self._reports or self._has_next()):
            return
        assert self.hints is not None
        with self.hints.together():
            for known in self._gone:
                self.hints.remove(known)
            for _ in range(_PUTS_PER_STEP):
                if not self._has_next():
                    break
                self._put(heapq.heappop(self._waiting))
            for report in self._reports[-_REPORTS_PER_STEP:]:
                report()
        self._gone.clear()
        self._reports.clear()

    def is_in_dram(self, request_id: str) -> bool:
        """Whether the daemon has answered that all stored blocks of a request in its queue are in DRAM."""
        known = self._sent.get(request_id)
        return known is not None and self.hints is not None and self.hints.readiness(known).state is ReadyState.IN_DRAM

    def _has_next(self) -> bool:
        """Whether the first of those that wait is to be sent. Drops those that have left."""
        while self._waiting and self._live.get(self._waiting[0].request_id) != self._waiting[0].number:
            heapq.heappop(self._waiting)
        return bool(self._waiting) and (len(self._sent) < _SENT_MAX or self._waiting[0].number < 0)

    def _put(self, waiting: _Waiting) -> None:
        assert self.hints is not None
        first = next(iter(self._sent.values()), "") if waiting.number < 0 else ""
        del self._live[waiting.request_id]
        known = self._sent[waiting.request_id] = _known_id(waiting.request_id, waiting.number)
        self.hints.put(QueuedRequest(known, _beginning(waiting.reads), priority=-waiting.urgency), before=first)


def _beginning(reads: Reads) -> Reads:
    return reads[:_KEYS_MAX] if isinstance(reads, BlockChain) and len(reads) > _KEYS_MAX else reads


def _known_id(request_id: str, number: int) -> str:
    """The id in the daemon's queue, where ids are short. Clients of vLLM choose longer ones."""
    return request_id if request_id.isascii() and 0 < len(request_id) <= _ID_LENGTH_MAX else f"#{number}"
