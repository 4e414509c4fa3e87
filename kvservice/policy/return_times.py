"""Predicts when an item is used again: learned online, per item and over all items.

The model is an accelerated failure time model with two parts. Each item has a factor: how slow it is relative to the
others. A regression of the logarithm of the gaps between uses estimates it from the item's own gaps so far, the
length of the last answer (reading takes time), and the number of uses. The hazard by age, in units of that factor, is
kept in classes by the number of uses; it also covers the share of items that never return.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy.items import grown
from kvservice.policy.survival import BEGINS, BIN_COUNT, WIDTHS, Floats, Survival, bin_of

CLASSES = 4  # 1, 2 and 3, 4 to 7, 8 or more uses.
_CLASS_OF = tuple(max(uses.bit_length() - 1, 0) for uses in range(1 << (CLASSES - 1)))  # By uses.

#: The prior: the longer ago the last use, the less likely the next, as LRU assumes. 5 % return in each bin.
RECENCY: Floats = 0.05 / WIDTHS
_MEMORY = 4096.0  # Returns.
_FEATURES = 3
_PRIOR_STRENGTH = 16.0  # Strength of the ridge prior "no effect", in returns.
_LEAST_GAP_S = BEGINS.item(1)
_LOG_RANGE = 3.0  # Gaps further than this from the mean, in log units, are clipped.


class _Columns(NamedTuple):
    since_s: memoryview[float]
    factor: memoryview[float]
    in_class: memoryview[int]
    since_events: memoryview[int]
    value: memoryview[float]
    gaps: memoryview[float]
    log_gaps: memoryview[float]
    pace: memoryview[float]
    answer: memoryview[float]
    uses: memoryview[float]


class ReturnTimes:
    """The return times of all items. A row is an item; `forgotten` resets it."""

    def __init__(self, row_count: int, learning: bool = True) -> None:
        self._learning = learning
        self.survival = Survival(CLASSES, RECENCY, _MEMORY)
        self.hazards: Floats = np.broadcast_to(RECENCY, (CLASSES, BIN_COUNT)).copy()
        self.typical_s = 60.0  # The geometric mean of the times until items came back.
        self.since_s = np.full(row_count, math.nan)  # Start of the item's age; NaN while the item is not waiting.
        self.factor = np.ones(row_count)
        self.in_class = np.zeros(row_count, np.int8)
        self._since_events = np.zeros(row_count, np.int64)
        self._value = np.ones(row_count, np.float32)
        self._mean_value = 0.0
        self._gaps = np.zeros(row_count, np.float32)
        self._log_gaps = np.zeros(row_count, np.float32)  # Their sum.
        self._pace, self._answer, self._uses = (np.zeros(row_count, np.float32) for _ in range(_FEATURES))
        self._view()
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
        self._pace, self._answer = grown(self._pace, row_count, 0.0), grown(self._answer, row_count, 0.0)
        self._uses = grown(self._uses, row_count, 0.0)
        self._view()

    def _view(self) -> None:
        """Views of the arrays: access to single elements is about three times as fast as through NumPy."""
        self._at = _Columns._make(
            array.data
            for array in (
                self.since_s,
                self.factor,
                self.in_class,
                self._since_events,
                self._value,
                self._gaps,
                self._log_gaps,
                self._pace,
                self._answer,
                self._uses,
            )
        )

    def split(self, row: int, front_row: int) -> None:
        """`front_row` has returned as often as `row`, and waits as long."""
        column: Any
        for column in self._at:
            column[front_row] = column[row]

    def start_waiting(self, row: int, uses: int, answer_tokens: int, now_s: float, value: float = 1.0) -> None:
        """The item's use has ended, so its age is 0 now. `answer_tokens` 0: not known. `value`: its weight."""
        at = self._at
        at.since_s[row] = now_s
        at.in_class[row] = _CLASS_OF[uses] if uses < len(_CLASS_OF) else CLASSES - 1
        if not self._learning:
            return
        events = self.survival.event_count
        at.since_events[row] = events
        at.value[row] = value
        self._mean_value += (value - self._mean_value) / (events + 1.0 if events < _MEMORY else _MEMORY)
        gaps = at.gaps[row]
        means, effects = self._means, self._effects
        at.pace[row] = pace = (at.log_gaps[row] - gaps * means[_FEATURES]) / (gaps + 1.0)
        at.uses[row] = used = math.log(uses) if uses > 1 else 0.0
        if answer_tokens:
            at.answer[row] = answer = math.log1p(answer_tokens)
        else:
            at.answer[row], answer = 0.0, means[1]  # It has no effect.
        log_factor = effects[0] * (pace - means[0]) + effects[1] * (answer - means[1]) + effects[2] * (used - means[2])
        if log_factor > _LOG_RANGE:
            log_factor = _LOG_RANGE
        elif log_factor < -_LOG_RANGE:
            log_factor = -_LOG_RANGE
        at.factor[row] = math.exp(log_factor)

    def record_return(self, row: int, now_s: float, called_at_s: float = math.nan) -> None:
        """A request for the item arrived at `now_s`. After a tool call, the time until then says nothing of users."""
        at = self._at
        since_s = at.since_s[row]
        at.since_s[row] = math.nan
        if since_s != since_s or not self._learning:
            return
        if called_at_s == called_at_s:
            self.survival.record_censored(at.in_class[row], (called_at_s - since_s) / at.factor[row], self._weight(row))
            return
        age_s = now_s - since_s
        self.survival.record_event(at.in_class[row], age_s / at.factor[row], self._weight(row))
        log_gap = math.log(max(age_s, _LEAST_GAP_S))
        if self.survival.event_count > _PRIOR_STRENGTH:
            typical = self._means[_FEATURES]
            log_gap = min(max(log_gap, typical - _LOG_RANGE), typical + _LOG_RANGE)
        self._seen.append((1.0, at.pace[row], at.answer[row], at.uses[row], log_gap))
        at.gaps[row] += 1.0
        at.log_gaps[row] += log_gap

    def forgotten(self, row: int, now_s: float) -> None:
        """The row will be reused for another item."""
        at = self._at
        since_s = at.since_s[row]
        if self._learning and since_s == since_s:
            self.survival.record_censored(at.in_class[row], (now_s - since_s) / at.factor[row], self._weight(row))
        at.since_s[row] = math.nan
        at.factor[row] = 1.0
        at.gaps[row] = at.log_gaps[row] = 0.0

    def _weight(self, row: int) -> float:
        return self._at.value[row] / (self._mean_value or 1.0)

    def is_waiting(self, row: int) -> bool:
        """Whether the item has an age."""
        since_s = self._at.since_s[row]
        return since_s == since_s

    def class_and_factor(self, row: int) -> tuple[int, float]:
        """The item's class, and its factor."""
        return self._at.in_class[row], self._at.factor[row]

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
        self.hazards = self.survival.hazards(
            self.in_class[waiting].astype(np.int64), self.ages(waiting, now_s), weights
        )
        self._regress()

    def counts(self) -> list[Floats]:
        """What was counted, as arrays to copy from and to."""
        return [*self.survival.counts(), self._moments]

    def _regress(self) -> None:
        if self._seen:
            seen = np.array(self._seen)
            self._seen.clear()
            answers = seen[:, 2]  # Where that is unknown, it is 0, and then the mean of the others.
            answers[answers == 0] = answers[answers > 0].mean() if (answers > 0).any() else self._means[1]
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
