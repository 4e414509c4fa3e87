"""Predicts when an item is used again: learned online, per item and over all items.

The model is an accelerated failure time model with two parts. Each item has a factor: how slow it is relative to the
others. A regression of the logarithm of the gaps between uses estimates it from the item's own gaps so far, the
length of the last answer (reading takes time), and the number of uses. The hazard by age, in units of that factor, is
kept in classes by the number of uses; it also covers the share of items that never return.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy.items import grown
from kvservice.policy.survival import BEGINS, BIN_COUNT, WIDTHS, Floats, Survival, bin_of

CLASSES = 4  # 1, 2 and 3, 4 to 7, 8 or more uses.

#: The prior: the longer ago the last use, the less likely the next, as LRU assumes. 5 % return in each bin.
RECENCY: Floats = 0.05 / WIDTHS
_MEMORY = 4096.0  # Returns.
_FEATURES = 3
_PRIOR_STRENGTH = 16.0  # Strength of the ridge prior "no effect", in returns.
_LOG_RANGE = 3.0  # Gaps further than this from the mean, in log units, are clipped.


class ReturnTimes:
    """The return times of all items. A row is an item; `forgotten` resets it."""

    def __init__(self, row_count: int, learning: bool = True) -> None:
        self._learning = learning
        self.survival = Survival(CLASSES, RECENCY, _MEMORY)
        self.hazards: Floats = np.broadcast_to(RECENCY, (CLASSES, BIN_COUNT)).copy()
        self.typical_s = 60.0  # The geometric mean of the times until items came back.
        self.since_s = np.full(row_count, math.nan)  # Start of the item's age; NaN while the item is not waiting.
        self.factor = np.ones(row_count)
        self.in_class = np.zeros(row_count, np.int64)
        self._since_events = np.zeros(row_count, np.int64)
        self._value = np.ones(row_count)
        self._mean_value = 0.0
        self._gaps = np.zeros(row_count)
        self._log_gaps = np.zeros(row_count)  # Their sum.
        self._features = np.zeros((row_count, _FEATURES))
        self._moments = np.zeros((_FEATURES + 2, _FEATURES + 2))  # Of 1, the features, and the logarithm of the gap.
        self._seen: list[tuple[float, ...]] = []  # Observations that `_moments` lacks.
        self._means = [0.0] * (_FEATURES + 1)
        self._effects = [0.0] * _FEATURES

    def grow(self, row_count: int) -> None:
        self.since_s = grown(self.since_s, row_count, math.nan)
        self.factor = grown(self.factor, row_count, 1.0)
        self.in_class = grown(self.in_class, row_count, 0)
        self._since_events = grown(self._since_events, row_count, 0)
        self._value = grown(self._value, row_count, 1.0)
        self._gaps = grown(self._gaps, row_count, 0.0)
        self._log_gaps = grown(self._log_gaps, row_count, 0.0)
        self._features = grown(self._features, row_count, 0.0)

    def split(self, row: int, front_row: int) -> None:
        """`front_row` has returned as often as `row`, and waits as long."""
        for array in (
            self.since_s,
            self.factor,
            self.in_class,
            self._since_events,
            self._value,
            self._gaps,
            self._log_gaps,
            self._features,
        ):
            array[front_row] = array[row]

    def start_waiting(self, row: int, uses: int, answer_tokens: int, now_s: float, value: float = 1.0) -> None:
        """The item's use has ended, so its age is 0 now. `value` is its weight in the estimate."""
        self.since_s[row] = now_s
        self.in_class[row] = min(max(uses, 1).bit_length() - 1, CLASSES - 1)
        if not self._learning:
            return
        self._since_events[row] = self.survival.event_count
        self._value[row] = value
        self._mean_value += (value - self._mean_value) / min(self.survival.event_count + 1.0, _MEMORY)
        gaps = self._gaps.item(row)
        pace = (self._log_gaps.item(row) - gaps * self._means[_FEATURES]) / (gaps + 1.0)
        features = (pace, math.log1p(answer_tokens), math.log(max(uses, 1)))
        self._features[row] = features
        log_factor = 0.0
        for feature, mean, effect in zip(features, self._means, self._effects, strict=False):
            log_factor += effect * (feature - mean)
        self.factor[row] = math.exp(min(max(log_factor, -_LOG_RANGE), _LOG_RANGE))

    def record_return(self, row: int, now_s: float, called_at_s: float = math.nan) -> None:
        """A request for the item arrived at `now_s`. After a tool call, the time until then says nothing of users."""
        since_s = self.since_s.item(row)
        self.since_s[row] = math.nan
        if math.isnan(since_s) or not self._learning:
            return
        if called_at_s == called_at_s:
            age = (called_at_s - since_s) / self.factor.item(row)
            self.survival.record_censored(self.in_class.item(row), age, self._weight(row))
            return
        age_s = now_s - since_s
        self.survival.record_event(self.in_class.item(row), age_s / self.factor.item(row), self._weight(row))
        log_gap = math.log(max(age_s, BEGINS[1]))
        if self.survival.event_count > _PRIOR_STRENGTH:
            typical = self._means[_FEATURES]
            log_gap = min(max(log_gap, typical - _LOG_RANGE), typical + _LOG_RANGE)
        self._seen.append((1.0, *self._features[row].tolist(), log_gap))
        self._gaps[row] += 1.0
        self._log_gaps[row] += log_gap

    def forgotten(self, row: int, now_s: float) -> None:
        """The row will be reused for another item."""
        since_s = self.since_s.item(row)
        if self._learning and not math.isnan(since_s):
            age = (now_s - since_s) / self.factor.item(row)
            self.survival.record_censored(self.in_class.item(row), age, self._weight(row))
        self.since_s[row] = math.nan
        self.factor[row] = 1.0
        self._gaps[row] = self._log_gaps[row] = 0.0

    def _weight(self, row: int) -> float:
        return self._value.item(row) / (self._mean_value or 1.0)

    def hazard(self, row: int, now_s: float) -> float:
        """The item's hazard at its age, in returns per second; 0 if it is not waiting."""
        age_s = now_s - self.since_s.item(row)
        if math.isnan(age_s):
            return 0.0
        factor = self.factor.item(row)
        return self.hazards.item(self.in_class.item(row), bin_of(age_s / factor)) / factor

    def ages(self, rows: Rows, now_s: float) -> Floats:
        """Ages of the items in units of each item's factor."""
        ages: Floats = (now_s - self.since_s[rows]) / self.factor[rows]
        return ages

    def learn(self, waiting: Rows, now_s: float) -> None:
        """Update `hazards` and the regression from the observations. `waiting`: every row that waits now."""
        if not self._learning:
            return
        weights = self.survival.weight(self._since_events[waiting]) * self._value[waiting] / (self._mean_value or 1.0)
        self.hazards = self.survival.hazards(self.in_class[waiting], self.ages(waiting, now_s), weights)
        self._regress()

    def counts(self) -> list[Floats]:
        """What was counted, as arrays to copy from and to."""
        return [*self.survival.counts(), self._moments]

    def _regress(self) -> None:
        if self._seen:
            seen = np.array(self._seen)
            self._seen.clear()
            self._moments *= math.exp(-len(seen) / _MEMORY)
            self._moments += seen.T @ seen
        count = self._moments[0, 0]
        if not count:
            return
        means = self._moments[0] / count
        spread = self._moments / count - np.outer(means, means)
        features = spread[1:-1, 1:-1]
        ridge = np.diag(np.diag(features) * (_PRIOR_STRENGTH / count) + 1e-9)
        self._effects = np.linalg.solve(features + ridge, spread[1:-1, -1]).tolist()
        self._means = means[1:].tolist()
        self.typical_s = math.exp(self._means[_FEATURES])
