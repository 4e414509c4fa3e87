"""The heartbeat: how late the event loop is."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from kvservice import metrics
from kvservice.metrics import Heartbeat, next_beat_s
from tests.stores import until


async def test_a_late_beat_counts_for_ever_and_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_WINDOW_S", 0.05)
    heartbeat = Heartbeat(CollectorRegistry())
    beating = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251  (what is measured)
    await until(lambda: heartbeat.recent_ms > 400)
    assert heartbeat.latest_ms >= heartbeat.recent_ms
    await until(lambda: heartbeat.recent_ms < 400)
    assert heartbeat.latest_ms > 400
    beating.cancel()


def test_the_loop_is_measured_often_only_while_it_works() -> None:
    idle_s = next_beat_s(0.005, used_s=0.0001)

    assert next_beat_s(idle_s, used_s=0.0001) == idle_s, "a beat of its own does not keep the loop awake"
    assert next_beat_s(idle_s, used_s=0.02) == next_beat_s(0.005, used_s=0.004) == idle_s / 10
