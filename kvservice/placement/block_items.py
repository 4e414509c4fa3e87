"""Groups the stored blocks into items, as they come: the runs of blocks that the same requests use.

An item is an edge of the tree of prefixes. A block that continues the end of an item joins it; one that continues its
middle splits it there, and begins an item of its own. So the history of a conversation is an item, and a prompt that
conversations share is another one. A partial block joins the item that it continues, and does not extend it.

An item is a row of the `ItemTable`, and keeps its number where it is split: the front gets a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, BlockTable, Rows, TierName
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable, grown
from kvservice.policy.placement import Placement

NO_ITEM = -1
_ITEMS_AT_FIRST = 1024
_SETTLED = 200  # They take about five milliseconds.
_IN_DRAM, _ON_SSD = 1, 2
_TIERS = ((TierName.DRAM, _IN_DRAM, "dram_bytes", "dram_seq"), (TierName.SSD, _ON_SSD, "ssd_bytes", "ssd_seq"))


class BlockItems:
    """The items of a block table, for one policy, which it calls. All methods are called on the event loop's thread."""

    def __init__(
        self,
        blocks: BlockTable,
        block_tokens_of: Callable[[int], int],
        policy: Placement,
        conditions: Conditions,
        now_s: Callable[[], float],
    ) -> None:
        """`block_tokens_of` gives the tokens of a whole block, by layout id."""
        self.items = ItemTable(_ITEMS_AT_FIRST, conditions)
        self.policy = policy
        self._blocks = blocks
        self._block_tokens_of = block_tokens_of
        self._now_s = now_s
        self._item_of = np.full(blocks.row_capacity, NO_ITEM, np.int32)  # By block row, as the next two.
        self._depth = np.zeros(blocks.row_capacity, np.int32)  # How many blocks are before it in its chain.
        self._counted = np.zeros(blocks.row_capacity, np.int8)  # In which tiers its bytes count.
        self._parent = np.full(_ITEMS_AT_FIRST, NO_ITEM, np.int32)  # By item, as all that follow.
        self._children = np.zeros(_ITEMS_AT_FIRST, np.int32)
        self._block_count = np.zeros(_ITEMS_AT_FIRST, np.int32)
        self._end_depth = np.zeros(_ITEMS_AT_FIRST, np.int32)  # Of its last whole block.
        self._first_row = np.full(_ITEMS_AT_FIRST, NO_ROW, np.int64)  # Its block of the least depth.
        self._free: list[int] = []
        self._end = 0  # Items at and above it were never used.
        self._stored: dict[int, None] = {}  # Items that have got blocks since `settle`.
        self._accesses = self._arrivals = 0

    # What is known

    def item_of(self, row: int) -> int:
        """The item of a block; NO_ITEM if it has none yet."""
        return int(self._item_of[row]) if row < len(self._item_of) else NO_ITEM

    def rows_of(self, item: int) -> Rows:
        """The item's blocks, the first one of the chain first."""
        return self.rows_of_each([item])[0]

    def rows_of_each(self, items: Sequence[int]) -> list[Rows]:
        """`rows_of` of several items, in one pass over the table."""
        place_of = np.full(self._end + 1, -1, np.int64)  # The last one is for blocks without an item: NO_ITEM is -1.
        place_of[items] = np.arange(len(items))
        places = place_of[self._item_of[: self._blocks.row_end]]
        rows = np.flatnonzero(places >= 0)
        rows = rows[np.lexsort((self._depth[rows], places[rows]))]
        return np.split(rows, np.searchsorted(places[rows], np.arange(1, len(items)))) if len(items) else []

    def live_items(self) -> Rows:
        return np.flatnonzero(self.items.live[: self._end])

    def places(self, tier: TierName, now_s: float) -> Callable[[Rows], NDArray[np.float64]]:
        """Scores blocks by the present scores of their items, and the end of an item below its front.

        The result may be called from any thread.
        """
        self.note_use()
        live = self.live_items()
        scores = self.policy.retention(self.items, live, tier, now_s)
        order = live[np.lexsort((-self._depth[self._first_row[live]], scores))]
        place_of = np.zeros(self._end + 1)  # The last one is for blocks without an item: NO_ITEM is -1.
        place_of[order] = np.arange(1, len(order) + 1)
        item_of, depth = self._item_of, self._depth
        deepest = float(depth[: self._blocks.row_end].max(initial=0)) + 1

        def score(rows: Rows) -> NDArray[np.float64]:
            return place_of[item_of[rows]] - depth[rows] / deepest

        return score

    def note_use(self) -> None:
        """Which items requests use: a lease of a prefix holds the first block of each of its items."""
        live = self.live_items()
        self.items.in_use[live] = self._blocks.leases[self._first_row[live]] > 0

    # Events

    def changed(self, row: int) -> None:
        """A block is stored now, or no longer, or in other tiers. For `BlockTable.listeners`."""
        if len(self._item_of) < self._blocks.row_capacity:
            self._grow_rows()
        item = self._item_of.item(row)
        if not self._blocks.live[row]:
            if item != NO_ITEM:
                self._leave(row, item)
            return
        if item == NO_ITEM:
            item = self._join(row)
        self._count(row, item)

    def add(self, rows: Iterable[int]) -> None:
        """Blocks that were in the table before this object listened."""
        for row in rows:
            if self._blocks.live[row]:
                self.changed(row)

    def looked_up(self, rows: Rows, now_s: float) -> None:
        """A request has found these blocks of a prefix, and is about to lease them."""
        items, conditions = self.items, self.items.conditions
        on_path = self._item_of[rows]
        firsts = np.flatnonzero(np.diff(on_path, prepend=NO_ITEM - 1))
        path = on_path[firsts].tolist()
        self._accesses += len(path)
        # A request that looks up twice, or in several processes, is one use.
        idle = (self._blocks.leases[rows[firsts]] == 0).tolist()
        for place, (item, is_idle) in enumerate(zip(path, idle, strict=True)):
            if item == NO_ITEM:
                continue
            items.access_seq[item] = self._accesses - place
            if not is_idle:
                continue
            items.queue_seq[item] = conditions.served
            self.policy.queued(items, item, now_s)
            items.queue_seq[item] = NOT_QUEUED
            items.uses[item] += 1
            items.unwanted_on_ssd[item] = False
            items.hint[item] = items.answer_tokens[item] = 0
            self.policy.used(items, item, now_s)
        conditions.served += 1

    def released(self, rows: Rows) -> None:
        """A lease of these blocks has ended."""
        for item in np.unique(self._item_of[rows]).tolist():
            if item != NO_ITEM:
                self._stored[item] = None

    def settle(self, now_s: float) -> None:
        """Report to the policy the items whose requests have ended, or that have got blocks. Some at each call.

        An item that is still leased is reported once it is not.
        """
        for item in list(islice(self._stored, _SETTLED)):
            del self._stored[item]
            if self._blocks.leases[self._first_row[item]]:
                continue  # `released` adds it again.
            self.items.in_use[item] = 0
            self.items.used_at_s[item] = now_s
            self.policy.stored(self.items, item, now_s)

    # Items

    def _join(self, row: int) -> int:
        """Put a block into the item that it belongs to."""
        blocks = self._blocks
        for other in blocks.shards_of(int(blocks.rows_of_keys([blocks.key_of(row)])[0])):
            if other != row and self._item_of[other] != NO_ITEM:
                return self._enter(row, self._item_of.item(other), self._depth.item(other))
        parent = blocks.parent_row(row)
        if parent == NO_ROW:
            return self._enter(row, self._new_item(NO_ITEM), 0)
        if self._item_of[parent] == NO_ITEM:
            for ancestor in reversed(blocks.ancestors(row, limit=blocks.row_end)):
                if self._item_of[ancestor] == NO_ITEM and ancestor != row:
                    self._count(ancestor, self._join(ancestor))
        item, depth = self._item_of.item(parent), self._depth.item(parent)
        if item == NO_ITEM:  # Clients name the parents, so parents may form a cycle.
            return self._enter(row, self._new_item(NO_ITEM), 0)
        if not self._is_whole(row):
            return self._enter(row, item, depth + 1)
        if depth < self._end_depth[item]:
            # Its last blocks may have left.
            self._end_depth[item] = self._depth[self._whole_rows(item)].max(initial=-1)
        if depth < self._end_depth[item]:
            item = self._split(item, depth)
        if self._children[item]:
            return self._enter(row, self._new_item(item), depth + 1)
        return self._enter(row, item, depth + 1)

    def _is_whole(self, row: int) -> bool:
        blocks = self._blocks
        return int(blocks.token_count[row]) >= self._block_tokens_of(int(blocks.layout_id[row]))

    def _whole_rows(self, item: int) -> Rows:
        rows = np.flatnonzero(self._item_of[: self._blocks.row_end] == item)
        return rows[[self._is_whole(row) for row in rows.tolist()]]

    def _enter(self, row: int, item: int, depth: int) -> int:
        self._item_of[row], self._depth[row] = item, depth
        self._block_count[item] += 1
        if self._is_whole(row):
            self._end_depth[item] = max(self._end_depth.item(item), depth)
        first = self._first_row.item(item)
        if first == NO_ROW or depth < self._depth[first]:
            self._first_row[item] = row
        items, blocks = self.items, self._blocks
        items.size_bytes[item] += int(blocks.size_bytes[row])
        items.value[item] = self._block_count[item]
        items.answer_tokens[item] += int(blocks.token_count[row])
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
        items = self.items
        items.reset(item)
        items.live[item] = True
        items.uses[item] = 1  # The request that stores it.
        self._accesses += 1
        items.access_seq[item] = self._accesses
        self._parent[item], self._children[item], self._block_count[item] = parent, 0, 0
        self._end_depth[item], self._first_row[item] = -1, NO_ROW
        if parent != NO_ITEM:
            self._children[parent] += 1
        return item

    def _split(self, item: int, depth: int) -> int:
        """Give the item's blocks up to this depth to a new item, its front. Returns the front."""
        items, blocks = self.items, self._blocks
        front = self._new_item(int(self._parent[item]))
        if self._parent[item] != NO_ITEM:
            self._children[self._parent[item]] -= 1
        rows = np.flatnonzero(self._item_of[: blocks.row_end] == item)
        at_front = self._depth[rows] <= depth
        items.copy(item, front)
        for each, moved in ((front, rows[at_front]), (item, rows[~at_front])):
            sizes, counted = blocks.size_bytes[moved].astype(np.int64), self._counted[moved]
            self._item_of[moved] = each
            self._block_count[each] = items.value[each] = len(moved)
            self._first_row[each] = moved[np.argmin(self._depth[moved])]
            items.size_bytes[each] = sizes.sum()
            for _, bit, column, _ in _TIERS:
                getattr(items, column)[each] = sizes[(counted & bit) > 0].sum()
        self._parent[item], self._children[front] = front, 1
        self._end_depth[front] = depth
        self.policy.split(items, item, front, self._now_s())
        return front

    def _leave(self, row: int, item: int) -> None:
        """The block is not stored any more."""
        self._count(row, item)
        self._item_of[row] = NO_ITEM
        self._block_count[item] -= 1
        self.items.size_bytes[item] -= int(self._blocks.size_bytes[row])
        self.items.value[item] = self._block_count[item]
        if not self._block_count[item]:
            self._forget(item)
        elif self._first_row[item] == row:
            self._first_row[item] = self.rows_of(item)[0]

    def _forget(self, item: int) -> None:
        self.items.live[item] = False
        self._stored.pop(item, None)
        if self._children[item]:
            self._parent[np.flatnonzero(self._parent[: self._end] == item)] = NO_ITEM
        if self._parent[item] != NO_ITEM:
            self._children[self._parent[item]] -= 1
        self._first_row[item] = NO_ROW
        self._free.append(item)
        self.policy.forgotten(self.items, item, self._now_s())

    # Bytes

    def _count(self, row: int, item: int) -> None:
        """Count the block's bytes in the tiers that it is in now."""
        blocks, items = self._blocks, self.items
        before, now = self._counted.item(row), 0
        if blocks.live[row]:
            now = _IN_DRAM * blocks.is_resident(row, TierName.DRAM) | _ON_SSD * blocks.is_resident(row, TierName.SSD)
        if now == before:
            return
        self._counted[row] = now
        size = int(blocks.size_bytes[row])
        for tier, bit, bytes_column, seq_column in _TIERS:
            if (now ^ before) & bit:
                self._count_in(item, tier, size if now & bit else -size, getattr(items, bytes_column), seq_column)

    def _count_in(self, item: int, tier: TierName, more: int, column: NDArray[Any], seq_column: str) -> None:
        had = int(column[item])
        column[item] = had + more
        if more < 0:
            if tier == TierName.SSD:
                self.items.unwanted_on_ssd[item] = True
            self.policy.left(self.items, item, tier, self._now_s())
        elif not had:
            self._arrivals += 1
            getattr(self.items, seq_column)[item] = self._arrivals
            self.policy.arrived(self.items, item, tier, self._now_s())

    # Space

    def _grow_rows(self) -> None:
        count = self._blocks.row_capacity
        self._item_of = grown(self._item_of, count, NO_ITEM)
        self._depth = grown(self._depth, count, 0)
        self._counted = grown(self._counted, count, 0)

    def _grow_items(self) -> None:
        count = 2 * self.items.row_count
        self.items.grow(count)
        self.policy.grow(count)
        self._parent, self._children = grown(self._parent, count, NO_ITEM), grown(self._children, count, 0)
        self._block_count, self._end_depth = grown(self._block_count, count, 0), grown(self._end_depth, count, 0)
        self._first_row = grown(self._first_row, count, NO_ROW)
