"""Time as an input: code that needs the time takes a clock as an argument."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Monotonic seconds. For leases, deadlines and rates."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970, for showing to people and for records."""

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """As `asyncio.timeout`, by this clock: ``async with`` raises TimeoutError after this time."""

    async def sleep(self, seconds: float) -> None:
        """As `asyncio.sleep`, by this clock."""


class SystemClock:
    """The machine's clock. The wall clock is read once, so a later change of it has no effect here."""

    def __init__(self) -> None:
        self._wall_at_start_ms = time.time_ns() // 1_000_000
        self._monotonic_at_start_s = time.monotonic()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return self._wall_at_start_ms + int((time.monotonic() - self._monotonic_at_start_s) * 1000)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(seconds)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
