"""Keeps the iterations of the event loop short, also when many tasks are ready.

Each piece of work may be small, but sixty-four pieces in one iteration delay all other tasks. Work that occurs in such
numbers waits for a slot before each piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_PART = 256

_AT_ONCE = 2


class LoopBudget:
    """Allows a few pieces of work, each of a millisecond at most, per iteration of the event loop; the others queue
    up."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def slot(self) -> None:
        """Returns when the caller has a slot, which ends when the caller awaits."""
        await self._places.acquire()
        asyncio.get_running_loop().call_soon(self._places.release)


def parts_of(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items in batches that fit into one iteration of the event loop."""
    for start in range(0, len(items), _PART):
        yield items[start : start + _PART]
