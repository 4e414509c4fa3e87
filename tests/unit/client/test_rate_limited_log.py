"""Repeated lines: the first is written at once, later ones rarely, and each has its reason."""

from __future__ import annotations

import logging

import pytest

from kvservice_client.rate_limited_log import RateLimitedLog
from tests.forking import in_child


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> RateLimitedLog:
    caplog.set_level(logging.WARNING, "kvservice_client.tried")
    return RateLimitedLog(logging.getLogger("kvservice_client.tried"), every_s=60.0, clock=clock)


def test_the_first_line_is_written_at_once_and_the_next_only_after_the_interval(
    log: RateLimitedLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(121):
        clock.now_s = second
        log.warning("no answer: %s", f"reason {second}")
    assert caplog.messages == [
        "no answer: reason 0",
        "no answer: reason 60 (and 59 times before, since the last such line)",
        "no answer: reason 120 (and 59 times before, since the last such line)",
    ]


def test_other_texts_have_their_own_interval(log: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        log.warning("one")
        log.warning("another")
    assert caplog.messages == ["one", "another"]


def test_each_kind_of_a_text_has_its_own_interval(log: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        for reason in ("DAEMON_UNAVAILABLE", "LEASE_EXPIRED"):
            log.warning("not loaded: %s", reason, kind=reason)
    assert caplog.messages == ["not loaded: DAEMON_UNAVAILABLE", "not loaded: LEASE_EXPIRED"]


def test_a_level_that_is_off_writes_nothing_and_counts_nothing(
    log: RateLimitedLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.info("a detail")
    caplog.set_level(logging.INFO, "kvservice_client.tried")
    log.info("a detail")
    assert caplog.messages == ["a detail"]


def test_the_line_is_that_of_the_caller(log: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    log.warning("where")
    assert caplog.records[0].funcName == "test_the_line_is_that_of_the_caller"


def test_texts_without_number_take_bounded_memory(log: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2500):
        log.warning(f"text {number}")
    assert len(caplog.messages) == 2500
    assert len(log._written) <= 1000


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_writes_lines_of_its_own(log: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    log.warning("once per process")

    def work() -> list[str]:
        caplog.clear()
        log.warning("once per process")
        return caplog.messages

    with log._lock:  # As if another thread were writing at the fork.
        assert in_child(work) == ["once per process"]
