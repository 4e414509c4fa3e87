"""How likely an event is at each age: learned from the ages at which it came, and at which it had not come yet.

The hazard (the rate of the event among those for which it has not come) by age, in bins that are equal in the
logarithm of the age: from milliseconds to days with ninety numbers. What is still waited for counts as well
as what came (Nelson's estimator: events over time at risk), else whoever never returns would seem not to exist.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS_PER_OCTAVE = 4
_FIRST_OCTAVE = -5  # The first bin ends at 2**-5 seconds, the last begins at 2**17 (a day and a half).
_OCTAVES = 22
BIN_COUNT = _OCTAVES * BINS_PER_OCTAVE + 2

#: Where each bin begins, in seconds, and how long it is. The last one has no end; it counts as one of ten octaves.
BEGINS: Floats = np.concatenate(
    [[0.0], 2.0 ** (_FIRST_OCTAVE + np.arange(_OCTAVES * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)]
)
WIDTHS: Floats = np.diff(BEGINS, append=BEGINS[-1] * 1024)


def bin_of(age_s: float) -> int:
    if age_s <= BEGINS[1]:
        return 0
    return min(int((math.log2(age_s) - _FIRST_OCTAVE) * BINS_PER_OCTAVE) + 1, BIN_COUNT - 1)


def places_of(ages_s: Floats) -> Floats:
    """Ages as bins and parts of bins, so that the middle of a bin is its number: where to read between bins."""
    places: Floats = np.log2(np.maximum(ages_s, BEGINS[1] / 2))
    places *= BINS_PER_OCTAVE
    places -= _FIRST_OCTAVE * BINS_PER_OCTAVE - 0.5
    return np.minimum(np.maximum(places, 0.0), BIN_COUNT - 1.001)


def bins_of(ages_s: Floats) -> Ints:
    octaves = np.log2(np.maximum(ages_s, BEGINS[1] / 2)) - _FIRST_OCTAVE
    bins: Ints = np.clip(np.floor(octaves * BINS_PER_OCTAVE) + 1, 0, BIN_COUNT - 1).astype(np.int64)
    return bins


_LEAN_PASSED = 16.0  # For each event.
_LEAN = 8.0  # Events: a bin with as many believes its neighbours, and a class all classes, as much as itself.


class Survival:
    """The hazard of one event in a few classes; each leans on all of them together while it has seen little."""

    def __init__(self, classes: int, prior: Floats, memory: float = 4096.0) -> None:
        """`prior` is the hazard before anything was seen, in events a second; events older than the last
        `memory` ones fade."""
        self._prior = prior
        self._memory = memory
        self._came = np.zeros((classes, BIN_COUNT))
        self._ceased = np.zeros((classes, BIN_COUNT))
        self._within_s = np.zeros((classes, BIN_COUNT))  # Time at risk in the bin in which each one ended.
        self.events = 0  # Since the start.
        self._faded_at = 0

    def came(self, in_class: int, age_s: float, weight: float = 1.0) -> None:
        """The event came at this age. It counts `weight` times, 1 in the mean."""
        at = bin_of(age_s)
        self._came[in_class, at] += weight
        self._within_s[in_class, at] += weight * (age_s - BEGINS[at])
        self.events += 1

    def ceased(self, in_class: int, age_s: float, weight: float = 1.0) -> None:
        """It had not come at this age, and nobody will know when it does."""
        at = bin_of(age_s)
        self._ceased[in_class, at] += weight
        self._within_s[in_class, at] += weight * (age_s - BEGINS[at])

    def quantile(self, share: float) -> float:
        """The age below which `share` of the events came; 0 while there was none."""
        came = np.cumsum(self._came.sum(axis=0))
        return BEGINS.item(int(np.searchsorted(came, share * came[-1], side="right"))) if came[-1] else 0.0

    def weight(self, since_events: Ints) -> Floats:
        """What one that waits since there were so many events counts beside a new one: they fade alike."""
        return np.exp((since_events - self.events) / self._memory)

    def hazards(self, classes: Ints, ages_s: Floats, weights: Floats) -> Floats:
        """Events a second, by class and bin, with those that wait now (their classes, ages, weights)."""
        self._fade()
        bins = bins_of(ages_s)
        flat = classes * BIN_COUNT + bins
        count = self._came.size
        waiting = np.bincount(flat, weights, count).reshape(self._came.shape)
        waiting_s = np.bincount(flat, weights * (ages_s - BEGINS[bins]), count).reshape(self._came.shape)

        ended = self._came + self._ceased + waiting
        outlived = np.cumsum(ended[:, ::-1], axis=1)[:, ::-1] - ended  # Whoever was at risk through the whole bin.
        passed = outlived + (self._within_s + waiting_s) / WIDTHS  # Time at risk, in lengths of the bin.
        came, everyone = self._came.sum(axis=0), passed.sum(axis=0)
        rough = _rate(_blurred(came), _blurred(everyone), self._prior, 0.5)
        return _rate(self._came, passed, _rate(came, everyone, rough, _LEAN), _LEAN)

    def _fade(self) -> None:
        kept = math.exp((self._faded_at - self.events) / self._memory)
        self._faded_at = self.events
        for counts in (self._came, self._ceased, self._within_s):
            counts *= kept


def _rate(came: Floats, passed: Floats, prior: Floats, prior_events: float) -> Floats:
    """Events over time at risk, with so many events more as `prior` would have had them, or as few as that would
    have had among some that passed the bin."""
    prior_passed = np.minimum(prior_events / (prior * WIDTHS), _LEAN_PASSED * prior_events)
    rate: Floats = (came / WIDTHS + prior_passed * prior) / (passed + prior_passed)
    return rate


def _blurred(values: Floats) -> Floats:
    """Each bin mixed with its neighbours."""
    padded = np.concatenate([values[..., :1], values, values[..., -1:]], axis=-1)
    mixed: Floats = 0.25 * padded[..., :-2] + 0.5 * padded[..., 1:-1] + 0.25 * padded[..., 2:]
    return mixed
