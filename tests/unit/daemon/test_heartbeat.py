"""The heartbeat: how late the event loop is."""

from __future__ import annotations

import asyncio

import pytest

from kvservice.metrics.heartbeat import Heartbeat, next_beat_s
from tests.clock import FakeClock
from tests.stores import until


class _BusyLoop(FakeClock):
    """The time of a loop that wakes each sleeper so many seconds late, a number of times, and then on time."""

    def __init__(self, *late_s: float) -> None:
        super().__init__()
        self.late_s = list(late_s)

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds=seconds + (self.late_s.pop() if self.late_s else 0.0))
        await asyncio.sleep(0)


async def test_a_late_beat_counts_for_ever_and_for_a_while() -> None:
    clock = _BusyLoop(0.5)
    heartbeat = Heartbeat(clock)
    beating = asyncio.create_task(heartbeat.run())
    await until(lambda: not clock.late_s and heartbeat.recent_ms > 0)
    assert heartbeat.recent_ms == heartbeat.latest_ms == pytest.approx(500)
    await until(lambda: heartbeat.recent_ms < 1)
    assert heartbeat.latest_ms == pytest.approx(500)
    beating.cancel()


def test_the_loop_is_measured_often_only_while_it_works() -> None:
    idle_s = next_beat_s(0.005, used_s=0.0001)

    assert next_beat_s(idle_s, used_s=0.0001) == idle_s, "a beat of its own does not keep the loop awake"
    assert next_beat_s(idle_s, used_s=0.02) == next_beat_s(0.005, used_s=0.004) == idle_s / 20
