"""Keeps the turns of the event loop short, however many have something to do at once.

Each piece of work may be small, and sixty-four of them in one turn still keep everybody waiting.
Work that comes in such numbers asks for a turn before each piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_PART = 256

_AT_ONCE = 2


class LoopBudget:
    """Lets a few pieces of work, of a millisecond at most, into each turn of the event loop; the others queue up."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def slot(self) -> None:
        """Returns when it is the caller's turn, which lasts until the caller awaits something."""
        await self._places.acquire()
        asyncio.get_running_loop().call_soon(self._places.release)


def parts_of(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many items at a time as one turn of the event loop can take."""
    for start in range(0, len(items), _PART):
        yield items[start : start + _PART]
