"""Moves blocks out of the part of a tier that is to be cut off: when a tier shrinks, or a drive leaves it.

It runs before the store starts, so nothing else changes blocks. A crash at any point is harmless: a block's new record
is committed after its bytes are complete in the new place, and its old place is cut off after that commit.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, Rows, TierName
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice_api.errors import IndexFull, KVError, TierFull

log = logging.getLogger(__name__)

_BLOCKS_AT_ONCE = 16  # Blocks whose bytes are in memory at one time. One commit records them.
_EVICTED_AT_ONCE = 1024
_REPORTS = 10  # Lines in the log.


class Relocation(NamedTuple):
    moved: int  # Blocks.
    dropped: int  # Copies for which the smaller tier has no space.


async def relocate(lifecycle: BlockLifecycle, tier: TierName) -> Relocation:
    """Move the copies outside of the tier's capacity into it, after `shrink` of the tier. Raises StorageFailed.

    If not all copies of the tier fit, these stay, in this order: pinned ones, those without a copy in another tier,
    those that were used last.
    """
    space = lifecycle.tiers[tier]
    dropped = await _drop_surplus(lifecycle, tier)
    rows = _by_worth(lifecycle, tier, _outside(lifecycle, tier))
    moved = 0
    for start in range(0, len(rows), _BLOCKS_AT_ONCE):
        moving: list[int] = []
        places: list[tuple[Extent, Extent]] = []
        unfit: list[int] = []
        for row in rows[start : start + _BLOCKS_AT_ONCE].tolist():
            old = lifecycle.blocks.extent(row, tier)
            assert old is not None
            try:
                places.append((old, space.reserve(old.size_bytes)))
                moving.append(row)
            except TierFull:  # The free space is in too small runs.
                unfit.append(row)
        if unfit:
            await lifecycle.evict(unfit, tier)
        count = await _move(lifecycle, tier, moving, places) if moving else 0
        moved += count
        dropped += len(unfit) + len(moving) - count
        if start * _REPORTS // len(rows) != (start + _BLOCKS_AT_ONCE) * _REPORTS // len(rows):
            log.info("%s is resized: %d of %d blocks are moved", tier, moved, len(rows), extra={"tier": tier})
    return Relocation(moved, dropped)


async def _drop_surplus(lifecycle: BlockLifecycle, tier: TierName) -> int:
    """Evict the copies of least worth, until the others fit. Returns their number."""
    blocks = lifecycle.blocks
    rows = _by_worth(lifecycle, tier, np.flatnonzero(blocks.resident(tier)))
    sizes = blocks.extent_size[blocks.position(tier)][rows]
    surplus = rows[np.cumsum(sizes) > lifecycle.tiers[tier].capacity_bytes]
    for start in range(0, len(surplus), _EVICTED_AT_ONCE):
        await lifecycle.evict(surplus[start : start + _EVICTED_AT_ONCE].tolist(), tier)
    return len(surplus)


def _outside(lifecycle: BlockLifecycle, tier: TierName) -> Rows:
    """Rows whose copy in the tier is not wholly within its capacity."""
    blocks, position = lifecycle.blocks, lifecycle.blocks.position(tier)
    rows = np.flatnonzero(blocks.resident(tier))
    places = (column[position][rows] for column in (blocks.segment, blocks.offset, blocks.extent_size))
    outside: Rows = rows[~lifecycle.tiers[tier].holds(*places)]
    return outside


def _by_worth(lifecycle: BlockLifecycle, tier: TierName, rows: Rows) -> Rows:
    """The rows, those first that are to stay."""
    blocks = lifecycle.blocks
    elsewhere: NDArray[np.bool_] = blocks.resident_faster(tier) | blocks.resident_slower(tier)
    pinned = blocks.pinned(lifecycle.history.now_ms)
    order = np.lexsort((-blocks.access_seq[rows], elsewhere[rows], ~pinned[rows]))
    ordered: Rows = rows[order]
    return ordered


async def _move(
    lifecycle: BlockLifecycle, tier: TierName, rows: Sequence[int], places: Sequence[tuple[Extent, Extent]]
) -> int:
    """Returns the number of moved blocks. The others are evicted."""
    space = lifecycle.tiers[tier]

    async def copy(row: int, old: Extent, new: Extent) -> bool:
        with mmap.mmap(-1, old.size_bytes) as memory, memoryview(memory) as data:  # On a page boundary.
            try:
                await space.read(old, 0, data)
                await space.write(new, 0, data)
            except KVError as error:
                log.error("a block is lost, which cannot be moved within %s: %s", tier, error.message)
                return False
        return True

    copied = await asyncio.gather(*(copy(row, *each) for row, each in zip(rows, places, strict=True)))
    whole = [number for number, is_whole in enumerate(copied) if is_whole]
    lost = [number for number, is_whole in enumerate(copied) if not is_whole]
    for number in lost:
        space.release(places[number][1])
    try:
        await lifecycle.place([rows[number] for number in whole], tier, [places[number][1] for number in whole])
    except IndexFull as error:  # The smaller index. `place` has released the new places.
        log.warning("%d blocks are dropped from %s: %s", len(whole), tier, error.message)
        lost = list(range(len(rows)))
    else:
        for number in whole:
            space.release(places[number][0])
    if lost:
        await lifecycle.evict([rows[number] for number in lost], tier)
    return len(rows) - len(lost)
