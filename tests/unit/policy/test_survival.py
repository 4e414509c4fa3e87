"""Hazards by age, learned from events, from censored waits, and from running waits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvservice.policy.survival import (
    BEGINS,
    BIN_COUNT,
    BINS_PER_OCTAVE,
    WIDTHS,
    Floats,
    Survival,
    bin_of,
    bins_of,
    places_of,
)

PRIOR: Floats = 0.05 / WIDTHS
NOBODY = (np.empty(0, np.int64), np.empty(0), np.empty(0))


def survival(classes: int = 1, memory: float = 1e12) -> Survival:
    return Survival(classes, PRIOR, memory)


def middle(begin_s: float, end_s: float) -> NDArray[np.int64]:
    """The bins between these ages."""
    return np.flatnonzero((begin_s <= BEGINS) & (end_s >= BEGINS + WIDTHS))


@given(st.floats(0, 1e9))
def test_an_age_lies_in_its_bin(age_s: float) -> None:
    at = bin_of(age_s)
    assert BEGINS[at] * (1 - 1e-12) <= age_s <= (BEGINS[at] + WIDTHS[at]) * (1 + 1e-12) or at == BIN_COUNT - 1
    assert bins_of(np.array([age_s]))[0] == at
    assert abs(places_of(np.array([age_s]))[0] - at) <= 0.5 + 1e-6 or at in (0, BIN_COUNT - 1)


@settings(deadline=None, max_examples=25)
@given(mean_s=st.floats(1, 1000), seed=st.integers(0, 9))
def test_of_exponential_gaps_the_hazard_is_the_same_at_every_age(mean_s: float, seed: int) -> None:
    known = survival()
    for age_s in np.random.default_rng(seed).exponential(mean_s, 3000).tolist():
        known.record_event(0, age_s)
    usual = known.hazards(*NOBODY)[0, middle(mean_s / 8, mean_s * 2)] * mean_s
    assert usual.mean() == pytest.approx(1, abs=0.1) and (np.abs(usual - 1) < 0.5).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_hazard_of_uniform_gaps_rises_like_one_over_the_time_that_is_left(seed: int) -> None:
    known = survival()
    for age_s in np.random.default_rng(seed).uniform(10, 50, 8000).tolist():
        known.record_event(0, age_s)
    bins = middle(11, 40)
    learned = known.hazards(*NOBODY)[0, bins]
    begins, ends = BEGINS[bins], BEGINS[bins] + WIDTHS[bins]
    true = np.log((50 - begins) / (50 - ends)) / WIDTHS[bins]  # Its mean over the bin.
    assert learned == pytest.approx(true, rel=0.2)
    assert known.hazards(*NOBODY)[0, middle(1, 8)].max() < 0.05 * true.min(), "nothing comes before"


def test_who_never_returns_lowers_the_hazard_of_old_ages_and_hardly_that_of_young_ones() -> None:
    """Half of them never return: the remaining ones at an age determine the hazard."""
    random = np.random.default_rng(1)
    gaps_s = random.exponential(10.0, 4000)
    all_return, half_return = survival(), survival()
    for age_s in gaps_s.tolist():
        all_return.record_event(0, age_s)
        half_return.record_event(0, age_s)
    gone = np.zeros(4000, np.int64), np.full(4000, 1e5), np.ones(4000)
    young, old = middle(0.1, 0.5), middle(30, 60)
    every, half = all_return.hazards(*NOBODY)[0], half_return.hazards(*gone)[0]
    assert half[young] == pytest.approx(every[young] / 2, rel=0.1)
    assert (half[old] < every[old] / 5).all()


def test_what_is_cut_short_counts_as_long_as_it_was_seen() -> None:
    whole, cut = survival(), survival()
    for age_s in np.random.default_rng(2).exponential(20.0, 20_000).tolist():
        whole.record_event(0, age_s)
        if age_s < 15:
            cut.record_event(0, age_s)
        else:
            cut.record_censored(0, 15.0)
    seen = middle(2, 14)
    assert cut.hazards(*NOBODY)[0, seen] == pytest.approx(whole.hazards(*NOBODY)[0, seen], rel=0.1)


def test_before_anything_was_seen_it_believes_the_prior_and_soon_no_more() -> None:
    known = survival()
    assert known.hazards(*NOBODY)[0] == pytest.approx(PRIOR)
    random = np.random.default_rng(3)
    for age_s in random.uniform(20, 60, 200).tolist():
        known.record_event(0, age_s)
    learned = known.hazards(*NOBODY)[0]
    assert learned[middle(25, 50)].min() > 5 * learned[middle(2, 14)].max(), "200 returns overrule recency"


def test_a_class_that_was_hardly_seen_takes_after_all_of_them_and_one_that_was_seen_does_not() -> None:
    known = survival(classes=3)
    random = np.random.default_rng(4)
    for quick_s, slow_s in zip(random.exponential(5, 3000), random.exponential(50, 3000), strict=True):
        known.record_event(0, float(quick_s))
        known.record_event(1, float(slow_s))
    quick, slow, unseen = known.hazards(*NOBODY)[:, middle(2, 8)].mean(axis=1)
    assert quick == pytest.approx(0.2, rel=0.15) and slow == pytest.approx(0.02, rel=0.3)
    assert slow < unseen < quick


def test_old_events_fade() -> None:
    known = survival(memory=500.0)
    random = np.random.default_rng(5)
    for number, mean_s in enumerate((10.0, 100.0)):
        for index, age_s in enumerate(random.exponential(mean_s, 3000).tolist()):
            known.record_event(0, age_s)
            if index % 100 == 0:
                known.hazards(*NOBODY)
        assert known.hazards(*NOBODY)[0, middle(4, 16)].mean() == pytest.approx(1 / mean_s, rel=0.35), number


def test_those_that_wait_fade_with_the_events_that_passed_since() -> None:
    known = survival(memory=1000.0)
    for _ in range(1000):
        known.record_event(0, 1.0)
    assert known.weight(np.array([0, 1000], np.int32)) == pytest.approx([np.exp(-1), 1.0])


@given(st.integers(1, 8))
def test_in_other_units_of_time_the_hazards_are_the_same_ones(octaves: int) -> None:
    """The bins shift: only the prior depends on the unit of time."""
    ages_s = np.random.default_rng(6).lognormal(1.0, 0.5, 300)
    known, scaled = survival(), survival()
    for age_s in ages_s.tolist():
        known.record_event(0, age_s)
        scaled.record_event(0, age_s * 2**octaves)
    shift = octaves * BINS_PER_OCTAVE
    begin, end = bin_of(1.0), bin_of(16.0)
    assert scaled.hazards(*NOBODY)[0, begin + shift : end + shift] * 2**octaves == pytest.approx(
        known.hazards(*NOBODY)[0, begin:end]
    )


def test_the_quantile_of_what_came() -> None:
    known = survival()
    assert known.quantile(0.1) == 0.0
    for age_s in np.linspace(2, 5, 1000).tolist():
        known.record_event(0, age_s)
    assert 1.9 <= known.quantile(0.1) <= 2.4
