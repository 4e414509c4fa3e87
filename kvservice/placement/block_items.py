"""Groups the stored blocks into items, as they come: the runs of blocks that the same requests use.

An item is an edge of the tree of prefixes. A block that continues the end of an item joins it; one that continues its
middle splits it there, and begins an item of its own. So the history of a conversation is an item, and a prompt that
conversations share is another one. A partial block joins the item that it continues, and does not extend it.

An item is a row of the `ItemTable`, and keeps its number where it is split: the front gets a new one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows, TierName
from kvservice.placement.core import PlacementCore
from kvservice.placement.item_state import ItemPart
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable, grown
from kvservice.policy.placement import Placement

NO_ITEM = -1
IN_DRAM, ON_SSD = 1, 2  # Bits of `BlockChanges.tiers`.
_IN_TIERS = IN_DRAM | ON_SSD
_WHOLE = 4  # It is a whole block.
_COMING = 8  # It is being read to DRAM.
_EVICTED = 16  # A client evicted it from DRAM, and it was not used since.
_ITEMS_AT_FIRST = 1024
_GROWTH_PART = 16  # Space for items grows by a sixteenth: on average, a thirty-second of it is not used.
_SETTLED = 2048
_REPORTED_WITHIN_S = 5.0  # After the end of an answer, an engine's report of its length counts.
_RATE_WEIGHT = 0.05  # Of the last request, in the mean time between two that leave a queue.
_TIERS = ((TierName.DRAM, IN_DRAM), (TierName.SSD, ON_SSD))


class BlockChanges(NamedTuple):
    """Blocks that are stored now, or no longer, or in other tiers. Arrays of the shape [blocks], by row in the table.

    Parents come before the blocks that continue them, as far as they are stored.
    """

    rows: Rows
    generations: NDArray[np.int64]  # Of the row: it differs for the next block that uses the row.
    live: NDArray[np.bool_]  # Lookups find it.
    tiers: NDArray[np.int64]  # IN_DRAM and ON_SSD, as bits.
    size_bytes: NDArray[np.int64]
    token_count: NDArray[np.int64]
    is_whole: NDArray[np.bool_]
    parents: Rows  # The row of the block that it continues; NO_ROW if that is not stored.
    shards: Rows  # The first row of the same key.
    keys: NDArray[np.int64]  # A part of the key.


class BlockItems:
    """The items of a block table, for one policy, which it calls.

    It knows the table by the events alone, so that it may be on another thread than the table. All calls must be on
    one thread at a time, in the order of the events. Times are seconds of any one clock.
    """

    def __init__(self, policy: Placement, conditions: Conditions, row_capacity: int = 1024) -> None:
        self.items = ItemTable(_ITEMS_AT_FIRST, conditions)
        self.policy = policy
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
        self._stored: dict[int, None] = {}  # Items that have got blocks since `settle`.
        self._answers: dict[int, int] = {}  # By item: the tokens of its last answer, as an engine has reported them.
        self._unscored: dict[int, None] = {}  # Items that were forgotten, and are back since `settle`.
        self._headless: dict[int, None] = {}  # Items whose first block has left, within `changed`.
        self._queue: list[int] = []  # Items that queued requests will read, in the order of the queue.
        self._wanted: dict[int, Promotion] = {}  # By item: the reads that the policy wants and that have not begun.
        self._wants_changed = False  # Since the last answer of `reads`.
        self._served_at_s = math.nan  # When a request was last served while others waited.
        self._now_s = -math.inf  # The time of the event that is being handled.

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

    def to_guess(self, rows: Rows) -> Rows:
        """Those of the rows that may be read to DRAM on a guess: not what a client has evicted from it."""
        may: Rows = rows[self._flags[rows] & _EVICTED == 0]
        return may

    def known(self) -> tuple[int, int, int]:
        """How many items there are, and blocks in them, and items that queued requests will read."""
        items = len(self.live_items())
        return items, int(np.count_nonzero(self._item_of[: self._row_end] != NO_ITEM)), len(self._queue)

    def live_items(self) -> Rows:
        """Those that have blocks. An item that only slower tiers have is not `live` in the table."""
        return np.flatnonzero(self._block_count[: self._end])

    def lowest(self, rows: Rows, tier: TierName, count_max: int, now_s: float) -> tuple[Rows, NDArray[np.float64]]:
        """Those of the rows that should leave `tier` first, the first one first, and the score of each one's item.

        The order is that of their items' scores; of one item, the end leaves before its front.
        """
        rows = rows[rows < self._row_end]
        items = self._item_of[rows]
        rows, items = rows[items != NO_ITEM], items[items != NO_ITEM]
        is_asked = np.zeros(self._end, np.bool_)
        is_asked[items] = True
        asked = np.flatnonzero(is_asked)
        score_of = np.zeros(self._end)
        score_of[asked] = self.policy.retention(self.items, asked, tier, now_s)
        scores = score_of[items]
        if len(rows) > count_max:
            few = scores <= np.partition(scores, count_max - 1)[count_max - 1]  # Of the last item, all: its end leaves.
            rows, scores, items = rows[few], scores[few], items[few]
        # Of items with equal scores, one that lies deeper in the tree leaves first.
        order = np.lexsort((-self._depth[rows], items, -self._depth[self._first_row[items]], scores))
        order = order[:count_max]
        return rows[order], scores[order]

    # Questions to the policy

    def reads(self, now_s: float) -> list[Promotion] | None:
        """All reads that the policy wants and that have not begun; None if they are those of the last call.

        A read stays wanted until it begins (`coming`), or until the item is used, leaves the queue or is gone.
        """
        if now_s >= self.policy.look_at_s:
            for promotion in self.policy.promotions(self.items, self._queue, now_s):
                self._wanted[promotion.row] = promotion
                self._wants_changed = True
        if not self._wants_changed:
            return None
        self._wants_changed = False
        return list(self._wanted.values())

    def unwant(self, item: int) -> None:
        """The read has begun, or is not needed any more."""
        if self._wanted.pop(item, None) is not None:
            self._wants_changed = True

    def wanted_on_ssd(self, rows: Rows, now_s: float) -> NDArray[np.bool_]:
        """Which of these blocks in DRAM are copied to SSD, for which other blocks are evicted there."""
        items = list(map(self.item_of, rows.tolist()))
        wanted = {item: item == NO_ITEM or item in self._unscored for item in items}
        for item, is_new in wanted.items():
            wanted[item] = is_new or self.policy.wants_on_ssd(self.items, item, now_s)
        return np.array([wanted[item] for item in items], np.bool_)

    # Events

    def changed(self, changes: BlockChanges, now_s: float) -> None:
        """Blocks are stored now, or no longer, or in other tiers."""
        self._now_s = now_s
        self._need_rows(int(changes.rows.max(initial=-1)) + 1)
        columns = (column.tolist() for column in changes)
        for row, generation, live, tiers, size, tokens, whole, parent, shard, key in zip(*columns, strict=True):
            item = self._item_of.item(row)
            if item != NO_ITEM and (not live or generation != self._generation.item(row)):
                self._leave(row, item)
                item = NO_ITEM
            if not live:
                continue
            if item == NO_ITEM:
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

    def looked_up(self, rows: Rows, now_s: float) -> None:
        """A request has found these blocks of a prefix, and is about to lease them."""
        self._now_s = now_s
        items, conditions = self.items, self.items.conditions
        self._flags[rows] &= ~_EVICTED
        on_path = self._item_of[rows]
        firsts = np.flatnonzero(np.diff(on_path, prepend=NO_ITEM - 1))
        for item in reversed(on_path[firsts].tolist()):  # The front of a path counts as used last.
            if item == NO_ITEM or items.in_use[item]:
                continue  # A request that looks up twice, or in several processes, is one use.
            self._wake(item)
            self.unwant(item)
            self._answers.pop(item, None)
            if items.queue_seq[item] == NOT_QUEUED:
                self._core.queued((item,), conditions.served, now_s)
            else:
                self._queue.remove(item)
            self._core.used((item,), items.queue_seq.item(item), now_s)
            items.answer_tokens[item] = 0
            self._stored[item] = None  # It may get no lease.
        conditions.served += 1
        self._measure_rate(now_s)

    def _measure_rate(self, now_s: float) -> None:
        """A request was served: how many a second leave a queue that is not empty."""
        conditions, since_s = self.items.conditions, self._served_at_s
        self._served_at_s = now_s if conditions.queued else math.nan
        if now_s > since_s:  # Requests waited since the last one was served.
            mean_s = 1 / conditions.turns_per_s or now_s - since_s
            conditions.turns_per_s = 1 / (mean_s + _RATE_WEIGHT * (now_s - since_s - mean_s))

    def leases_are(self, leases: NDArray[np.int32]) -> None:
        """The number of leases of each row at the beginning. Before all other events."""
        self._need_rows(len(leases))
        self._leases[: len(leases)] = leases

    def leased(self, rows: Rows) -> None:
        """A lease holds these blocks, once for each time that a row is named."""
        np.add.at(self._leases, rows, 1)

    def released(self, rows: Rows) -> None:
        """A lease of these blocks has ended, once for each time that a row is named."""
        np.subtract.at(self._leases, rows, 1)
        for item in np.unique(self._item_of[rows]).tolist():
            if item != NO_ITEM:
                self._stored[item] = None

    def settle(self, now_s: float) -> None:
        """Report to the policy the items whose requests have ended, or that have got blocks. Some at each call.

        An item that is still leased is reported once it is not.
        """
        self._now_s = now_s
        for item in list(islice(self._stored, _SETTLED)):
            del self._stored[item]
            if self._leases[self._first_row[item]]:
                continue  # `released` adds it again.
            if item in self._answers:
                self.items.answer_tokens[item] = self._answers[item]
            if self.items.in_use[item]:
                self._core.answered(item, self.items.answer_tokens.item(item), now_s)
            self.items.used_at_s[item] = now_s
            self._unscored.pop(item, None)
            self._core.stored((item,), now_s)
            if self._queue:
                self.ask_again(now_s)  # Its space may be for the next ones: an engine may wait for them to be read.
        if not self._stored:
            self._stored = {}  # A dict that was large stays so.

    def queued(self, requests: Sequence[Rows], waiting: int, now_s: float) -> None:
        """The blocks that the requests at the heads of the engines' queues will read, the next request first.

        It replaces those of the last call. `waiting` requests are queued in all.
        """
        self._now_s = now_s
        items, conditions = self.items, self.items.conditions
        before, queue = dict.fromkeys(self._queue), dict[int, int]()
        for number, rows in enumerate(requests):
            for item in dict.fromkeys(self._item_of[rows].tolist()):
                if item != NO_ITEM:
                    queue.setdefault(item, number)
        for item in before:
            if item not in queue:
                self.unwant(item)
                self._core.unqueued((item,), items.queue_seq.item(item), now_s)
                self._stored[item] = None  # It waits for its next request again.
        self._queue = list(queue)
        conditions.queued = waiting
        for item, number in queue.items():
            if item in before:
                items.queue_seq[item] = conditions.served + number
            else:
                self._core.queued((item,), conditions.served + number, now_s)

    def hinted(self, rows: Rows, hint: Hint, kind: int, now_s: float) -> None:
        """An application sent a hint about the session whose history ends with these blocks; see `hint_kind`."""
        self._now_s = now_s
        item = self.item_of(int(rows[-1])) if len(rows) else NO_ITEM
        if item != NO_ITEM:
            self._core.hinted(item, hint, now_s, kind)

    def answered(self, rows: Rows, answer_tokens: int, now_s: float) -> None:
        """An engine has reported the length of an answer. The history ends with these blocks, or continues them."""
        item = self.item_of(int(rows[-1])) if len(rows) else NO_ITEM
        if item == NO_ITEM:
            return
        items = self.items
        if items.in_use[item]:
            self._answers[item] = answer_tokens
        elif not now_s - items.used_at_s[item] > _REPORTED_WITHIN_S:  # NaN: it has not been reported to the policy yet.
            self._answers[item] = answer_tokens
            self._stored[item] = None

    def evicted(self, rows: Rows) -> None:
        """A client has evicted these blocks from DRAM: they stay away until the next request for them."""
        self._flags[rows] |= _EVICTED

    def coming(self, rows: Rows, is_coming: bool) -> None:
        """The blocks are being read to DRAM, or no longer."""
        rows = rows[self._item_of[rows] != NO_ITEM]
        for item in np.unique(self._item_of[rows]).tolist():
            self.unwant(item)
        rows = rows[(self._flags[rows] & _COMING > 0) != is_coming]
        self._flags[rows] ^= _COMING
        sizes = self._size_bytes[rows] if is_coming else -self._size_bytes[rows]
        np.add.at(self.items.coming_bytes, self._item_of[rows], sizes)

    def ask_again(self, now_s: float) -> None:
        """The policy is asked for reads next time, whether it wants that or not."""
        self.policy.look_at_s = min(self.policy.look_at_s, now_s)

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
        self._parent[item], self._children[item], self._block_count[item] = parent, 0, 0
        self._end_depth[item], self._first_row[item] = -1, NO_ROW
        if parent != NO_ITEM:
            self._children[parent] += 1
        return item

    def _split(self, item: int, depth: int) -> int:
        """Give the item's blocks up to this depth to a new item, its front. Returns the front."""
        front = self._new_item(int(self._parent[item]))
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
        if self.items.queue_seq[item] != NOT_QUEUED:
            self._queue.insert(self._queue.index(item), front)
        if self.items.in_use[item]:
            self._stored |= {front: None, item: None}  # A request that reads the front alone may hold it.
        return front

    def _leave(self, row: int, item: int) -> None:
        """The block is not stored any more."""
        self._count(row, item, 0)
        self.coming(np.array([row]), False)
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
        self._stored.pop(item, None)
        self._unscored.pop(item, None)
        self._answers.pop(item, None)
        self._headless.pop(item, None)
        self.unwant(item)
        if self.items.queue_seq[item] != NOT_QUEUED:
            self._queue.remove(item)
            self.items.queue_seq[item] = NOT_QUEUED
        self.items.in_use[item] = 0
        self._core.forget_if_gone(item, self._now_s)
        if self._children[item]:
            self._parent[np.flatnonzero(self._parent[: self._end] == item)] = NO_ITEM
        if self._parent[item] != NO_ITEM:
            self._children[self._parent[item]] -= 1
        self._first_row[item] = NO_ROW
        self._free.append(item)

    # Bytes

    def _count(self, row: int, item: int, tiers: int) -> None:
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
                self._core.left(item, tier, size, self._now_s)
                continue
            self._wake(item)
            coming = items.coming_bytes.item(item)
            self._core.entered(item, tier, size, self._now_s)
            items.coming_bytes[item] = coming
        if tiers & IN_DRAM:
            self.coming(np.array([row]), False)

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
