"""The heartbeat: how late the event loop is."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest

from kvservice.clock import SystemClock
from kvservice.metrics.heartbeat import BEAT_S, IDLE_BEAT_S, Heartbeat, next_beat_s
from tests.clock import FakeClock
from tests.stores import until


def test_a_late_beat_counts_for_ever_and_for_a_while() -> None:
    clock = FakeClock()
    heartbeat = Heartbeat(clock)
    clock.advance(seconds=heartbeat.beat() + 0.5)
    due_s = heartbeat.beat()
    assert heartbeat.recent_ms == heartbeat.latest_ms == pytest.approx(500)
    for _ in range(2000):
        clock.advance(seconds=due_s)
        due_s = heartbeat.beat()
    assert heartbeat.recent_ms < 1
    assert heartbeat.latest_ms == pytest.approx(500)


def test_the_loop_is_measured_often_only_while_it_works() -> None:
    assert next_beat_s(BEAT_S, used_s=0.0001) == IDLE_BEAT_S
    assert next_beat_s(IDLE_BEAT_S, used_s=0.0001) == IDLE_BEAT_S, "a beat of its own does not keep the loop awake"
    assert next_beat_s(IDLE_BEAT_S, used_s=0.02) == next_beat_s(BEAT_S, used_s=0.004) == BEAT_S


@pytest.mark.parametrize("begins_after_s", [0.0, 0.001, 0.02, 0.039])
def test_a_stall_of_61_ms_of_an_idle_loop_is_seen_at_any_time(begins_after_s: float) -> None:
    clock = FakeClock()
    heartbeat = Heartbeat(clock)
    due_s = heartbeat.beat()
    assert due_s == IDLE_BEAT_S, "a loop is idle at first"

    clock.advance(seconds=max(due_s, begins_after_s + 0.061))
    heartbeat.beat()

    assert heartbeat.latest_ms > 20, "what the alert KVServiceEventLoopStalls counts"
    assert sum(heartbeat.delays.counts()) == 1


def test_the_log_says_when_a_beat_was_late(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    heartbeat = Heartbeat(clock)
    with caplog.at_level(logging.DEBUG, "kvservice.metrics.heartbeat"):
        clock.advance(seconds=heartbeat.beat() + 0.009)
        clock.advance(seconds=heartbeat.beat() + 0.012)
        heartbeat.beat()
    (line,) = caplog.records
    assert line.at_s == clock.monotonic_s()  # type: ignore[attr-defined]
    assert line.own_ms == line.late_ms == pytest.approx(12)  # type: ignore[attr-defined]
    assert heartbeat.own_latest_ms == heartbeat.latest_ms == line.late_ms  # type: ignore[attr-defined]
    assert line.processor in os.sched_getaffinity(0)  # type: ignore[attr-defined]


async def test_it_beats_until_it_is_cancelled() -> None:
    heartbeat = Heartbeat(SystemClock())
    beating = asyncio.create_task(heartbeat.run())
    await until(lambda: sum(heartbeat.delays.counts()) > 3)
    beating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beating


async def test_a_beat_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(SystemClock())
    beats = [0.0]
    monkeypatch.setattr(heartbeat, "beat", lambda: beats.pop())
    with pytest.raises(IndexError):
        await asyncio.wait_for(heartbeat.run(), 60)
