"""An engine's reports of its requests, which `kvctl explain` shows.

    client.report_request(RequestReport(request_id="cmpl-7", outcome=Outcome.DONE, plan="load", ...))

A thread sends the reports, so no call waits for them. While the daemon is away, the last ones are kept.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, InvalidRequest, KVError
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import arguments, forks
from kvservice_client.attach_stream import default_name
from kvservice_client.channel import BLOCKS, Channel
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline

_QUEUE_MAX = 256
_SEND_S = 1.0
_PAUSE_S = 1.0  # After a report that the daemon did not answer.
_TEXT_BYTES_MAX = 200
_PLANS = {
    "": pb.REQUEST_PLAN_UNSPECIFIED,
    "load": pb.REQUEST_PLAN_LOAD,
    "recompute": pb.REQUEST_PLAN_RECOMPUTE,
    "mixed": pb.REQUEST_PLAN_MIXED,
}


# Fields with the same name in a report and in its message; the names of times end in a unit, too.
_COUNTS = ("history_tokens", "new_tokens", "loaded_tokens", "computed_tokens", "loaded_bytes")
_TEXTS = ("plan_reason", "outcome_reason", "tier", "transport")
_TIMES = ("lookup", "first_layer", "load", "waited", "head", "first_token")


class Outcome(StrEnum):
    """How a request with a history went."""

    DONE = "done"  # As planned.
    MISS = "miss"  # Nothing was stored, so everything was computed.
    FAILED_OVER = "failed_over"  # The load failed, so the history was computed instead.
    BREAKER_OPEN = "breaker_open"  # The circuit breaker was open, so the daemon was not asked.


_OUTCOMES = {
    Outcome.DONE: pb.REQUEST_OUTCOME_DONE,
    Outcome.MISS: pb.REQUEST_OUTCOME_MISS,
    Outcome.FAILED_OVER: pb.REQUEST_OUTCOME_FAILED_OVER,
    Outcome.BREAKER_OPEN: pb.REQUEST_OUTCOME_BREAKER_OPEN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """One request. Seconds are None if the step did not run or was not measured; long texts are truncated."""

    request_id: str
    outcome: Outcome
    outcome_reason: str = ""  # Why the outcome differs from the plan.
    plan: str = ""  # "load", "recompute", "mixed"; empty if none was made.
    plan_reason: str = ""
    estimate_s: Mapping[str, float] = field(default_factory=dict)  # Expected time to the first token, per plan.
    history_tokens: int = 0  # Stored tokens that the lookup found.
    new_tokens: int = 0
    loaded_tokens: int = 0
    computed_tokens: int = 0  # Of the history.
    loaded_bytes: int = 0
    tier: str = ""
    transport: str = ""
    began_s: float | None = None  # A time of the client's clock; by default the time of the report.
    lookup_s: float | None = None
    first_layer_s: float | None = None  # From the load's call.
    load_s: float | None = None
    waited_s: float | None = None  # The engine's waits for layers.
    head_s: float | None = None  # Time to compute the head of a mixed plan, or the history after a failed load.
    first_token_s: float | None = None  # From the request's begin.


class Reporter:
    """Sends reports, one after another, on a thread that starts with the first. Thread-safe."""

    def __init__(self, channel: Channel, client_name: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._channel = channel
        self._clock = clock
        self._client_name = client_name
        self._is_closed = False
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        """Begin with an empty queue: the parent sends its own reports."""
        self._queue: deque[tuple[float, pb.RequestReport]] = deque(maxlen=_QUEUE_MAX)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.dropped = 0  # Reports that the daemon will never see.

    def report(self, report: RequestReport) -> None:
        """Queue a report; if the queue is full, drop the oldest one. Does not wait. Raises InvalidRequest."""
        message = _message(report, self._client_name or default_name())
        began_s = self._clock.now_s() if report.began_s is None else report.began_s
        with self._changed:
            if self._is_closed:
                self.dropped += 1
                return
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="kvservice-reports", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # The process has too many threads: the next report tries again.
                    self.dropped += 1
                    return
                self._thread = thread
            self.dropped += len(self._queue) == _QUEUE_MAX
            self._queue.append((began_s, message))
            self._changed.notify_all()

    def close(self) -> None:
        """Accept no more reports. Queued reports are still sent if the daemon answers; `join` waits for that."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (next_one := self._next()) is not None:
            began_s, message = next_one
            message.ago_ms = max(0, round((self._clock.now_s() - began_s) * 1e3))
            request = pb.ReportRequestRequest(report=message)
            deadline = Deadline(_SEND_S, self._clock)
            try:
                self._channel.call(BLOCKS + "ReportRequest", request, pb.ReportRequestResponse, deadline)
            except (DaemonUnavailable, DeadlineExceeded):
                if not self._put_back(next_one):
                    return
            except KVError:  # The daemon refuses it, or is too old for reports.
                self.dropped += 1

    def _next(self) -> tuple[float, pb.RequestReport] | None:
        """The oldest report, once there is one; None after the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            return self._queue.popleft() if self._queue else None

    def _put_back(self, report: tuple[float, pb.RequestReport]) -> bool:
        """Keep a report that was not answered, and pause. False if the queue was closed meanwhile."""
        with self._changed:
            if len(self._queue) < _QUEUE_MAX:
                self._queue.appendleft(report)
            else:
                self.dropped += 1
            if self._clock.wait_for(self._changed, lambda: self._is_closed, _PAUSE_S):
                self.dropped += len(self._queue)
                self._queue.clear()
                return False
        return True


def _message(report: RequestReport, client_name: str) -> pb.RequestReport:
    if report.plan not in _PLANS:
        raise InvalidRequest(f"no plan is called {report.plan!r}", field="plan")
    return arguments.message(
        pb.RequestReport,
        report_id=secrets.randbits(64) | 1,
        request_id=report.request_id,
        client_name=_cut(client_name),
        plan=_PLANS[report.plan],
        outcome=_OUTCOMES[arguments.member(report.outcome, Outcome, "outcome")],
        **{name: getattr(report, name) for name in _COUNTS},
        **{name: _cut(getattr(report, name)) for name in _TEXTS},
        estimates=pb.PlanEstimates(**{f"{plan}_ms": _ms(seconds) for plan, seconds in report.estimate_s.items()}),
        times=pb.RequestTimes(**{f"{name}_ms": _ms(getattr(report, f"{name}_s")) for name in _TIMES}),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _cut(text: str) -> str:
    """The text as the daemon accepts it: one line of at most so many bytes."""
    printable = "".join(each if each.isprintable() else " " for each in text)
    return printable.encode()[:_TEXT_BYTES_MAX].decode(errors="ignore")
