"""Moves blocks out of the part of a tier that is to be cut off: when a tier on disk shrinks, or a drive leaves it.

It runs before the store starts, so nothing else changes blocks. A crash at any point is harmless: a block's new record
is committed after its bytes are complete in the new place, and its old place is cut off after that commit.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, Rows, TierName
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice_api.errors import StorageFailed, TierFull

log = logging.getLogger(__name__)

# Blocks whose bytes are in memory at one time; one commit records them. A larger block is alone.
_BATCH_BYTES = 32 << 20
_BATCH_BLOCKS = 1024
_EVICTED_AT_ONCE = 1024
_EVICTED_FOR_ONE = 8  # A block for which so many times its size was evicted in vain is dropped itself.


class Relocation(NamedTuple):
    moved: int  # Blocks.
    dropped: int  # Copies for which the smaller tier has no space, or that cannot be read.


async def relocate(lifecycle: BlockLifecycle, tier: TierName) -> Relocation:
    """Move the copies outside of the tier's capacity into it, after `shrink` of the tier.

    If not all copies of the tier fit, these stay, in this order: pinned ones, those without a copy in another tier,
    those that were used last. Raises StorageFailed if bytes or records cannot be written; the next start continues.
    """
    run = _Run(lifecycle, tier)
    await run.drop_surplus()
    await run.move()
    return Relocation(run.moved, run.dropped)


class _Run:
    def __init__(self, lifecycle: BlockLifecycle, tier: TierName) -> None:
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._tier = tier
        self._space = lifecycle.tiers[tier]
        rows = np.flatnonzero(self._blocks.resident(tier))
        self._rows = rows[_order_of_worth(lifecycle, tier, rows)]  # Those first that are to stay.
        self.moved = self.dropped = 0

    async def drop_surplus(self) -> None:
        """Evict the copies of least worth, until the others fit."""
        fits = np.cumsum(self._sizes(self._rows)) <= self._space.capacity_bytes
        surplus, self._rows = self._rows[~fits], self._rows[fits]
        for start in range(0, len(surplus), _EVICTED_AT_ONCE):
            await self._evict(surplus[start : start + _EVICTED_AT_ONCE].tolist())

    async def move(self) -> None:
        """Move what is outside, the copies of most worth first."""
        position = self._blocks.position(self._tier)
        columns = (self._blocks.segment, self._blocks.offset, self._blocks.extent_size)
        inside = self._space.holds(*(column[position][self._rows] for column in columns))
        ranks = np.arange(len(self._rows))
        staying = list(
            zip(ranks[inside].tolist(), self._rows[inside].tolist(), strict=True)
        )  # The last has least worth.
        outside = self._rows[~inside]
        memory = mmap.mmap(-1, max(_BATCH_BYTES, int(self._sizes(outside).max(initial=0))))  # On a page boundary.
        rank_of = dict(zip(outside.tolist(), ranks[~inside].tolist(), strict=True))
        reported = 0
        for batch in self._batches(outside):
            places = {}
            for row in batch:
                if (place := await self._reserve(row, rank_of[row], staying)) is not None:
                    places[row] = place
            await self._move(places, memory)
            if (done := self.moved * 10 // len(outside)) > reported:
                reported = done
                log.info("%s: %d of %d blocks are moved", self._tier, self.moved, len(outside))

    def _batches(self, rows: Rows) -> Iterator[list[int]]:
        batch: list[int] = []
        batch_bytes = 0
        for row, size in zip(rows.tolist(), self._sizes(rows).tolist(), strict=True):
            if batch and (batch_bytes + size > _BATCH_BYTES or len(batch) == _BATCH_BLOCKS):
                yield batch
                batch, batch_bytes = [], 0
            batch.append(row)
            batch_bytes += size
        if batch:
            yield batch

    async def _reserve(self, row: int, rank: int, staying: list[tuple[int, int]]) -> Extent | None:
        """A new place for the row. If the free space is in too small runs, copies of less worth leave; if that does
        not help, the row's own. Returns None then.
        """
        size = int(self._sizes(np.array([row]))[0])
        evicted_bytes = 0
        while True:
            try:
                return self._space.reserve(size)
            except TierFull:
                leaving: list[int] = []
                freed_bytes = 0
                while staying and staying[-1][0] > rank and freed_bytes < size:
                    leaving.append(staying.pop()[1])
                    freed_bytes += int(self._sizes(np.array(leaving[-1:]))[0])
                if not leaving or evicted_bytes > _EVICTED_FOR_ONE * size:
                    await self._evict([row, *leaving])
                    return None
                evicted_bytes += freed_bytes
                await self._evict(leaving)

    async def _move(self, places: dict[int, Extent], memory: mmap.mmap) -> None:
        readable = []
        start = 0
        copies = []
        for row, place in places.items():
            copies.append(self._copy(row, place, memoryview(memory)[start : start + place.size_bytes]))
            start += place.size_bytes
        for row, is_whole in zip(places, await asyncio.gather(*copies), strict=True):
            if is_whole:
                readable.append(row)
            else:
                self._space.release(places[row])
        if len(places) > 1 and not readable and not self.moved:
            raise StorageFailed(f"no block of {self._tier} can be read: is its drive away? See docs/resizing.md")
        await self._lifecycle.relocate(readable, self._tier, [places[row] for row in readable])
        self.moved += len(readable)
        if lost := [row for row in places if row not in readable]:
            await self._evict(lost)

    async def _copy(self, row: int, new: Extent, data: memoryview) -> bool:
        """Whether the bytes could be read. Raises StorageFailed if they cannot be written."""
        old = self._blocks.extent(row, self._tier)
        assert old is not None
        try:
            await self._space.read(old, 0, data)
        except StorageFailed as error:
            log.error("a block of %s is lost, because it cannot be read: %s", self._tier, error.message)
            return False
        await self._space.write(new, 0, data)
        return True

    async def _evict(self, rows: list[int]) -> None:
        await self._lifecycle.evict(rows, self._tier)
        self.dropped += len(rows)

    def _sizes(self, rows: Rows) -> NDArray[np.uint64]:
        sizes: NDArray[np.uint64] = self._blocks.extent_size[self._blocks.position(self._tier)][rows]
        return sizes


def _order_of_worth(lifecycle: BlockLifecycle, tier: TierName, rows: Rows) -> NDArray[np.int64]:
    blocks = lifecycle.blocks
    elsewhere = blocks.resident_faster(tier) | blocks.resident_slower(tier)
    pinned = blocks.pinned(lifecycle.history.now_ms)
    return np.lexsort((-blocks.access_seq[rows], elsewhere[rows], ~pinned[rows]))
