"""Log lines of the adapter carry their text, and are limited in rate."""

from __future__ import annotations

import logging

import pytest

from kvservice_adapter.limited_log import LimitedLog


def test_one_line_per_event_and_interval_and_the_next_one_says_how_many_were_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 100.0
    lines = LimitedLog(logging.getLogger("limited"), interval_s=30.0, clock=lambda: now_s)

    for _ in range(5):
        lines.warning("lookup", "not loaded: %s", "DAEMON_UNAVAILABLE")
    lines.warning("save", "not saved")
    now_s += 29.9
    lines.warning("lookup", "not loaded: %s", "DAEMON_UNAVAILABLE")
    now_s += 0.1
    lines.warning("lookup", "not loaded: %s", "LEASE_LOST")
    now_s += 30.0
    lines.warning("lookup", "not loaded: %s", "LEASE_LOST")

    assert [record.getMessage() for record in caplog.records] == [
        "not loaded: DAEMON_UNAVAILABLE",
        "not saved",
        "not loaded: LEASE_LOST (5 more such lines were left out)",
        "not loaded: LEASE_LOST",
    ]
