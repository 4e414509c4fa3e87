"""The circuit breaker: when requests ask the daemon, and how its return is detected."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from kvservice_adapter.breaker import Breaker, State, answered
from kvservice_api.errors import (
    BlockNotFound,
    DaemonUnavailable,
    DeadlineExceeded,
    Draining,
    LeaseExpired,
    Overloaded,
    StorageFailed,
)
from kvservice_client import Clock
from tests.daemon import until
from tests.thread_limit import no_threads


class Daemon(Clock):
    """A breaker's probe, and the pauses between probes: both end when the test says so."""

    def __init__(self) -> None:
        self.pauses: queue.Queue[float] = queue.Queue()
        self.probes: queue.Queue[bool | Exception] = queue.Queue()
        self.asked = threading.Semaphore(0)
        self._go_on = threading.Semaphore(0)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.pauses.put(seconds)
        until(lambda: event.is_set() or self._go_on.acquire(blocking=False))
        return event.is_set()

    def probe(self) -> bool:
        self.asked.release()
        answer = self.probes.get(timeout=60)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def is_asked(self, answer: bool | Exception) -> None:
        """End the present pause; the next probe gets this answer."""
        self.pauses.get(timeout=60)
        self.probes.put(answer)
        self._go_on.release()
        assert self.asked.acquire(timeout=60)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def breaker(daemon: Daemon) -> Iterator[Breaker]:
    with Breaker(daemon.probe, failures=2, probe_s=0.5, clock=daemon) as breaker:
        yield breaker


_others: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """Threads that existed before the test."""
    _others.clear()
    _others.update(threading.enumerate())


def threads() -> list[threading.Thread]:
    return [each for each in set(threading.enumerate()) - _others if each.name == "kvservice-breaker"]


def opened(breaker: Breaker) -> Breaker:
    breaker.record(False)
    breaker.record(False)
    assert breaker.state is State.OPEN
    return breaker


def test_it_opens_only_with_a_thread_that_can_close_it(breaker: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_threads(monkeypatch):
        for _ in range(3):
            breaker.record(False)
    assert breaker.allow()
    breaker.record(False)
    assert not breaker.allow()


def test_it_opens_after_so_many_failures_in_a_row_and_then_allows_nothing(breaker: Breaker) -> None:
    assert breaker.allow()
    breaker.record(False)
    breaker.record(True)
    breaker.record(False)
    assert breaker.allow(), "they were not in a row"
    breaker.record(False)
    assert breaker.state is State.OPEN
    assert not breaker.allow()


def test_as_long_as_it_is_closed_there_is_no_thread(breaker: Breaker) -> None:
    for ok in (True, False, True, True, False, True):
        breaker.record(ok)
    assert not threads()
    opened(breaker)
    assert len(threads()) == 1


def test_while_it_is_open_it_probes_again_and_again_until_the_daemon_answers(daemon: Daemon, breaker: Breaker) -> None:
    opened(breaker)
    daemon.is_asked(False)
    daemon.is_asked(DeadlineExceeded("no answer"))
    daemon.is_asked(RuntimeError("even that"))
    until(lambda: daemon.pauses.qsize() == 1)  # It pauses again.
    assert breaker.state is State.OPEN
    daemon.is_asked(True)
    until(lambda: breaker.state is State.CLOSED)
    assert breaker.allow()
    until(lambda: not threads())


def test_while_a_probe_runs_it_is_half_open_and_no_request_goes_with_it(daemon: Daemon, breaker: Breaker) -> None:
    opened(breaker)
    daemon.pauses.get(timeout=60)
    daemon._go_on.release()
    assert daemon.asked.acquire(timeout=60)
    assert breaker.state is State.HALF_OPEN
    assert not breaker.allow()
    daemon.probes.put(True)
    until(breaker.allow)


def test_after_it_closed_it_counts_from_nothing_and_opens_again(daemon: Daemon, breaker: Breaker) -> None:
    opened(breaker)
    daemon.is_asked(True)
    until(breaker.allow)
    breaker.record(False)
    assert breaker.allow()
    breaker.record(False)
    assert not breaker.allow()
    assert breaker.times_opened == 2


def test_what_comes_late_from_before_it_opened_changes_nothing(daemon: Daemon, breaker: Breaker) -> None:
    opened(breaker)
    breaker.record(True)
    breaker.record(False)
    assert breaker.state is State.OPEN
    assert len(threads()) == 1
    assert breaker.times_opened == 1


def test_it_pauses_between_probes_for_the_configured_time(daemon: Daemon, breaker: Breaker) -> None:
    opened(breaker)
    assert daemon.pauses.get(timeout=60) == 0.5


def test_closing_it_ends_its_thread_and_it_starts_none_any_more(daemon: Daemon, breaker: Breaker) -> None:
    opened(breaker)
    daemon.is_asked(False)
    breaker.close()
    assert not threads()
    breaker.close()
    assert not breaker.allow()

    other = Breaker(daemon.probe, failures=1)
    other.close()
    other.record(False)
    assert not threads()


def test_many_threads_that_fail_at_once_open_it_once(daemon: Daemon, breaker: Breaker) -> None:
    start = threading.Barrier(8)

    def fail() -> None:
        start.wait()
        for _ in range(100):
            breaker.record(False)

    workers = [threading.Thread(target=fail) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert breaker.times_opened == 1
    assert len(threads()) == 1


@pytest.mark.parametrize(("failures", "probe_s"), [(0, 1.0), (1, 0.0)])
def test_nonsense_is_refused(daemon: Daemon, failures: int, probe_s: float) -> None:
    with pytest.raises(ValueError, match="at least one failure"):
        Breaker(daemon.probe, failures=failures, probe_s=probe_s)


def test_a_refusal_is_an_answer_and_no_answer_in_time_is_not() -> None:
    assert not answered(DaemonUnavailable("gone"))
    assert not answered(DeadlineExceeded("hangs"))
    assert answered(None)
    for refusal in (Overloaded, LeaseExpired, BlockNotFound, StorageFailed, Draining):
        assert answered(refusal("so"))


def test_one_that_is_dropped_while_it_is_open_leaves_no_thread() -> None:
    breaker = Breaker(lambda: False, failures=1, probe_s=0.01)
    breaker.record(False)
    assert len(threads()) == 1
    del breaker
    until(lambda: not threads())
