"""S3-FIFO (Yang et al., SOSP 2023): a small queue sifts what is used once from what belongs in the main one.

What comes into a tier goes into its small queue, a tenth of the tier, or into the main queue where the ghost still
remembers it. Room is made from the small queue's old end while that queue is over its share: what was used more than
once since it came moves to the main queue, the rest leaves and is remembered by the ghost. Else room is made from the
main queue's old end: what was used there goes round once more for each use, at most three times.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows, TierName
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement

_SMALL_PART = 10  # One part in so many is the small queue's.
_FREQ_MAX = 3
_NOWHERE, _SMALL, _MAIN, _GHOST = range(4)
_CLASS = 2.0**48  # Between two classes of worth. More than there will ever be arrivals, and exact in a float64.


class S3FifoPolicy(Placement):
    """Each tier has queues of its own. A use counts in every tier that has the item.

    Items differ in size, so shares are counted in bytes, as in the authors' simulator: the ghost remembers items
    worth as many bytes as the main queue's share, which for items of one size is as many entries.
    """

    name: ClassVar[str] = "s3fifo"
    whole_items: ClassVar[bool] = True
    newcomers_may_leave: ClassVar[bool] = True

    def __init__(self) -> None:
        self._queues = {tier: _Queues() for tier in TierName}

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        is_new = items.uses[row] <= 1  # The row was given to another item: what the ghost knew was of the one before.
        for queues in self._queues.values():
            queues.note_use(row, is_new)

    def arrived(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        queues = self._queues[tier]
        queues.insert(row, items.row_count)
        if tier is TierName.SSD:  # Room was made before.
            queues.seat()

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

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        return not items.unwanted_on_ssd[row]  # It had its time there: only a use makes it worth another's place.


def _of_tier(items: ItemTable, tier: TierName) -> tuple[int, NDArray[np.int64]]:
    """A tier's capacity, and the bytes that it has of each item."""
    if tier is TierName.DRAM:
        return items.conditions.dram_capacity_bytes, items.dram_bytes
    return items.conditions.ssd_capacity_bytes, items.ssd_bytes


class _Queues:
    """The three queues of one tier, linked through arrays, as an item is in one of them at most.

    `seq` numbers what enters any of them: the order of a queue is that of its items' `seq`. Items that are in use
    cannot leave: a hand goes past them, and they keep their place.
    """

    def __init__(self) -> None:
        self._newcomer = NO_ROW  # Room is being made for it: it enters its queue once something else happens.
        self._newcomer_queue = _NOWHERE
        self._next_seq = 1
        self._oldest = [NO_ROW] * 4
        self._newest = [NO_ROW] * 4
        self._over_share_seq = 0  # The small queue is over its share until what came to it by then has left it.
        self._ghost_bytes = 0
        self._rows = 0
        self._queues = self._freqs = np.empty(0, np.int8)
        self._seqs = self._sizes = self._olders = self._newers = np.empty(0, np.int64)
        self.grow(1024)

    def grow(self, row_count: int) -> None:
        """Have state for this many rows at least."""
        if row_count <= self._rows:
            return
        more = max(row_count - self._rows, self._rows)
        self._rows += more
        for name in ("_queues", "_freqs", "_seqs", "_sizes", "_olders", "_newers"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros(more, column.dtype)]))
        # Single elements come from a memoryview in a third of the time.
        self._queue, self._freq = self._queues.data, self._freqs.data
        self._seq, self._size = self._seqs.data, self._sizes.data
        self._older, self._newer = self._olders.data, self._newers.data

    # What happens

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

    def seat(self) -> None:
        """Room was made for what came last: it enters its queue."""
        if self._newcomer != NO_ROW:
            self._link(self._newcomer, self._newcomer_queue)
            self._newcomer = NO_ROW

    def drop(self, row: int) -> None:
        """The item is in the tier no more, and nobody made room with it. What the ghost knows it still knows."""
        if row == self._newcomer:
            self._newcomer = NO_ROW
        elif row < self._rows and self._queue[row] != _GHOST:
            self._unlink(row)

    def take(self, row: int, items: ItemTable, resident_bytes: NDArray[np.int64], ghost_share_bytes: int) -> None:
        """The item left, or its end did: do what the hands do on their way to it."""
        if row == self._newcomer:
            self.seat()
        if row >= self._rows or self._queue[row] not in (_SMALL, _MAIN):
            return
        gone = resident_bytes[row] == 0
        if self._queue[row] == _SMALL:
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
        """Move to the main queue what the hand of the small queue finds to have been used more than once."""
        at = self._oldest[_SMALL]
        while at not in (NO_ROW, until) and self._seq[at] <= until_seq:
            newer = self._newer[at]
            if not resident_bytes[at]:
                self._unlink(at)  # It went without a word.
            elif not items.in_use[at]:
                if self._freq[at] <= 1:
                    return  # It should have left first: the mover goes by an earlier ranking.
                self._move_to_main(at)
            at = newer

    def _turn(self, until: int, items: ItemTable, resident_bytes: NDArray[np.int64]) -> None:
        """Turn the main queue's hand to an item that has no turn left."""
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
        self._size[row] = size_bytes
        self._link(row, _GHOST)
        while self._ghost_bytes > share_bytes:
            self._unlink(self._oldest[_GHOST])

    def _link(self, row: int, queue: int) -> None:
        newest = self._newest[queue]
        self._queue[row], self._seq[row] = queue, self._next_seq
        self._next_seq += 1
        self._older[row], self._newer[row] = newest, NO_ROW
        self._newest[queue] = row
        if newest == NO_ROW:
            self._oldest[queue] = row
        else:
            self._newer[newest] = row
        if queue == _GHOST:
            self._ghost_bytes += self._size[row]

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

    # Ranking

    def look(self, resident_bytes: NDArray[np.int64], in_use: NDArray[np.int32], share_bytes: int) -> None:
        """See how far the small queue is over its share."""
        small = np.flatnonzero(self._queues[: len(resident_bytes)] == _SMALL)
        small = small[np.argsort(self._seqs[small], kind="stable")]
        held = in_use[small] > 0
        held_bytes = int(resident_bytes[small[held]].sum())
        small = small[~held]
        # What the queue has when the hand comes to an item: this one, the newer ones, and those that cannot leave.
        left_bytes = np.cumsum(resident_bytes[small][::-1])[::-1] + held_bytes
        over = int(np.count_nonzero(left_bytes >= share_bytes))
        self._over_share_seq = self._seq[int(small[over - 1])] if over else 0

    def rank(self, rows: Rows) -> NDArray[np.float64]:
        """The order in which the hands make them leave, where nothing is used meanwhile.

        First what leaves the small queue while it is over its share; then the main queue by the turns that are
        left, and within those by age, with what came to it from the small queue as its newest; and when that is
        empty, the rest of the small queue, whose items then leave whether they were used or not. Last of all
        what room is made for.
        """
        queue, freq, seq = self._queues[rows], self._freqs[rows], self._seqs[rows]
        main = queue == _MAIN
        over = (queue == _SMALL) & (seq <= self._over_share_seq)
        classes = np.where(main, 1 + freq, np.where(over, (freq > 1).astype(np.int8), 2 + _FREQ_MAX))
        classes[rows == self._newcomer] = 3 + _FREQ_MAX
        seq = np.where(over & (freq > 1), seq + self._next_seq, seq)
        return classes * _CLASS + seq
