"""Makes the DRAM tier smaller at a start: the blocks that fit are copied into a new arena, with a new index.

The order makes a crash at any point harmless: the bytes are copied, the index is replaced by one that names the new
arena, and the new arena takes the old one's name. A start that was killed before the index was replaced begins again;
one that was killed afterwards is finished by `Arena.open`.

The old arena is not changed. Clients that have it mapped may read and write it until they attach again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import ObjectKeys, TierName
from kvservice.index.block_index import BlockIndex
from kvservice.index.records import Records
from kvservice.tiers.arena import Arena
from kvservice.tiers.extents import lie_within
from kvservice.tiers.files import on_thread
from kvservice_api.errors import StorageFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SmallerArena:
    """How a store's arena is to be replaced.

    `folder` has the volatile index, which is not open; its new map has `map_bytes`. `room_bytes` is the memory that the
    new arena may take as long as the old one is there. `tiers` are those of the store, the arena's first.
    """

    index: BlockIndex
    folder: Path
    tiers: Sequence[TierName]
    map_bytes: int
    room_bytes: int
    now_ms: int

    async def replace(self, arena: Arena) -> Arena:
        """A smaller arena with the blocks that fit, or the same one if none can be made now.

        Takes over `arena`, also after an error. If not all blocks fit, these stay, in this order: pinned ones, those
        without a copy in a slower tier, those that were used last. `emptied_keys` of the index names the others that
        have no copy. Raises StorageFailed, OSError.
        """
        index, smaller = self.index, None
        try:
            if index.layout_entries.damaged:
                raise StorageFailed("entries of layouts are damaged")
            smaller = arena.create_smaller()
            if not index.adopt_volatile(self.folder, arena.arena_id, map_bytes=self.map_bytes):
                await self._move(arena, smaller)
        except (StorageFailed, OSError) as error:
            log.warning("the DRAM tier keeps its size: %s", error)
            index.close_volatile()
            if smaller is not None:
                smaller.discard()
            return arena
        except BaseException:
            arena.close()
            raise
        arena.close()
        smaller.replace_old()
        return smaller

    async def _move(self, arena: Arena, smaller: Arena) -> None:
        """Copy the blocks that fit, and replace the index by one that names the smaller arena."""
        index, (name, *slower) = self.index, self.tiers
        found = index.load(name)
        index.close_volatile()
        elsewhere = _have_copies(index, found.object_keys, slower)
        order = _by_worth(found.records, elsewhere, self.now_ms)
        order = order[_are_readable(found.records[order], arena)]
        sizes = found.records["size_bytes"][order].astype(np.int64)
        ends = np.cumsum(sizes)
        wanted = np.count_nonzero(ends <= smaller.capacity_bytes)
        possible = np.count_nonzero(ends <= min(smaller.capacity_bytes, self.room_bytes))
        await on_thread(lambda: _copy(arena, smaller, found.records[order[:possible]], ends[:possible]))
        kept = order[: np.count_nonzero(ends[:possible] <= smaller.ready_bytes)]
        if len(kept) < wanted:
            log.warning("%d blocks leave: there is not enough memory for two arenas", wanted - len(kept))
        records = found.records[kept]
        records["offset_bytes"] = (ends - sizes)[: len(kept)]
        keys = [key.tobytes() for key in found.object_keys[kept]]
        moved = index.replace_volatile(self.folder, smaller.arena_id, keys, records, map_bytes=self.map_bytes)
        is_lost = ~elsewhere
        is_lost[kept[:moved]] = False
        index.emptied_keys = [key.tobytes() for key in found.object_keys[is_lost]] + list(found.damaged)
        dropped = len(found.records) - moved
        log.info(
            "%s was made smaller",
            name,
            extra={"tier": name, "moved": moved, "dropped": dropped, "damaged": len(found.damaged)},
        )


def _have_copies(index: BlockIndex, keys: ObjectKeys, tiers: Iterable[TierName]) -> NDArray[np.bool_]:
    """Which objects have a copy in one of these tiers."""
    found = np.zeros(len(keys), np.bool_)
    for tier in tiers:
        found |= np.isin(_numbers(keys), _numbers(index.load(tier).object_keys))
    return found


def _numbers(keys: ObjectKeys) -> NDArray[np.uint64]:
    """A number for each object, by which many are compared in little time. Block keys are hashes."""
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(len(keys), -1)
    numbers: NDArray[np.uint64] = np.bitwise_xor.reduce(words, axis=1)
    return numbers


def _by_worth(records: Records, elsewhere: NDArray[np.bool_], now_ms: int) -> NDArray[np.int64]:
    """The rows, those first that are to stay."""
    return np.lexsort((~records["access_seq"], elsewhere, records["pinned_until_ms"] <= now_ms))


def _are_readable(records: Records, arena: Arena) -> NDArray[np.bool_]:
    inside = lie_within(records["offset_bytes"], records["size_bytes"], np.uint64(arena.ready_bytes))
    readable: NDArray[np.bool_] = inside & (records["segment"] == 0)
    return readable


def _copy(old: Arena, new: Arena, records: Records, ends: NDArray[np.int64]) -> None:
    """Copy the blocks one after the other to the start of the new arena, as far as memory can be allocated."""
    new.allocate(int(ends.max(initial=0)))
    source, target = np.frombuffer(old.data, np.uint8), np.frombuffer(new.data, np.uint8)
    places = (records["offset_bytes"].tolist(), records["size_bytes"].tolist(), ends.tolist())
    for offset, size, end in zip(*places, strict=True):
        if end > new.ready_bytes:
            return
        np.copyto(target[end - size : end], source[offset : offset + size])
