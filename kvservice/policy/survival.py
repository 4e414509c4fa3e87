"""Survival analysis: the hazard of an event by age, learned online from events and from censored waits.

The hazard is the rate of the event among the subjects that have not had it yet. Ages fall into bins of equal length in
the logarithm of the age: ninety bins cover milliseconds to days. The estimator is Nelson's, events over time at risk. A
subject that still waits adds time at risk; without it, subjects that never return would not count at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
_BEGIN: list[float] = BEGINS.tolist()
_FIRST_END_S = _BEGIN[1]
WIDTHS: Floats = np.diff(BEGINS, append=BEGINS[-1] * 1024)


def bin_of(age_s: float) -> int:
    if age_s <= _FIRST_END_S:
        return 0
    at = int((math.log2(age_s) - _FIRST_OCTAVE) * BINS_PER_OCTAVE) + 1
    return at if at < BIN_COUNT else BIN_COUNT - 1


def places_of(ages_s: Floats) -> Floats:
    """Ages as fractional bin numbers, for interpolation: the middle of a bin is the bin's number."""
    places: Floats = np.log2(np.maximum(ages_s, BEGINS[1] / 2))
    places *= BINS_PER_OCTAVE
    places -= _FIRST_OCTAVE * BINS_PER_OCTAVE - 0.5
    return np.minimum(np.maximum(places, 0.0), BIN_COUNT - 1.001)


def bins_of(ages_s: Floats) -> Ints:
    octaves = np.log2(np.maximum(ages_s, BEGINS[1] / 2)) - _FIRST_OCTAVE
    bins: Ints = np.clip(np.floor(octaves * BINS_PER_OCTAVE) + 1, 0, BIN_COUNT - 1).astype(np.int64)
    return bins


# The prior of a bin never counts as more time at risk than this, in lengths of the bin per event of its strength.
_PRIOR_AT_RISK_MAX = 16.0
# In events. With 8 events, a bin weighs its own rate and its neighbours' equally; a class likewise against all classes.
_PRIOR_STRENGTH = 8.0


class _Counts(NamedTuple):
    """Views of a `Survival`'s counts, one element after the other."""

    events: memoryview[float]
    censored: memoryview[float]
    within_s: memoryview[float]


class Survival:
    """The hazard of one event in a few classes. A class with few events is estimated mostly from all classes."""

    def __init__(self, classes: int, prior: Floats, memory: float = 4096.0) -> None:
        """`prior` is the hazard before the first event, in events per second, one value per bin. Events fade
        exponentially: one that is `memory` events old counts 1/e.
        """
        self._prior = prior
        self._memory = memory
        self._events = np.zeros((classes, BIN_COUNT))
        self._censored = np.zeros((classes, BIN_COUNT))
        self._within_s = np.zeros((classes, BIN_COUNT))  # Time at risk in the bin in which each wait ended.
        # Access to single elements through a view takes a third of the time. The arrays are only changed in place.
        self._at = _Counts._make(array.reshape(-1).data for array in self.counts())
        self.event_count = 0  # Since the start.
        self._faded_at = 0

    def record_event(self, in_class: int, age_s: float, weight: float = 1.0) -> None:
        """Record an event at this age. `weight` is its weight in the estimate; weights are 1 on average."""
        at = bin_of(age_s)
        place = in_class * BIN_COUNT + at
        self._at.events[place] += weight
        self._at.within_s[place] += weight * (age_s - _BEGIN[at])
        self.event_count += 1

    def record_censored(self, in_class: int, age_s: float, weight: float = 1.0) -> None:
        """Record that a subject was last observed at this age, without the event."""
        at = bin_of(age_s)
        place = in_class * BIN_COUNT + at
        self._at.censored[place] += weight
        self._at.within_s[place] += weight * (age_s - _BEGIN[at])

    def quantile(self, share: float) -> float:
        """The age in seconds below which `share` of the events are; 0 without events."""
        events = np.cumsum(self._events.sum(axis=0))
        return BEGINS.item(int(np.searchsorted(events, share * events[-1], side="right"))) if events[-1] else 0.0

    def quantiles(self, share: float) -> Floats:
        """By class, the age in seconds below which `share` of its events are; 0 for a class without events."""
        events = np.cumsum(self._events, axis=1)
        found: Floats = BEGINS[np.argmax(events >= share * events[:, -1:], axis=1)]
        return found * (events[:, -1] > 0)

    def counts(self) -> list[Floats]:
        """What was counted, as arrays to copy from and to."""
        return [self._events, self._censored, self._within_s]

    def restored(self, event_count: int) -> None:
        """The arrays of `counts` were filled with those of an earlier run, that had seen so many events."""
        self.event_count = self._faded_at = event_count

    def weight(self, since_events: NDArray[np.int64]) -> Floats:
        """Weights of subjects that have waited since `since_events` events. They fade as the events do."""
        faded: Floats = np.exp((since_events - self.event_count) / self._memory)
        return faded

    def hazards(self, classes: Ints, ages_s: Floats, weights: Floats) -> Floats:
        """The hazard in events per second, shape [class, bin].

        The arguments describe the subjects that wait now: one class, age and weight each.
        """
        self._fade()
        bins = bins_of(ages_s)
        flat = classes * BIN_COUNT + bins
        count = self._events.size
        waiting = np.bincount(flat, weights, count).reshape(self._events.shape)
        waiting_s = np.bincount(flat, weights * (ages_s - BEGINS[bins]), count).reshape(self._events.shape)

        ended = self._events + self._censored + waiting
        survivors = np.cumsum(ended[:, ::-1], axis=1)[:, ::-1] - ended  # At risk through the whole bin.
        at_risk = survivors + (self._within_s + waiting_s) / WIDTHS  # Time at risk, in lengths of the bin.
        events, all_at_risk = self._events.sum(axis=0), at_risk.sum(axis=0)
        rough = _rate(_smoothed(events), _smoothed(all_at_risk), self._prior, 0.5)
        return _rate(self._events, at_risk, _rate(events, all_at_risk, rough, _PRIOR_STRENGTH), _PRIOR_STRENGTH)

    def _fade(self) -> None:
        kept = math.exp((self._faded_at - self.event_count) / self._memory)
        self._faded_at = self.event_count
        for counts in (self._events, self._censored, self._within_s):
            counts *= kept


def _rate(events: Floats, at_risk: Floats, prior: Floats, prior_events: float) -> Floats:
    """Events over time at risk in each bin, mixed with `prior` at a strength of `prior_events` events."""
    prior_at_risk = np.minimum(prior_events / (prior * WIDTHS), _PRIOR_AT_RISK_MAX * prior_events)
    rate: Floats = (events / WIDTHS + prior_at_risk * prior) / (at_risk + prior_at_risk)
    return rate


def _smoothed(values: Floats) -> Floats:
    """Each bin averaged with its two neighbours, weights 1/4, 1/2, 1/4."""
    padded = np.concatenate([values[..., :1], values, values[..., -1:]], axis=-1)
    mixed: Floats = 0.25 * padded[..., :-2] + 0.5 * padded[..., 1:-1] + 0.25 * padded[..., 2:]
    return mixed
