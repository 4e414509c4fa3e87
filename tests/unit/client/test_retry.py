"""What the client tries again, and for how long."""

from __future__ import annotations

import pytest

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError, TierFull
from kvservice_client.retry import Deadline, retry
from tests.clock import ClientClock


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
