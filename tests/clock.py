"""Time that stands still until a test moves it."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from unittest import mock


class FakeClock:
    """A ``Clock``. It starts anywhere, so that nobody can count on zero."""

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


class TickingClock(FakeClock):
    """Time that goes on by a millisecond with each look at it, as on a slow machine."""

    def wall_ms(self) -> int:
        self.advance(seconds=0.001)
        return super().wall_ms()


@contextlib.contextmanager
def later(*, seconds: float) -> Iterator[None]:
    """In this process `time.monotonic` is ahead by so much meanwhile: for what a client does late."""
    real = time.monotonic

    def ahead() -> float:
        return real() + seconds

    with mock.patch.object(time, "monotonic", ahead):
        yield
