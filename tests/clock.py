"""Time that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import contextlib
import random

from kvservice_client import Clock


class FakeClock:
    """A ``Clock``. It starts at a random time, so that no code can rely on zero."""

    def __init__(self) -> None:
        self._seconds = random.randrange(80, 8_000_000) / 8  # Exact in binary: sums and milliseconds are not rounded.
        self._wall_offset_ms = 1_700_000_000_000

    def monotonic_s(self) -> float:
        return self._seconds

    def wall_ms(self) -> int:
        return self._wall_offset_ms + int(self._seconds * 1000)

    def advance(self, *, seconds: float) -> None:
        assert seconds >= 0
        self._seconds += seconds

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """Waits in real time: most tests do not check the duration."""
        return asyncio.timeout(seconds)

    async def sleep(self, seconds: float) -> None:
        """In real time too: the loops of a store go on by themselves."""
        await asyncio.sleep(seconds)


class HandClock(FakeClock):
    """Waits and pauses also end only when the test moves the time."""

    def __init__(self) -> None:
        super().__init__()
        self._timeouts: list[tuple[float, asyncio.Timeout]] = []

    def timeout(self, seconds: float) -> asyncio.Timeout:
        timeout = asyncio.timeout(None if seconds > 0 else 0)
        self._timeouts.append((self._seconds + seconds, timeout))
        return timeout

    async def sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with self.timeout(seconds):
                await asyncio.get_running_loop().create_future()

    def advance(self, *, seconds: float) -> None:
        super().advance(seconds=seconds)
        for end_s, timeout in self._timeouts:
            if end_s <= self._seconds:
                with contextlib.suppress(RuntimeError):  # What it was for has ended before.
                    timeout.reschedule(asyncio.get_running_loop().time())
        self._timeouts = [(end_s, timeout) for end_s, timeout in self._timeouts if end_s > self._seconds]


def passes(clock: FakeClock) -> bool:
    """A second passes. True, for use in conditions that are awaited: the waits for them end by themselves."""
    clock.advance(seconds=1)
    return True


class TickingClock(FakeClock):
    """Time that advances by a millisecond with each read, as on a slow machine."""

    def wall_ms(self) -> int:
        self.advance(seconds=0.001)
        return super().wall_ms()


class ClientClock(Clock):
    """A client's clock: only a test and the pauses of the client move it. Waits for something end in real time."""

    def __init__(self) -> None:
        self._seconds = random.randrange(80, 8_000_000) / 8

    def now_s(self) -> float:
        return self._seconds

    def sleep(self, seconds: float) -> None:
        self.advance(seconds=seconds)

    def advance(self, *, seconds: float) -> None:
        assert seconds >= 0
        self._seconds += seconds
