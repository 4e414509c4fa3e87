"""Predicts durations from earlier ones: a few terms are fitted to a bounded number of observations."""

from __future__ import annotations

import math
from collections import deque
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_OF_ONE_ORDER = 8  # Observations kept of one order of magnitude: many small ones do not push out the large.
_RECENT = 5  # Their median is the present speed: two outliers of five do not change it.
_ROUNDS = 5  # Of reweighting, by which least squares become least absolute values: outliers count less.
_SAME = 1e-3  # Relative errors below this are all the same.
_SINGULAR = 1e-9

Terms = tuple[float, ...]
Array = NDArray[np.float64]


class _Observation(NamedTuple):
    terms: Terms
    seconds: float


class Fit:
    """``seconds = level * sum(coefficient * term)`` with no coefficient below 0. Not thread-safe.

    The coefficients come from all observations that are kept, the level from the last few. So a change of
    conditions is followed after three observations, for what was not seen since then too, and one outlier
    changes little. While all observations are of one order of magnitude, the first term alone explains them.
    """

    def __init__(self, fixed_s_max: float = 0.0) -> None:
        """`fixed_s_max`: while the observations do not separate the terms, up to this part of the shortest
        duration, and at most half of it, is attributed to the second term, which must be the constant 1.
        """
        self._fixed_s_max = fixed_s_max
        self._kept: dict[tuple[int, ...], deque[_Observation]] = {}
        self._recent: deque[_Observation] = deque(maxlen=_RECENT)
        self._coefficients: Array | None = None
        self._level = 1.0

    @property
    def is_known(self) -> bool:
        return self._coefficients is not None

    def observe(self, order: tuple[int, ...], terms: Terms, seconds: float) -> None:
        """`order` is the observation's order of magnitude. Ignored if `seconds` is zero, negative or not finite."""
        if not (0 < seconds < math.inf and terms[0] > 0):
            return
        observation = _Observation(terms, seconds)
        self._kept.setdefault(order, deque(maxlen=_OF_ONE_ORDER)).append(observation)
        self._recent.append(observation)
        self._coefficients = self._fitted(len(terms))
        self._level = 1.0
        self._level = float(np.median([each.seconds / self.seconds(each.terms) for each in self._recent]))

    def seconds(self, terms: Terms) -> float:
        """The predicted seconds. Call it only if `is_known`."""
        assert self._coefficients is not None, "nothing was observed"
        return self._level * float(self._coefficients @ terms)

    def forget(self) -> None:
        self._kept.clear()
        self._recent.clear()
        self._coefficients = None

    def _fitted(self, terms: int) -> Array:
        observations = [each for kept in self._kept.values() for each in kept]
        rows = np.array([each.terms for each in observations])
        measured = np.array([each.seconds for each in observations])
        if len(self._kept) == 1:
            return self._of_one_order(rows, measured)
        found = np.zeros(terms)
        found[0] = np.median(measured / rows[:, 0])
        for _ in range(_ROUNDS):
            expected = rows @ found
            scale = np.maximum(measured, expected)  # Five times too fast is as far off as five times too slow.
            errors = np.abs(measured - expected) / scale
            weights = 1 / np.maximum(errors, _SAME) / scale**2
            found = _not_negative(rows, measured, weights, min(terms, len(self._kept)))
        return found

    def _of_one_order(self, rows: Array, measured: Array) -> Array:
        found = np.zeros(rows.shape[1])
        fixed_s = min(self._fixed_s_max, float(measured.min()) / 2)
        found[0] = np.median((measured - fixed_s) / rows[:, 0])
        if fixed_s:
            found[1] = fixed_s
        return found


def _not_negative(rows: Array, measured: Array, weights: Array, terms_max: int) -> Array:
    """The coefficients of the least weighted squares of ``rows @ coefficients - measured``, none of them negative and
    at most so many used.

    There are few terms: every choice of them is tried, each by its normal equations.
    """
    unit = np.maximum(rows.max(axis=0), np.finfo(float).tiny)
    scaled = rows / unit
    product, right = ((scaled.T * weights) @ scaled).tolist(), ((scaled.T * weights) @ measured).tolist()
    total = float(weights @ measured**2)
    best, best_error = np.zeros(rows.shape[1]), math.inf
    for count in range(1, terms_max + 1):
        for chosen in combinations(range(rows.shape[1]), count):
            some = _solved([[product[row][column] for column in chosen] + [right[row]] for row in chosen])
            if some is None or min(some) < 0:
                continue
            error = total - sum(each * right[row] for each, row in zip(some, chosen, strict=True))
            if error < best_error * (1 - _SAME):  # More terms only if they explain more.
                best, best_error = np.zeros(rows.shape[1]), error
                best[list(chosen)] = some
    return np.asarray(best / unit)


def _solved(equations: list[list[float]]) -> list[float] | None:
    """Gauss-Jordan for a small positive definite matrix, the right side as its last column. None if it has
    no unique solution.
    """
    diagonals = [equation[row] for row, equation in enumerate(equations)]
    for pivot, equation in enumerate(equations):
        diagonal = equation[pivot]
        if diagonal <= _SINGULAR * diagonals[pivot]:
            return None
        equation[:] = [value / diagonal for value in equation]
        for other in equations:
            if other is not equation and (factor := other[pivot]):
                other[:] = [value - factor * mine for value, mine in zip(other, equation, strict=True)]
    return [equation[-1] for equation in equations]
