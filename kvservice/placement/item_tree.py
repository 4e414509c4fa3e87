"""Groups the stored blocks into items, as they come: the runs of blocks that the same requests use.

An item is an edge of the tree of prefixes. A block that continues the end of an item joins it; one that continues its
middle splits it there, and begins an item of its own. So the history of a conversation is an item, and a prompt that
conversations share is another one. A partial block joins the item that it continues, and does not extend it.

An item is a row of the `ItemTable`, and keeps its number where it is split: the front gets a new one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows, TierName
from kvservice.placement.core import PlacementCore
from kvservice.placement.item_state import ItemPart
from kvservice.policy.items import Conditions, ItemTable, grown
from kvservice.policy.placement import Placement

NO_ITEM = -1
IN_DRAM, ON_SSD = 1, 2  # Bits of `BlockChanges.tiers`.
_IN_TIERS = IN_DRAM | ON_SSD
_WHOLE = 4  # It is a whole block.
_COMING = 8  # It is being read to DRAM.
EVICTED = 16  # A client evicted it from DRAM, and it was not used since.
_ITEMS_AT_FIRST = 1024
_GROWTH_PART = 16  # Space for items grows by a sixteenth: on average, a thirty-second of it is not used.
_TIERS = ((TierName.DRAM, IN_DRAM), (TierName.SSD, ON_SSD))


class BlockChanges(NamedTuple):
    """Blocks that are stored now, or no longer, or in other tiers. Arrays of the shape [blocks], by row in the table.

    Parents come before the blocks that continue them, as far as they are stored.
    """

    rows: Rows
    generations: NDArray[np.int64]  # Of the row: it differs for the next block that uses the row.
    live: NDArray[np.bool_]  # Lookups find it.
    was_evicted: NDArray[np.bool_]  # It, or the block that had the row before, left with its last copy's eviction.
    tiers: NDArray[np.int64]  # IN_DRAM and ON_SSD, as bits.
    size_bytes: NDArray[np.int64]
    token_count: NDArray[np.int64]
    is_whole: NDArray[np.bool_]
    parents: Rows  # The row of the block that it continues; NO_ROW if that is not stored.
    shards: Rows  # The first row of the same key.
    keys: NDArray[np.int64]  # A part of the key.


class ItemTree:
    """The items of a block table: which blocks they have, and how many of their bytes are in which tier.

    It knows the table by the events alone, so that it may be on another thread than the table. All calls must be on
    one thread at a time, in the order of the events.
    """

    def __init__(self, policy: Placement, conditions: Conditions, row_capacity: int) -> None:
        self.items = ItemTable(_ITEMS_AT_FIRST, conditions)
        self._core = PlacementCore(self.items, policy, names_victims=False)  # The movers ask for the `lowest` blocks.
        self._row_end = 0  # Rows at and above it were never used. By row, as the next ones:
        self._item_of = np.full(row_capacity, NO_ITEM, np.int32)
        self._depth = np.zeros(row_capacity, np.int32)  # How many blocks are before it in its chain.
        self._flags = np.zeros(row_capacity, np.int8)  # In which tiers its bytes count, and the bits above.
        self._leases = np.zeros(row_capacity, np.int32)
        self._generation = np.zeros(row_capacity, np.uint32)
        self._size_bytes = np.zeros(row_capacity, np.int64)
        self._parent = np.full(_ITEMS_AT_FIRST, NO_ITEM, np.int32)  # By item, as all that follow.
        self._children = np.zeros(_ITEMS_AT_FIRST, np.int32)
        self._block_count = np.zeros(_ITEMS_AT_FIRST, np.int32)
        self._end_depth = np.zeros(_ITEMS_AT_FIRST, np.int32)  # Of its last whole block.
        self._first_row = np.full(_ITEMS_AT_FIRST, NO_ROW, np.int32)  # Its block of the least depth.
        self._free: list[int] = []
        self._end = 0  # Items at and above it were never used.
        self._stored: dict[int, None] = {}  # Items that have got blocks, for `BlockItems.settle`.
        self._unscored: dict[int, None] = {}  # Items that are new or back, and unknown to the policy until `settle`.
        self._headless: dict[int, None] = {}  # Items whose first block has left, within `changed`.
        self._now_s = -math.inf  # The time of the event that is being handled.

    def _was_split(self, item: int, front: int) -> None:
        """The item's front is an item of its own now."""

    def _was_forgotten(self, item: int) -> None:
        """The item has no blocks any more, and its row may be used again."""

    # What is known

    def item_of(self, row: int) -> int:
        """The item of a block; NO_ITEM if it has none yet."""
        return int(self._item_of[row]) if row < self._row_end else NO_ITEM

    def rows_of(self, item: int) -> Rows:
        """The item's blocks, the first one of the chain first."""
        return self.rows_of_each([item])[0]

    def rows_of_each(self, items: Sequence[int]) -> list[Rows]:
        """`rows_of` of several items, in one pass over the table."""
        place_of = np.full(self._end + 1, -1, np.int64)  # The last one is for blocks without an item: NO_ITEM is -1.
        place_of[items] = np.arange(len(items))
        places = place_of[self._item_of[: self._row_end]]
        rows = np.flatnonzero(places >= 0)
        rows = rows[np.lexsort((self._depth[rows], places[rows]))]
        return np.split(rows, np.searchsorted(places[rows], np.arange(1, len(items)))) if len(items) else []

    def generations(self, rows: Rows) -> NDArray[np.int64]:
        """The generation of each row when this object last heard of it."""
        return self._generation[rows].astype(np.int64)

    def outside_dram(self, rows: Rows) -> Rows:
        """Those of the rows that DRAM has no copy of."""
        missing: Rows = rows[self._flags[rows] & IN_DRAM == 0]
        return missing

    def live_items(self) -> Rows:
        """Those that have blocks. An item that only slower tiers have is not `live` in the table."""
        return np.flatnonzero(self._block_count[: self._end])

    # Events

    def changed(self, changes: BlockChanges, now_s: float) -> None:
        """Blocks are stored now, or no longer, or in other tiers."""
        self._now_s = now_s
        self._need_rows(int(changes.rows.max(initial=-1)) + 1)
        columns = (column.tolist() for column in changes)
        for row, generation, live, was_evicted, tiers, *fixed in zip(*columns, strict=True):
            item = self._item_of.item(row)
            if item != NO_ITEM and (not live or generation != self._generation.item(row)):
                self._leave(row, item, was_evicted=was_evicted)
                item = NO_ITEM
            if not live:
                continue
            if item == NO_ITEM:
                size, tokens, whole, parent, shard, key = fixed
                self._generation[row], self._size_bytes[row] = generation, size
                self._flags[row] = _WHOLE if whole else 0
                item = self._join(row, parent, shard)
                if self._first_row[item] == row:
                    self.items.key[item] = key
                if self.items.in_use[item]:  # Else it is a first prompt with its answer: how long that is is not known.
                    self.items.answer_tokens[item] += tokens
            self._count(row, item, tiers)
        if self._headless:
            firsts = [rows[0] for rows in self.rows_of_each(list(self._headless))]
            self._first_row[list(self._headless)] = firsts
            self._headless.clear()

    def coming(self, rows: Rows, is_coming: bool) -> None:
        """The blocks are being read to DRAM, or no longer."""
        rows = rows[self._item_of[rows] != NO_ITEM]
        rows = rows[(self._flags[rows] & _COMING > 0) != is_coming]
        self._flags[rows] ^= _COMING
        sizes = self._size_bytes[rows] if is_coming else -self._size_bytes[rows]
        np.add.at(self.items.coming_bytes, self._item_of[rows], sizes)

    def _comes_no_more(self, row: int, item: int) -> None:
        if self._flags[row] & _COMING:
            self._flags[row] ^= _COMING
            self.items.coming_bytes[item] -= self._size_bytes[row]

    # Items

    def _join(self, row: int, parent: int, shard: int) -> int:
        """Put a block into the item that it belongs to."""
        if shard != row and self.item_of(shard) != NO_ITEM:
            return self._enter(row, self._item_of.item(shard), self._depth.item(shard))
        item = NO_ITEM if parent == NO_ROW else self.item_of(parent)
        if item == NO_ITEM:
            return self._enter(row, self._new_item(NO_ITEM), 0)
        depth = self._depth.item(parent)
        if not self._flags[row] & _WHOLE:
            return self._enter(row, item, depth + 1)
        if depth < self._end_depth[item]:
            # Its last blocks may have left.
            mine = self._item_of[: self._row_end] == item
            whole = np.flatnonzero(mine & (self._flags[: self._row_end] & _WHOLE > 0))
            self._end_depth[item] = self._depth[whole].max(initial=-1)
        if depth < self._end_depth[item]:
            item = self._split(item, depth)
        if self._children[item]:
            return self._enter(row, self._new_item(item), depth + 1)
        return self._enter(row, item, depth + 1)

    def _enter(self, row: int, item: int, depth: int) -> int:
        self._item_of[row], self._depth[row] = item, depth
        self._block_count[item] += 1
        if self._flags[row] & _WHOLE:
            self._end_depth[item] = max(self._end_depth.item(item), depth)
        first = self._first_row.item(item)
        if first == NO_ROW or depth < self._depth[first]:
            self._first_row[item] = row
        self._core.resized(item, self.items.size_bytes.item(item) + self._size_bytes.item(row))
        self.items.value[item] = self._block_count[item]
        self._stored[item] = None
        return item

    def _new_item(self, parent: int) -> int:
        if self._free:
            item = self._free.pop()
        else:
            item = self._end
            if item == self.items.row_count:
                self._grow_items()
            self._end += 1
        self._core.created(item)
        self._unscored[item] = None
        self._parent[item], self._children[item], self._block_count[item] = parent, 0, 0
        self._end_depth[item], self._first_row[item] = -1, NO_ROW
        if parent != NO_ITEM:
            self._children[parent] += 1
        return item

    def _split(self, item: int, depth: int) -> int:
        """Give the item's blocks up to this depth to a new item, its front. Returns the front."""
        front = self._new_item(int(self._parent[item]))
        if item not in self._unscored:
            del self._unscored[front]
        if self._parent[item] != NO_ITEM:
            self._children[self._parent[item]] -= 1
        rows = np.flatnonzero(self._item_of[: self._row_end] == item)
        at_front = self._depth[rows] <= depth
        for each, moved in ((front, rows[at_front]), (item, rows[~at_front])):
            self._item_of[moved] = each
            self._block_count[each] = len(moved)
            self._first_row[each] = moved[np.argmin(self._depth[moved])]
        self._parent[item], self._children[front] = front, 1
        self._end_depth[front] = depth
        moved = rows[at_front]
        sizes, flags = self._size_bytes[moved], self._flags[moved]
        in_dram, on_ssd, coming = (int(sizes[flags & bit > 0].sum()) for bit in (IN_DRAM, ON_SSD, _COMING))
        part = ItemPart(int(sizes.sum()), in_dram, on_ssd, coming, float(len(moved)))
        self._core.split(item, front, part, self._now_s)
        self.items.key[item] = hash((self.items.key.item(front), depth))  # The front keeps the key of its first block.
        if self.items.in_use[item]:
            self._stored |= {front: None, item: None}  # A request that reads the front alone may hold it.
        self._was_split(item, front)
        return front

    def _leave(self, row: int, item: int, *, was_evicted: bool) -> None:
        """The block is not stored any more."""
        self._count(row, item, 0, was_evicted=was_evicted)
        self._comes_no_more(row, item)
        self._item_of[row] = NO_ITEM
        self._block_count[item] -= 1
        self._core.resized(item, self.items.size_bytes.item(item) - self._size_bytes.item(row))
        self.items.value[item] = self._block_count[item]
        if not self._block_count[item]:
            self._forget(item)
        elif self._first_row[item] == row:
            self._first_row[item] = NO_ROW
            self._headless[item] = None

    def _forget(self, item: int) -> None:
        for known in (self._stored, self._unscored, self._headless):
            known.pop(item, None)
        self._was_forgotten(item)
        self.items.in_use[item] = 0
        self._core.forget_if_gone(item, self._now_s)
        if self._children[item]:
            self._parent[np.flatnonzero(self._parent[: self._end] == item)] = NO_ITEM
        if self._parent[item] != NO_ITEM:
            self._children[self._parent[item]] -= 1
        self._first_row[item] = NO_ROW
        self._free.append(item)

    # Bytes

    def _count(self, row: int, item: int, tiers: int, *, was_evicted: bool = True) -> None:
        """Count the block's bytes in the tiers that it is in now."""
        before = self._flags.item(row)
        if tiers == before & _IN_TIERS:
            return
        self._flags[row] = before & ~_IN_TIERS | tiers
        size, items = self._size_bytes.item(row), self.items
        for tier, bit in _TIERS:
            if not (tiers ^ before) & bit:
                continue
            if not tiers & bit:
                self._core.left(item, tier, size, self._now_s, was_evicted=was_evicted)
                continue
            self._wake(item)
            coming = items.coming_bytes.item(item)
            self._core.entered(item, tier, size, self._now_s)
            items.coming_bytes[item] = coming
        if tiers & IN_DRAM:
            self._comes_no_more(row, item)

    def _wake(self, item: int) -> None:
        """It counts again, if it was forgotten because only slower tiers had it."""
        if not self.items.live[item]:
            self.items.live[item] = True
            self._unscored[item] = None

    # Space

    def _need_rows(self, row_end: int) -> None:
        self._row_end = max(self._row_end, row_end)
        if row_end > len(self._item_of):
            self._grow_rows(max(row_end, 2 * len(self._item_of)))

    def _grow_rows(self, count: int) -> None:
        self._item_of = grown(self._item_of, count, NO_ITEM)
        self._depth, self._flags = grown(self._depth, count, 0), grown(self._flags, count, 0)
        self._leases, self._generation = grown(self._leases, count, 0), grown(self._generation, count, 0)
        self._size_bytes = grown(self._size_bytes, count, 0)

    def _grow_items(self) -> None:
        count = self.items.row_count + self.items.row_count // _GROWTH_PART
        self._core.grow(count)
        self._parent, self._children = grown(self._parent, count, NO_ITEM), grown(self._children, count, 0)
        self._block_count, self._end_depth = grown(self._block_count, count, 0), grown(self._end_depth, count, 0)
        self._first_row = grown(self._first_row, count, NO_ROW)
