"""Time as an input: whoever needs the time is handed a clock."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds that only ever grow. For leases, deadlines and rates."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970, for showing to people and for records."""

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """As `asyncio.timeout`, by this clock: ``async with`` ends with TimeoutError once so much time has passed."""


class SystemClock:
    """The machine's clock. The wall clock is read once: setting it later moves nothing here."""

    def __init__(self) -> None:
        self._wall_at_start_ms = time.time_ns() // 1_000_000
        self._monotonic_at_start_s = time.monotonic()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return self._wall_at_start_ms + int((time.monotonic() - self._monotonic_at_start_s) * 1000)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(seconds)
