"""Loads that have sent little go before those that have sent much, so that a small load is short beside a huge one.

Called on the event loop.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from kvservice.clock import Clock

_LITTLE_BYTES = 4 << 20
_NEW_S = 0.1  # A load whose client reads slowly delays others no longer than this.
_WAIT_S = 0.002  # Before each frame: a huge load never stops, however many small ones there are.


class Precedence:
    """Of all loads in frames."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ends_s: dict[LoadTurn, float] = {}  # Of loads that go first, in the order of their begin.
        self._none = asyncio.Event()

    def enter(self) -> LoadTurn:
        """A load begins. Its `LoadTurn.leave` must be called."""
        turn = LoadTurn(self)
        self._ends_s[turn] = self._clock.monotonic_s() + _NEW_S
        self._none.clear()
        return turn

    def goes_first(self, turn: LoadTurn) -> bool:
        return turn in self._ends_s

    def leave(self, turn: LoadTurn) -> None:
        if self._ends_s.pop(turn, None) is not None and not self._ends_s:
            self._none.set()

    async def give_way(self) -> None:
        """Wait a moment for the loads that go first."""
        now_s = self._clock.monotonic_s()
        while self._ends_s and self._ends_s[oldest := next(iter(self._ends_s))] <= now_s:
            self.leave(oldest)
        if self._ends_s:
            with suppress(TimeoutError):
                async with self._clock.timeout(_WAIT_S):
                    await self._none.wait()


class LoadTurn:
    """Of one load."""

    def __init__(self, precedence: Precedence) -> None:
        self._precedence = precedence
        self._sent_bytes = 0

    async def take(self, size_bytes: int) -> None:
        """Returns when the load may send so many bytes more."""
        if self._precedence.goes_first(self):
            self._sent_bytes += size_bytes
            if self._sent_bytes <= _LITTLE_BYTES:
                return
            self.leave()
        await self._precedence.give_way()

    def leave(self) -> None:
        """The load has ended. May be called again."""
        self._precedence.leave(self)
