"""Which calls the client tries again, and for how long. The deadlines of transfers, and their end by another thread."""

from __future__ import annotations

import math
import threading

import pytest

from kvservice_api.errors import Cancelled, DaemonUnavailable, DeadlineExceeded, KVError, Overloaded, TierFull
from kvservice_client.retry import SYSTEM_CLOCK, Deadline, TransferDeadline, Watchdog, retry
from tests.clock import ClientClock
from tests.daemon import NEVER_S, SOON_S
from tests.forking import in_child
from tests.thread_limit import no_threads


class Attempts:
    """Fails a number of times, then returns."""

    def __init__(self, *errors: KVError) -> None:
        self.errors = list(errors)
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def may_pass(error: KVError) -> bool:
    return isinstance(error, DaemonUnavailable)


def test_what_may_pass_is_tried_again() -> None:
    attempts = Attempts(DaemonUnavailable("away"), DaemonUnavailable("away"))
    assert retry(attempts, Deadline(5.0), 1.0, may_pass) == "done"
    assert attempts.count == 3


def test_what_does_not_pass_is_raised_at_once() -> None:
    attempts = Attempts(TierFull("full"))
    with pytest.raises(TierFull):
        retry(attempts, Deadline(5.0), 1.0, may_pass)
    assert attempts.count == 1


@pytest.mark.parametrize(("timeout_s", "patience_s"), [(5.0, 0.05), (0.05, 5.0)])
def test_attempts_end_with_the_patience_or_the_deadline(timeout_s: float, patience_s: float) -> None:
    clock = ClientClock()
    began_s = clock.now_s()
    attempts = Attempts(*[DaemonUnavailable("away")] * 1000)
    with pytest.raises(DaemonUnavailable):
        retry(attempts, Deadline(timeout_s, clock), patience_s, may_pass)
    assert clock.now_s() - began_s <= 0.05
    assert 2 <= attempts.count < 10


def test_nothing_is_attempted_after_the_deadline() -> None:
    attempts = Attempts()
    with pytest.raises(DeadlineExceeded, match=r"the 0 s allowed"):
        retry(attempts, Deadline(0.0), 1.0, may_pass)
    assert attempts.count == 0


def test_a_call_of_a_layer_that_is_late_is_cancelled_although_another_layer_has_much_time() -> None:
    watchdog, calls = Watchdog(SYSTEM_CLOCK), [threading.Event(), threading.Event()]
    patient, late = (TransferDeadline(seconds, SYSTEM_CLOCK, watchdog) for seconds in (NEVER_S, 0.05))
    for deadline, call in zip((patient, late), calls, strict=True):
        deadline.begin_layer()
        deadline.add_call(call.set)
    assert calls[1].wait(SOON_S)
    with pytest.raises(DeadlineExceeded, match=r"the layer did not arrive within the 0\.05 s"):
        late.begin_layer()
    assert not calls[0].is_set()
    patient.end_layer()


def test_time_between_two_layers_does_not_count_and_the_time_of_each_layer_does() -> None:
    clock = ClientClock()
    deadline = TransferDeadline(5, clock, Watchdog(clock))
    assert (deadline.remaining_s, deadline.of_stream_s) == (math.inf, None)
    for _ in range(3):
        with deadline.layer():
            clock.advance(seconds=4)
            assert deadline.remaining_s == 1
        clock.advance(seconds=1000)
        deadline.check()
    whole = TransferDeadline(5, clock)
    with whole.layer():
        clock.advance(seconds=4)
    clock.advance(seconds=1000)
    assert (whole.remaining_s, whole.of_stream_s) == (0, 0)


def test_a_transfer_ends_when_the_daemon_sends_nothing_for_a_while_and_each_answer_gives_it_that_time_again() -> None:
    clock = ClientClock()
    deadline = TransferDeadline(5, clock, Watchdog(clock), idle_s=1)
    with deadline.layer():
        for _ in range(4):
            deadline.begin_answer()
            assert deadline.remaining_s == 1
            clock.advance(seconds=0.75)
            deadline.end_answer()
        assert deadline.remaining_s == 2, "the caller's own work is no wait for the daemon"
        clock.advance(seconds=1.5)
        deadline.begin_answer()
        assert deadline.remaining_s == 0.5, "of the layer"
    with deadline.layer():
        deadline.begin_answer()
        clock.advance(seconds=1)
        with pytest.raises(DeadlineExceeded, match="sent nothing of the layer for 1 s"):
            deadline.check()


def test_a_cancelled_transfer_runs_no_call_and_its_first_error_counts() -> None:
    before, after = threading.Event(), threading.Event()
    deadline = TransferDeadline(5, ClientClock())
    deadline.add_call(before.set)
    deadline.cancel(Cancelled("first"))
    deadline.cancel(DeadlineExceeded("second"))
    deadline.add_call(after.set)
    assert before.is_set() and after.is_set()
    with pytest.raises(Cancelled, match="first"):
        deadline.check()
    with pytest.raises(Cancelled, match="first"):
        deadline.begin_layer()


def test_many_layers_have_one_watchdog_thread() -> None:
    def count() -> int:
        return sum(each.name == "kvservice-layers" for each in threading.enumerate())

    before = count()
    deadline = TransferDeadline(NEVER_S, SYSTEM_CLOCK, Watchdog(SYSTEM_CLOCK))
    for _ in range(100):
        with deadline.layer():
            pass
    assert count() == before + 1


def test_a_layer_whose_time_no_thread_can_watch_is_refused_and_a_later_one_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watchdog = Watchdog(SYSTEM_CLOCK)
    with no_threads(monkeypatch), pytest.raises(Overloaded, match="can't start new thread"):
        TransferDeadline(0.05, SYSTEM_CLOCK, watchdog).begin_layer()
    late, call = TransferDeadline(0.05, SYSTEM_CLOCK, watchdog), threading.Event()
    late.begin_layer()
    late.add_call(call.set)
    assert call.wait(SOON_S)


def test_the_watchdog_of_a_forked_child_works() -> None:
    watchdog = Watchdog(SYSTEM_CLOCK)

    def is_cancelled() -> bool:
        call, deadline = threading.Event(), TransferDeadline(0.05, SYSTEM_CLOCK, watchdog)
        deadline.begin_layer()
        deadline.add_call(call.set)
        return call.wait(SOON_S)

    assert is_cancelled()
    assert in_child(is_cancelled)
