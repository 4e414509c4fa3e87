"""Time that stands still until a test moves it."""

from __future__ import annotations

import random


class FakeClock:
    """A ``Clock``. It starts anywhere, so that nobody can count on zero."""

    def __init__(self) -> None:
        self._seconds = random.uniform(10.0, 1e6)
        self._wall_offset_ms = 1_700_000_000_000

    def monotonic_s(self) -> float:
        return self._seconds

    def wall_ms(self) -> int:
        return self._wall_offset_ms + int(self._seconds * 1000)

    def advance(self, *, seconds: float) -> None:
        assert seconds >= 0
        self._seconds += seconds
