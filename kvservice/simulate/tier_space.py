"""One tier's space, and the rows in it that may leave, worst first."""

from __future__ import annotations

import numpy as np

from kvservice.blocks import Rows, TierName
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.views import ints

NO_ROW = -1
#: From so many rows on, an order of victims serves more than one asking: a 64th of them.
_MANY = 256
_SHARE = 64


class RowEpochs:
    """When something last happened to a row, counted in orders of victims."""

    __slots__ = ("epoch", "last")

    def __init__(self, row_count: int) -> None:
        self.epoch = 0
        self.last = ints(np.zeros(row_count, np.int64))


class TierSpace:
    """Counts bytes, keeps the rows that nothing holds as a dense array, and names the next victim."""

    __slots__ = (
        "_epoch",
        "_items",
        "_order",
        "_place",
        "_policy",
        "_row_epochs",
        "_rows",
        "_scores",
        "_view",
        "capacity_bytes",
        "count",
        "retention",
        "tier",
        "used_bytes",
    )  # fmt: skip

    def __init__(
        self, tier: TierName, capacity_bytes: int, items: ItemTable, policy: Placement, row_epochs: RowEpochs
    ) -> None:
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0  # What is lent to promotions counts.
        self.retention = 0.0  # Of the last victim.
        self._items = items
        self._policy = policy
        self._row_epochs = row_epochs
        self._epoch = 0
        self.count = 0
        self._rows = np.empty(1024, np.int64)
        self._view = ints(self._rows)
        self._place = ints(np.full(items.row_count, NO_ROW, np.int32))
        self._order: list[int] = []  # The next victim is the last.
        self._scores: list[float] = []

    def add(self, row: int) -> None:
        """The row may leave from now on."""
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
        """The row is not here, or something holds it."""
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
        return self._rows[: self.count]

    def begin_eviction(self) -> None:
        """Begin to look for victims: with few rows, or where newcomers may be the worst, by what they are worth now."""
        if self.count <= _MANY or self._policy.newcomers_may_leave:
            self._order.clear()
            self._scores.clear()

    def next_victim(self, now_s: float) -> int:
        """The next victim, whose worth `retention` tells; NO_ROW where nothing may leave. It stays until discarded."""
        order, place, last = self._order, self._place, self._row_epochs.last
        while order:
            row = order.pop()
            retention = self._scores.pop()
            if place[row] >= 0 and last[row] < self._epoch:
                self.retention = retention
                return row
        if not self.count:
            return NO_ROW
        self._rank(now_s)
        row = order.pop()
        self.retention = self._scores.pop()
        return row

    def put_back(self, row: int) -> None:
        """The victim did not leave whole: it is still the next."""
        self._order.append(row)
        self._scores.append(self.retention)

    def _rank(self, now_s: float) -> None:
        rows = self.rows
        scores = self._policy.retention(self._items, rows, self.tier, now_s)
        if len(rows) > _MANY:
            few = np.argpartition(scores, len(rows) // _SHARE)[: len(rows) // _SHARE]
            rows, scores = rows[few], scores[few]
        ranked = np.argsort(scores, kind="stable")[::-1]
        self._order[:] = rows[ranked].tolist()
        self._scores[:] = scores[ranked].tolist()
        self._row_epochs.epoch += 1
        self._epoch = self._row_epochs.epoch
