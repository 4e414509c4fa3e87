"""When items come back: learned online, per item and overall.

Two parts. A factor for each item, how slow it is beside the others, by a regression of the logarithm of the times
between its uses: on its own pace so far, the length of the last answer (reading takes time), and how often it was
used (an accelerated failure time model). And the hazard by age in units of that factor, in classes by the number
of uses, which also knows the share that never returns.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy.survival import BEGINS, BIN_COUNT, WIDTHS, Floats, Survival, bin_of

CLASSES = 4  # 1, 2 and 3, 4 to 7, 8 or more uses.

#: Before anything was seen: the longer ago, the less likely, as recency has it. In each bin, a twentieth returns.
RECENCY: Floats = 0.05 / WIDTHS
_MEMORY = 4096.0  # Returns.
_FEATURES = 3
_LEAN = 16.0  # The regression believes in no effect as if it had seen so many returns without one.
_LOG_RANGE = 3.0  # A gap that is longer or shorter than the average by more counts as if it were so much.


class ReturnTimes:
    """What was seen of all items' returns. Rows are items; one that is forgotten begins anew."""

    def __init__(self, row_count: int, learning: bool = True) -> None:
        self._learning = learning
        self.survival = Survival(CLASSES, RECENCY, _MEMORY)
        self.hazards: Floats = np.broadcast_to(RECENCY, (CLASSES, BIN_COUNT)).copy()
        self.typical_s = 60.0  # The geometric mean of the times until items came back.
        self.since_s = np.full(row_count, math.nan)  # From when the item's age counts; NaN: it is not waited for.
        self.factor = np.ones(row_count)
        self.in_class = np.zeros(row_count, np.int64)
        self._since_events = np.zeros(row_count, np.int64)
        self._value = np.ones(row_count)
        self._mean_value = 0.0
        self._gaps = np.zeros(row_count)
        self._log_gaps = np.zeros(row_count)  # Their sum.
        self._features = np.zeros((row_count, _FEATURES))
        self._moments = np.zeros((_FEATURES + 2, _FEATURES + 2))  # Of 1, the features, and the logarithm of the gap.
        self._seen: list[tuple[float, ...]] = []  # What these do not know of yet.
        self._means = [0.0] * (_FEATURES + 1)
        self._effects = [0.0] * _FEATURES

    def waits(self, row: int, uses: int, answer_tokens: int, now_s: float, value: float = 1.0) -> None:
        """A use of the item has ended: its age is 0. Items count by the value of a use, as hits do."""
        self.since_s[row] = now_s
        self.in_class[row] = min(max(uses, 1).bit_length() - 1, CLASSES - 1)
        if not self._learning:
            return
        self._since_events[row] = self.survival.events
        self._value[row] = value
        self._mean_value += (value - self._mean_value) / min(self.survival.events + 1.0, _MEMORY)
        gaps = self._gaps.item(row)
        pace = (self._log_gaps.item(row) - gaps * self._means[_FEATURES]) / (gaps + 1.0)
        features = (pace, math.log1p(answer_tokens), math.log(max(uses, 1)))
        self._features[row] = features
        log_factor = 0.0
        for feature, mean, effect in zip(features, self._means, self._effects, strict=False):
            log_factor += effect * (feature - mean)
        self.factor[row] = math.exp(min(max(log_factor, -_LOG_RANGE), _LOG_RANGE))

    def came(self, row: int, now_s: float) -> None:
        """A request for the item came."""
        since_s = self.since_s.item(row)
        self.since_s[row] = math.nan
        if math.isnan(since_s) or not self._learning:
            return
        age_s = now_s - since_s
        self.survival.came(self.in_class.item(row), age_s / self.factor.item(row), self._weight(row))
        log_gap = math.log(max(age_s, BEGINS[1]))
        if self.survival.events > _LEAN:
            typical = self._means[_FEATURES]
            log_gap = min(max(log_gap, typical - _LOG_RANGE), typical + _LOG_RANGE)
        self._seen.append((1.0, *self._features[row].tolist(), log_gap))
        self._gaps[row] += 1.0
        self._log_gaps[row] += log_gap

    def forgotten(self, row: int, now_s: float) -> None:
        """Whoever gets the row next is another item."""
        since_s = self.since_s.item(row)
        if self._learning and not math.isnan(since_s):
            age = (now_s - since_s) / self.factor.item(row)
            self.survival.ceased(self.in_class.item(row), age, self._weight(row))
        self.since_s[row] = math.nan
        self.factor[row] = 1.0
        self._gaps[row] = self._log_gaps[row] = 0.0

    def _weight(self, row: int) -> float:
        return self._value.item(row) / (self._mean_value or 1.0)

    def hazard(self, row: int, now_s: float) -> float:
        """Returns a second, of one that is waited for at its age; 0 where none is."""
        age_s = now_s - self.since_s.item(row)
        if math.isnan(age_s):
            return 0.0
        factor = self.factor.item(row)
        return self.hazards.item(self.in_class.item(row), bin_of(age_s / factor)) / factor

    def ages(self, rows: Rows, now_s: float) -> Floats:
        """In units of each item's own factor."""
        ages: Floats = (now_s - self.since_s[rows]) / self.factor[rows]
        return ages

    def learn(self, waiting: Rows, now_s: float) -> None:
        """Puts what was seen into `hazards` and into later factors. `waiting` are all rows that are waited for."""
        if not self._learning:
            return
        weights = self.survival.weight(self._since_events[waiting]) * self._value[waiting] / (self._mean_value or 1.0)
        self.hazards = self.survival.hazards(self.in_class[waiting], self.ages(waiting, now_s), weights)
        self._regress()

    def _regress(self) -> None:
        if not self._seen:
            return
        seen = np.array(self._seen)
        self._seen.clear()
        self._moments *= math.exp(-len(seen) / _MEMORY)
        self._moments += seen.T @ seen
        count = self._moments[0, 0]
        means = self._moments[0] / count
        spread = self._moments / count - np.outer(means, means)
        features = spread[1:-1, 1:-1]
        lean = np.diag(np.diag(features) * (_LEAN / count) + 1e-9)
        self._effects = np.linalg.solve(features + lean, spread[1:-1, -1]).tolist()
        self._means = means[1:].tolist()
        self.typical_s = math.exp(self._means[_FEATURES])
