"""S3-FIFO (Yang et al., SOSP 2023): a small queue filters items that are used once out of the main queue.

A new item enters the small queue, a tenth of the tier, or the main queue if the ghost queue lists it. While the small
queue exceeds its share, its oldest item is evicted and listed in the ghost queue, unless it was used more than once:
then it moves to the main queue. Otherwise the main queue's oldest item is evicted. An item that was used there is
reinserted once per use instead, at most three times.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows, TierName
from kvservice.policy.items import ItemTable, grown
from kvservice.policy.placement import Placement

_SMALL_PART = 10  # The small queue's share is one in this many.
_FREQ_MAX = 3
_NOWHERE, _SMALL, _MAIN, _GHOST = range(4)
_CLASS = 2.0**48  # Distance between two classes of scores: above any number of arrivals, and exact in a float64.


class S3FifoPolicy(Placement):
    """Each tier has its own queues. A use counts in every tier that has the item.

    Items differ in size, so shares are in bytes, as in the authors' simulator. The ghost queue lists items of as many
    bytes as the main queue's share.
    """

    name: ClassVar[str] = "s3fifo"
    whole_items: ClassVar[bool] = True

    def __init__(self) -> None:
        self._queues = {tier: _Queues() for tier in (TierName.DRAM, TierName.SSD)}

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        is_new = items.uses[row] <= 1  # The row has a new item: the ghost queue lists the row's previous item.
        for queues in self._queues.values():
            queues.note_use(row, is_new)

    def arrived(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        queues = self._queues[tier]
        queues.insert(row, items.row_count)
        if tier == TierName.SSD:  # The eviction for it is over.
            queues.seat()

    def split(self, items: ItemTable, row: int, front_row: int, now_s: float) -> None:
        for queues in self._queues.values():
            queues.grow(items.row_count)
            queues.insert_beside(row, front_row)

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        capacity_bytes, resident_bytes = _of_tier(items, tier)
        ghost_share_bytes = capacity_bytes - capacity_bytes // _SMALL_PART
        self._queues[tier].take(row, items, resident_bytes, ghost_share_bytes)

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        for queues in self._queues.values():
            queues.drop(row)

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        capacity_bytes, resident_bytes = _of_tier(items, tier)
        queues = self._queues[tier]
        queues.grow(items.row_count)
        queues.look(resident_bytes, items.in_use, capacity_bytes // _SMALL_PART)
        return queues.rank(rows)

    def next_to_leave(self, items: ItemTable, tier: TierName, may_leave: memoryview[int], begins: bool) -> int:
        capacity_bytes, resident_bytes = _of_tier(items, tier)
        queues = self._queues[tier]
        if begins:
            queues.grow(items.row_count)
            queues.count_small(resident_bytes)
        return queues.next_to_leave(may_leave, resident_bytes.data, items.at.in_use, capacity_bytes // _SMALL_PART)

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        return not items.unwanted_on_ssd[row]  # SSD evicted it: only a new use justifies evicting another item.


def _of_tier(items: ItemTable, tier: TierName) -> tuple[int, NDArray[np.int64]]:
    """(the tier's capacity in bytes, the bytes that it has of each item)."""
    if tier == TierName.DRAM:
        return items.conditions.dram_capacity_bytes, items.dram_bytes
    return items.conditions.ssd_capacity_bytes, items.ssd_bytes


class _Queues:
    """The three queues of one tier, as linked lists in arrays. An item is in at most one of them.

    `seq` numbers the entries into all queues, and a queue is ordered by `seq`. Items in use are not evicted: a scan
    skips them, and they keep their place.
    """

    def __init__(self) -> None:
        self._newcomer = NO_ROW  # The eviction for it may still run: it enters its queue at the next event.
        self._newcomer_queue = _NOWHERE
        self._next_seq = 1
        self._oldest = [NO_ROW] * 4
        self._newest = [NO_ROW] * 4
        self._over_share_seq = 0  # The small queue exceeds its share by its items up to this `seq`.
        self._ghost_bytes = 0
        self._small_bytes = 0  # Since `count_small`, without items that entered the queue after it.
        self._in_small = np.empty(1024, np.int64)  # The small queue's rows, in no order: the first so many of them.
        self._small_count = 0
        self._rows = 0
        self._queues = self._freqs = np.empty(0, np.int8)
        self._seqs = self._sizes = self._olders = self._newers = np.empty(0, np.int64)
        self._places = np.empty(0, np.int32)  # In `_in_small`.
        self.grow(1024)

    def grow(self, row_count: int) -> None:
        """Make the arrays large enough for `row_count` rows."""
        if row_count <= self._rows:
            return
        self._rows = row_count
        for name in ("_queues", "_freqs", "_seqs", "_sizes", "_olders", "_newers", "_places"):
            setattr(self, name, grown(getattr(self, name), row_count, 0))
        # Access to a single element of a memoryview takes a third of the time of NumPy's.
        self._queue, self._freq = self._queues.data, self._freqs.data
        self._seq, self._size = self._seqs.data, self._sizes.data
        self._older, self._newer = self._olders.data, self._newers.data
        self._place = self._places.data

    # Events

    def note_use(self, row: int, is_new: bool) -> None:
        self.seat()
        if row >= self._rows:
            return
        queue = self._queue[row]
        if queue == _GHOST and is_new:
            self._unlink(row)
        elif queue in (_SMALL, _MAIN) and self._freq[row] < _FREQ_MAX:
            self._freq[row] += 1

    def insert(self, row: int, row_count: int) -> None:
        self.grow(row_count)
        self.seat()
        self._newcomer, self._newcomer_queue = row, _MAIN if self._queue[row] == _GHOST else _SMALL
        self._unlink(row)
        self._freq[row] = 0

    def insert_beside(self, row: int, new_row: int) -> None:
        """A new item enters the queue of another one, and counts as used as often."""
        self.seat()
        queue = self._queue[row]
        if queue in (_SMALL, _MAIN):
            self._link(new_row, queue)
            self._freq[new_row] = self._freq[row]

    def seat(self) -> None:
        """The eviction for the newest item is over: the item enters its queue."""
        if self._newcomer != NO_ROW:
            self._link(self._newcomer, self._newcomer_queue)
            self._newcomer = NO_ROW

    def drop(self, row: int) -> None:
        """The item left the tier without an eviction. The ghost queue does not change."""
        if row == self._newcomer:
            self._newcomer = NO_ROW
        elif row < self._rows and self._queue[row] != _GHOST:
            self._unlink(row)

    def take(self, row: int, items: ItemTable, resident_bytes: NDArray[np.int64], ghost_share_bytes: int) -> None:
        """The item, or its end, was evicted: update the queues as scans that reach this item would."""
        if row == self._newcomer:
            self.seat()
        if row >= self._rows or self._queue[row] not in (_SMALL, _MAIN):
            return
        gone = resident_bytes[row] == 0
        if self._queue[row] == _SMALL:
            left_bytes = resident_bytes.item(row)
            self._small_bytes -= self._size[row] - left_bytes
            self._size[row] = left_bytes
            self._sift(row, self._seq[row], items, resident_bytes)
            if self._freq[row] <= 1:
                if gone:
                    self._unlink(row)
                    self._remember(row, int(items.size_bytes[row]), ghost_share_bytes)
                return
            self._move_to_main(row)
        self._sift(NO_ROW, self._over_share_seq, items, resident_bytes)
        self._turn(row, items, resident_bytes)
        if gone:
            self._unlink(row)

    def _sift(self, until: int, until_seq: int, items: ItemTable, resident_bytes: NDArray[np.int64]) -> None:
        """Scan the small queue, and move items that were used more than once to the main queue."""
        at = self._oldest[_SMALL]
        while at not in (NO_ROW, until) and self._seq[at] <= until_seq:
            newer = self._newer[at]
            if not resident_bytes[at]:
                self._unlink(at)  # It left the tier without an event.
            elif not items.in_use[at]:
                if self._freq[at] <= 1:
                    return  # It should have been evicted first: the store uses an earlier ranking.
                self._move_to_main(at)
            at = newer

    def _turn(self, until: int, items: ItemTable, resident_bytes: NDArray[np.int64]) -> None:
        """Scan the main queue up to an item without reinsertions left."""
        at = self._oldest[_MAIN]
        while at != until or self._freq[until]:
            if at == NO_ROW:  # The newer ones are all in use.
                at = self._oldest[_MAIN]
                continue
            newer = self._newer[at]
            if not resident_bytes[at] and at != until:
                self._unlink(at)
            elif not items.in_use[at] or at == until:
                if not self._freq[at]:
                    return  # As above.
                self._freq[at] -= 1
                self._unlink(at)
                self._link(at, _MAIN)
                newer = self._oldest[_MAIN] if newer == NO_ROW else newer
            at = newer

    def _move_to_main(self, row: int) -> None:
        self._unlink(row)
        self._freq[row] = 0
        self._link(row, _MAIN)

    def _remember(self, row: int, size_bytes: int, share_bytes: int) -> None:
        self._link(row, _GHOST, size_bytes)
        while self._ghost_bytes > share_bytes:
            self._unlink(self._oldest[_GHOST])

    def _link(self, row: int, queue: int, size_bytes: int = 0) -> None:
        newest = self._newest[queue]
        self._size[row] = size_bytes
        self._queue[row], self._seq[row] = queue, self._next_seq
        self._next_seq += 1
        self._older[row], self._newer[row] = newest, NO_ROW
        self._newest[queue] = row
        if newest == NO_ROW:
            self._oldest[queue] = row
        else:
            self._newer[newest] = row
        if queue == _GHOST:
            self._ghost_bytes += size_bytes
        elif queue == _SMALL:
            if self._small_count == len(self._in_small):
                self._in_small = grown(self._in_small, 2 * self._small_count, 0)
            self._in_small[self._small_count] = row
            self._place[row] = self._small_count
            self._small_count += 1

    def _unlink(self, row: int) -> None:
        queue = self._queue[row]
        if queue == _NOWHERE:
            return
        older, newer = self._older[row], self._newer[row]
        if older == NO_ROW:
            self._oldest[queue] = newer
        else:
            self._newer[older] = newer
        if newer == NO_ROW:
            self._newest[queue] = older
        else:
            self._older[newer] = older
        self._queue[row] = _NOWHERE
        if queue == _GHOST:
            self._ghost_bytes -= self._size[row]
        elif queue == _SMALL:
            self._small_bytes -= self._size[row]
            self._small_count -= 1
            last = self._in_small.item(self._small_count)
            self._in_small[self._place[row]] = last
            self._place[last] = self._place[row]

    # Ranking

    def count_small(self, resident_bytes: NDArray[np.int64]) -> None:
        """Count the small queue's bytes again: items have entered it, and those in it may have got more bytes."""
        small = self._in_small[: self._small_count]
        self._sizes[small] = sizes = resident_bytes[small]
        self._small_bytes = int(sizes.sum())

    def next_to_leave(
        self,
        may_leave: memoryview[int],
        resident: memoryview[int],
        in_use: memoryview[int],
        share_bytes: int,
    ) -> int:
        """The row that `rank` puts first, of those with `may_leave[row] >= 0`; NO_ROW if there is none."""
        freq, newer = self._freq, self._newer
        excess_bytes = self._small_bytes - share_bytes
        self._over_share_seq = 0
        promoted = NO_ROW  # It moves from the small queue to the main queue.
        at = self._oldest[_SMALL]
        while at != NO_ROW and excess_bytes >= 0:
            if not in_use[at]:
                self._over_share_seq = self._seq[at]
                if may_leave[at] >= 0:
                    if freq[at] <= 1:
                        return at
                    if promoted == NO_ROW:
                        promoted = at
                excess_bytes -= resident[at]
            at = newer[at]
        rest_of_small = at
        found, found_freq = promoted, 0 if promoted != NO_ROW else _FREQ_MAX + 1
        at = self._oldest[_MAIN]
        while at != NO_ROW:
            if may_leave[at] >= 0 and (freq[at] < found_freq or not freq[at]):
                found, found_freq = at, freq[at]
                if not found_freq:
                    return at  # It is older than what is promoted.
            at = newer[at]
        at = rest_of_small
        while at != NO_ROW and found == NO_ROW:
            if may_leave[at] >= 0:
                found = at
            at = newer[at]
        if found == NO_ROW and self._newcomer != NO_ROW and may_leave[self._newcomer] >= 0:
            return self._newcomer
        return found

    def look(self, resident_bytes: NDArray[np.int64], in_use: NDArray[np.int32], share_bytes: int) -> None:
        """Update by how much the small queue exceeds its share."""
        small = np.flatnonzero(self._queues[: len(resident_bytes)] == _SMALL)
        small = small[np.argsort(self._seqs[small], kind="stable")]
        held = in_use[small] > 0
        held_bytes = int(resident_bytes[small[held]].sum())
        small = small[~held]
        # Bytes of the queue when a scan reaches an item: this item, the newer ones, and the items in use.
        left_bytes = np.cumsum(resident_bytes[small][::-1])[::-1] + held_bytes
        over = int(np.count_nonzero(left_bytes >= share_bytes))
        self._over_share_seq = self._seq[int(small[over - 1])] if over else 0

    def rank(self, rows: Rows) -> NDArray[np.float64]:
        """Scores, shape [rows], in the order in which scans would evict the items if no item were used.

        The order is: the items by which the small queue exceeds its share; the main queue by reinsertions left, then
        by age, with items from the small queue as its newest; the rest of the small queue, used or not; and last the
        item that the eviction is for.
        """
        queue, freq, seq = self._queues[rows], self._freqs[rows], self._seqs[rows]
        main = queue == _MAIN
        over = (queue == _SMALL) & (seq <= self._over_share_seq)
        classes = np.where(main, 1 + freq, np.where(over, (freq > 1).astype(np.int8), 2 + _FREQ_MAX))
        classes[rows == self._newcomer] = 3 + _FREQ_MAX
        seq = np.where(over & (freq > 1), seq + self._next_seq, seq)
        return classes * _CLASS + seq
