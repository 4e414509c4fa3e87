"""The scores of items, as `foresight` ranks them: what a use saves per byte, times the rate of uses that find it.

Scores are kept in columns, by the item's row: those of items that were just used are computed at once, one by one;
scans compute those of many rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy import hint_times, return_times
from kvservice.policy.hint_times import HintTimes
from kvservice.policy.items import Conditions, ItemTable, grown
from kvservice.policy.queue_waits import QueueWaits
from kvservice.policy.read_budget import ReadBudget
from kvservice.policy.return_times import ReturnTimes
from kvservice.policy.saved_time import SavedTime
from kvservice.policy.scores import FETCH, HOLD, KEEP, LATER, Scores
from kvservice.policy.survival import Floats, Ints, places_of

_LEAST_RATE = 1e-30  # Returns per second that count as never.
_SOON_SHARE = 0.5  # Tools that most often end within this share of a typical return time end soon.
_LEAST_DENSE = 1e-300  # What a use saves per byte.
_UNLIKELY = 0.02  # Expected returns within the typical time below which an item is not read ahead.
_LATER_USE = 1e-13  # Breaks ties: by recency, so that a prefix scores above its suffix.
LEAST_S = 1e-6  # The time until a request that is about to run.


class _Columns(NamedTuple):
    """Views of the columns: access to an element takes a third of the time of NumPy's."""

    in_dram: memoryview[float]
    on_ssd: memoryview[float]
    late: memoryview[float]


class ItemScores:
    """The scores of all items in both tiers, from what is learned of their returns."""

    def __init__(
        self,
        row_count: int,
        returns: ReturnTimes,
        hints: HintTimes,
        waits: QueueWaits,
        reads: ReadBudget,
        conditions: Conditions,
    ) -> None:
        self._returns, self._hints, self._waits, self._reads = returns, hints, waits, reads
        self._tables = Scores(returns.hazards, hints.hazards)
        self._saved = SavedTime.of(conditions)
        self.in_dram = np.zeros(row_count)
        self.on_ssd = np.zeros(row_count)
        self._late = np.ones(row_count, np.float32)  # Probability that a read begun at the request ends too late.
        self._view()

    def _view(self) -> None:
        self.at = _Columns._make(array.data for array in (self.in_dram, self.on_ssd, self._late))

    def grow(self, row_count: int) -> None:
        self.in_dram, self.on_ssd = grown(self.in_dram, row_count, 0.0), grown(self.on_ssd, row_count, 0.0)
        self._late = grown(self._late, row_count, 1.0)
        self._view()

    def split(self, row: int, front_row: int) -> None:
        for array in (self.in_dram, self.on_ssd, self._late):
            array[front_row] = array[row]

    def forgotten(self, row: int) -> None:
        at = self.at
        at.in_dram[row] = at.on_ssd[row] = 0.0
        at.late[row] = 1.0

    def learn(self) -> None:
        """What is known of returns has changed."""
        self._tables.learn(self._returns.hazards, self._hints.hazards)

    def rates_changed(self, conditions: Conditions) -> None:
        """The engine's or the SSD's rates may have changed."""
        self._saved = SavedTime.of(conditions)

    def dense(self, items: ItemTable, rows: Rows, sizes: Ints) -> tuple[Floats, Floats]:
        """What a use saves per byte: in DRAM, and where an item that is evicted is lost. `sizes` are above 0."""
        return self._saved.per_bytes(sizes, items.value[rows], items.conditions.ssd_capacity_bytes > 0)

    def dense_of(self, size: int, value: float) -> float:
        """What a use of one item in DRAM saves per byte, if SSD has the item too."""
        return self._saved.per_byte(size or 1, value, True)[0]

    def of_queued(self, items: ItemTable, rows: Rows, queue_seq: Ints, window: int, lost: bool) -> Floats:
        """A queued request is a hit at a known time. An item that can still be read in time scores the read's price:
        not one of the first `window` requests, and not if it is `lost` when it is evicted.
        """
        conditions = items.conditions
        ahead = queue_seq - conditions.served
        coming_s = np.maximum(ahead * (1 / conditions.turns_per_s), LEAST_S)
        dense = self.dense(items, rows, np.maximum(items.size_bytes[rows], 1))[lost]
        worth: Floats = dense / coming_s
        worth *= 1 + _LATER_USE * items.access_seq[rows]
        if not lost:
            far = (ahead >= window).nonzero()[0]
            if len(far):
                worth[far] *= np.minimum(self._reads.per_density / np.maximum(dense[far], _LEAST_DENSE), 1.0)
        return worth

    def stored(self, conditions: Conditions, row: int, size: int, value: float, access_seq: int) -> None:
        """Score an item that was just used: what `score` gives at age 0."""
        at = self.at
        dense, dense_lost = self._saved.per_byte(size, value, conditions.ssd_capacity_bytes > 0)
        in_class, factor = self._returns.class_and_factor(row)
        unannounced = self._hints.unannounced_share * at.late[row]
        hold, keep = self._tables.at_once(in_class, self._reads.per_density / (dense or _LEAST_DENSE) / unannounced)
        hold *= unannounced
        wait_s = conditions.queued / conditions.turns_per_s
        later = 1 + _LATER_USE * access_seq
        at.in_dram[row] = dense * later / (factor / (hold or _LEAST_RATE) + wait_s)
        at.on_ssd[row] = dense_lost * later / (factor / (keep or _LEAST_RATE) + wait_s)

    def score(
        self,
        items: ItemTable,
        rows: Rows,
        sizes: Ints,
        dense: tuple[Floats, Floats],
        hinted_every_s: float,
        now_s: float,
    ) -> tuple[Floats, Floats]:
        """Score `rows`. Returns the scores of reading each ahead now, and at the best later time.

        `dense` is as from `dense`. Hinted items are looked at again after `hinted_every_s`.
        """
        conditions = items.conditions
        returns, hints = self._returns, self._hints
        byte_s = 1 / conditions.ssd_bytes_per_s
        reading_s = (sizes - items.dram_bytes[rows]) * byte_s + conditions.read_backlog_s
        factor = returns.factor[rows]
        age_s = now_s - returns.since_s[rows]
        places = places_of(np.array((age_s / factor, (age_s + reading_s) / factor, sizes * byte_s)))
        late = self._waits.shorter(places[2])
        self._late[rows] = late
        price = self._reads.per_density / np.maximum(dense[0], _LEAST_DENSE) / late

        unannounced = hints.unannounced_share
        rates = self._tables.rates(returns.in_class[rows].astype(np.int64), places[:2], price / unannounced)
        rates[HOLD:] *= unannounced
        rates /= factor
        if hints.count:
            hinted = (hints.in_class[rows] != hint_times.NONE).nonzero()[0]
            if len(hinted):
                ready_s = reading_s[hinted] + hinted_every_s
                self._score_hinted(rows[hinted], hinted, ready_s, price[hinted], rates, now_s)
        rates[HOLD:] *= late
        worth = np.maximum(rates, _LEAST_RATE)
        np.divide(1, worth, out=worth)
        worth += conditions.queued / conditions.turns_per_s
        np.divide(1, worth, out=worth)
        worth *= 1 + _LATER_USE * items.access_seq[rows]
        self.on_ssd[rows] = worth[KEEP] * dense[1]
        worth[HOLD:] *= dense[0]
        self.in_dram[rows] = worth[HOLD]
        worth[FETCH:] *= rates[FETCH:] >= _UNLIKELY / returns.typical_s
        return worth[FETCH], worth[LATER]

    def _score_hinted(
        self, rows: Rows, places: Ints, ready_s: Floats, price: Floats, rates: Floats, now_s: float
    ) -> None:
        """Change the rates of the hinted `rows`, which are at `places` of `rates`, and would be read in `ready_s`."""
        returns, hints = self._returns, self._hints
        in_class = hints.in_class[rows].astype(np.int64)
        age_s = now_s - hints.since_s[rows]
        by_hint = self._tables.rates(
            return_times.CLASSES + in_class, places_of(np.array((age_s, age_s + ready_s))), price
        )
        doubtful = (by_hint[LATER] < rates[LATER, places]) & (in_class < hint_times.ENDED)
        for row in rows[doubtful].tolist():
            hints.expected.pop(row, None)
        # What a tool's end will bring back within seconds is not evicted, to be read again before that.
        soon = (age_s <= hints.most_s[in_class]) & (hints.most_s[in_class] < _SOON_SHARE * returns.typical_s)
        called = np.flatnonzero(soon & (in_class >= hint_times.TOOL_CALL) & (in_class < hint_times.ENDED))
        by_hint[HOLD, called] = np.maximum(by_hint[HOLD, called], by_hint[LATER, called])
        rates[:, places] = np.where(in_class >= hint_times.ENDED, by_hint, np.maximum(by_hint, rates[:, places]))
