"""Loads that have sent little go before those that have sent much, so that a small load is short beside a huge one.

A client makes three calls for a small load, and waits for each: lookup, load, release. A huge load also gives way
between these calls, when a small lease has been granted and when its load has ended. Otherwise the next call would find
the event loop, the processors and the network busy with frames of the huge load.

Called on the event loop.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TypeVar

from kvservice.clock import Clock

K = TypeVar("K")

LITTLE_BYTES = 4 << 20
_NEW_S = 0.1  # A load whose client reads slowly delays others no longer than this.
_NEXT_CALL_S = 0.005  # A client that waits longer between two calls is in no hurry.
_WAIT_S = 0.01  # Before each frame: a huge load never stops, however many small ones there are.


class Precedence:
    """Which of all loads in frames go first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ends_s: dict[LoadTurn, float] = {}  # Of loads that go first, in the order of their begin.
        self._calls_end_s: dict[int, float] = {}  # By lease: until when its client's next call goes first.
        self._huge: set[LoadTurn] = set()  # Those that give way.
        self._none = asyncio.Event()

    def enter(self, lease_id: int) -> LoadTurn:
        """A load begins. Its `LoadTurn.leave` must be called."""
        turn = LoadTurn(self, lease_id)
        self._ends_s[turn] = self._clock.monotonic_s() + _NEW_S
        self._calls_end_s.pop(lease_id, None)
        self._none.clear()
        return turn

    def expect_call(self, lease_id: int) -> None:
        """The client of a lease of few bytes has got an answer, and probably calls again at once."""
        self._calls_end_s.pop(lease_id, None)
        if self._huge:  # Else nothing gives way.
            self._calls_end_s[lease_id] = self._clock.monotonic_s() + _NEXT_CALL_S
            self._none.clear()

    def called(self, lease_id: int) -> None:
        """That call has come, or the client will not load the lease in frames."""
        if self._calls_end_s.pop(lease_id, None) is not None:
            self._wake()

    def has_huge(self) -> bool:
        """Whether a load runs that gives way."""
        return bool(self._huge)

    def goes_first(self, turn: LoadTurn) -> bool:
        return turn in self._ends_s

    def gives_way(self, turn: LoadTurn) -> None:
        """The load has sent much."""
        self._ends_s.pop(turn, None)
        self._huge.add(turn)
        self._wake()

    def leave(self, turn: LoadTurn) -> None:
        """The load has ended. May be called again."""
        self._huge.discard(turn)
        if self._ends_s.pop(turn, None) is not None:
            self._wake()

    async def give_way(self) -> None:
        """Wait a moment for what goes first."""
        now_s = self._clock.monotonic_s()
        _drop_past(self._ends_s, now_s)
        _drop_past(self._calls_end_s, now_s)
        self._wake()
        if not self._none.is_set():
            with suppress(TimeoutError):
                async with self._clock.timeout(_WAIT_S):
                    await self._none.wait()

    def _wake(self) -> None:
        if not self._ends_s and not self._calls_end_s:
            self._none.set()


def _drop_past(ends_s: dict[K, float], now_s: float) -> None:
    """Of a dictionary in the order of its times."""
    while ends_s and ends_s[oldest := next(iter(ends_s))] <= now_s:
        del ends_s[oldest]


class LoadTurn:
    """The turns of one load."""

    def __init__(self, precedence: Precedence, lease_id: int) -> None:
        self._precedence = precedence
        self._lease_id = lease_id
        self._sent_bytes = 0

    async def take(self, size_bytes: int) -> None:
        """Returns when the load may send so many bytes more."""
        self._sent_bytes += size_bytes
        if self._sent_bytes <= LITTLE_BYTES:
            return
        self._precedence.gives_way(self)
        await self._precedence.give_way()

    def leave(self) -> None:
        """The load has ended. May be called again."""
        if self._precedence.goes_first(self):
            self._precedence.expect_call(self._lease_id)
        self._precedence.leave(self)
