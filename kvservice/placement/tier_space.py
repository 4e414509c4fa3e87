"""One tier's space: its bytes, and the rows in it that may be evicted, lowest score first."""

from __future__ import annotations

import numpy as np

from kvservice.blocks import Rows, TierName
from kvservice.placement.views import ints
from kvservice.policy.items import ItemTable, grown
from kvservice.policy.placement import Placement, overrides

NO_ROW = -1
#: With more rows than this, one ranking serves several evictions: it holds 1/64 of the rows.
_MANY = 256
_SHARE = 64


class RowEpochs:
    """Per row, the ranking epoch of its last change. A ranking is out of date for rows that changed since."""

    def __init__(self, row_count: int) -> None:
        self.epoch = 0
        self._last = np.zeros(row_count, np.int64)
        self.last = ints(self._last)

    def grow(self, row_count: int) -> None:
        """Make space for so many rows."""
        self._last = grown(self._last, row_count, 0)
        self.last = ints(self._last)


class TierSpace:
    """Counts bytes, keeps the rows that are not held as a dense array, and selects the next victim."""

    def __init__(
        self, tier: TierName, capacity_bytes: int, items: ItemTable, policy: Placement, row_epochs: RowEpochs
    ) -> None:
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0  # Includes the space that running promotions have reserved.
        self.retention = 0.0  # The score of the last victim.
        self._items = items
        self._policy = policy
        self._asks_policy = overrides(policy, "next_to_leave")
        self._row_epochs = row_epochs
        self._epoch = 0
        self._begins = True
        self.count = 0
        self._rows = np.empty(1024, np.int64)
        self._view = ints(self._rows)
        self._places = np.full(items.row_count, NO_ROW, np.int32)
        self._place = ints(self._places)
        self._order: list[int] = []  # The next victim is the last element.
        self._scores: list[float] = []

    def grow(self, row_count: int) -> None:
        """Make space for so many rows."""
        self._places = grown(self._places, row_count, NO_ROW)
        self._place = ints(self._places)

    def add(self, row: int) -> None:
        """The row may be evicted from now on."""
        if self._place[row] >= 0:
            return
        count = self.count
        if count == len(self._view):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
            self._view = ints(self._rows)
        self._view[count] = row
        self._place[row] = count
        self.count = count + 1

    def discard(self, row: int) -> None:
        """The row may not be evicted: it has left the tier, or is held."""
        place = self._place[row]
        if place < 0:
            return
        self.count = count = self.count - 1
        last = self._view[count]
        self._view[place] = last
        self._place[last] = place
        self._place[row] = NO_ROW

    @property
    def rows(self) -> Rows:
        """The rows that may be evicted, in no order. Valid until the next `add` or `discard`."""
        return self._rows[: self.count]

    def begin_eviction(self) -> None:
        """Start an eviction. Drops the ranking if rows are few, or if the policy may score new rows lowest."""
        self._begins = True
        if self.count <= _MANY or self._policy.newcomers_may_leave:
            self._order, self._scores = [], []

    def next_victim(self, now_s: float) -> int:
        """The row with the lowest score, or NO_ROW. The row stays until `discard`.

        Sets `retention` to its score; a policy that keeps its order gives none.
        """
        if self._asks_policy:
            begins, self._begins = self._begins, False
            return self._policy.next_to_leave(self._items, self.tier, self._place, begins)
        order = self._order
        if order:
            place, last = self._place, self._row_epochs.last
            while order:
                row = order.pop()
                self.retention = self._scores.pop()
                if place[row] >= 0 and last[row] < self._epoch:
                    return row
        if not self.count:
            return NO_ROW
        self._rank(now_s)
        self.retention = self._scores.pop()
        return self._order.pop()

    def put_back(self, row: int, score: float) -> None:
        """The last victim was evicted in part, or not at all: it stays the next victim."""
        if self._asks_policy:
            return
        self._order.append(row)
        self._scores.append(score)

    def _rank(self, now_s: float) -> None:
        rows = self._rows[: self.count]
        scores = self._policy.retention(self._items, rows, self.tier, now_s)
        if len(rows) > _MANY:
            few = scores.argpartition(len(rows) // _SHARE)[: len(rows) // _SHARE]
            rows, scores = rows[few], scores[few]
        ranked = scores.argsort(kind="stable")[::-1]
        self._order = rows[ranked].tolist()
        self._scores = scores[ranked].tolist()
        self._row_epochs.epoch += 1
        self._epoch = self._row_epochs.epoch


class CountedSpace(TierSpace):
    """Counts bytes, and knows of no rows: for a store that chooses the victims itself. It takes no memory per row."""

    def __init__(self, tier: TierName, capacity_bytes: int, items: ItemTable, policy: Placement) -> None:
        super().__init__(tier, capacity_bytes, ItemTable(0, items.conditions), policy, RowEpochs(0))

    def grow(self, row_count: int) -> None:
        pass

    def add(self, row: int) -> None:
        pass

    def discard(self, row: int) -> None:
        pass
