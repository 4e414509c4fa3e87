"""Indices by age, beside brute force and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvservice.policy.survival import BEGINS, WIDTHS, Floats, bins_of
from kvservice.policy.worth import gittins_index, whittle_index
from kvservice.simulate.bounds import true_hazards
from kvservice.simulate.think_times import draw, people_mean_s

few_hazards = st.lists(st.floats(0.01, 3.0), min_size=1, max_size=5).map(lambda values: np.array([values]))


def ones(hazards: Floats) -> Floats:
    return np.ones(hazards.shape[1])


def best_mean_over_any_stop(hazards: list[float]) -> float:
    """Gittins' index at the first age, by trying every last age that is held."""
    best = 0.0
    for stop in range(1, len(hazards) + 1):
        there, returns, time = 1.0, 0.0, 0.0
        for hazard in hazards[:stop]:
            comes = 1 - np.exp(-hazard)
            returns += there * comes
            time += there * comes / hazard
            there *= 1 - comes
        best = max(best, returns / time)
    return best


@given(few_hazards)
def test_where_what_leaves_is_lost_the_index_is_the_best_mean_over_any_stop(hazards: Floats) -> None:
    index = gittins_index(hazards, ones(hazards))
    for at in range(hazards.shape[1]):
        assert index[0, at] == pytest.approx(best_mean_over_any_stop(hazards[0, at:].tolist()))


def value_of_plan(plan: tuple[bool, ...], began_in: bool, hazards: list[float], price: float, rent: float) -> float:
    """The value of holding the item at the ages where `plan` is true, with a fetch or an eviction between them."""
    value, there, is_in = 0.0, 1.0, began_in
    for held, hazard in zip(plan, hazards, strict=True):
        if held and not is_in:
            value -= there * price
        is_in = held
        comes = 1 - np.exp(-hazard)
        value += there * (comes - rent * comes / hazard) if held else -there * comes * price
        there *= 1 - comes
    return value


@given(few_hazards, st.sampled_from([0.01, 0.1, 0.5]))
def test_holding_pays_below_its_index_and_not_above(hazards: Floats, price: float) -> None:
    """Against every plan of ages to hold at: there are no more than 32."""
    hold, fetch = (table[0, 0] for table in whittle_index(hazards, np.array([price]), ones(hazards)))
    listed = hazards[0].tolist()

    def best(began_in: bool, first: bool, rent: float) -> float:
        plans = (plan for plan in itertools.product((False, True), repeat=len(listed)) if plan[0] == first)
        return max(value_of_plan(plan, began_in, listed, price, rent) for plan in plans)

    for index, began_in in ((hold[0], True), (fetch[0], False)):
        for rent, pays in ((index * 0.9, True), (index * 1.1 + 1e-3, False)):
            if index > 0 or not pays:
                assert (best(began_in, True, rent) >= best(began_in, False, rent) - 1e-9) == pays


@given(few_hazards, st.sampled_from([0.01, 0.3]))
def test_fetching_is_never_worth_more_than_holding(hazards: Floats, price: float) -> None:
    hold, fetch = whittle_index(hazards, np.array([price]), ones(hazards))
    assert (fetch <= hold + 1e-9).all()
    assert (hold >= hazards[:, None, :] * (1 - 1e-9)).all(), "to hold for a moment earns the hazard"


def test_when_reading_costs_next_to_nothing_the_index_is_the_hazard_itself() -> None:
    hazards = np.array([[0.1, 0.5, 2.0, 0.3]])
    hold, fetch = whittle_index(hazards, np.array([1e-9]), ones(hazards))
    assert hold[0, 0] == pytest.approx(hazards[0], rel=0.02)
    assert fetch[0, 0] == pytest.approx(hazards[0], rel=0.02)


def test_the_dearer_reading_is_the_more_is_held_between_two_likely_ages() -> None:
    hazards = np.array([[1.0, 0.05, 1.0]])
    hold, _ = whittle_index(hazards, np.array([0.01, 0.1, 1.0]), ones(hazards))
    valley = hold[0, :, 1]
    assert (np.diff(valley) > 0).all() and valley[0] < 0.2


def test_of_a_constant_hazard_every_age_is_worth_the_same() -> None:
    hazards = np.full((1, 6), 0.2)
    assert gittins_index(hazards, ones(hazards))[0] == pytest.approx(0.2)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_in_other_units_of_time_the_indices_are_the_same_ones(factor: float) -> None:
    hazards = np.random.default_rng(0).uniform(0.01, 1, (2, 8))
    widths_s = np.random.default_rng(1).uniform(0.5, 3, 8)
    prices = np.array([0.01, 0.3])
    for table, scaled in zip(
        (*whittle_index(hazards, prices, widths_s), gittins_index(hazards, widths_s)),
        (
            *whittle_index(hazards / factor, prices, widths_s * factor),
            gittins_index(hazards / factor, widths_s * factor),
        ),
        strict=True,
    ):
        assert scaled * factor == pytest.approx(table)


def held_ages(index: Floats, fetch: Floats, rent: float) -> NDArray[np.bool_]:
    held = np.zeros(len(index), np.bool_)
    is_in = True
    for at in range(len(index)):
        is_in = bool((index if is_in else fetch)[at] >= rent)
        held[at] = is_in
    return held


def test_on_real_gaps_it_keeps_what_a_fluid_calculation_keeps() -> None:
    """Sessions of one size whose users always return: 10 / 19 / 37 / 66 % on time with 5 / 10 / 20 / 40 % of the room.

    Recency keeps 0.1 / 0.4 / 3 / 14 %. The quantiles do not determine the values between them.
    """
    gaps_s = draw("people", 400_000, np.random.default_rng(0)) * people_mean_s()
    hold, fetch = (table[0, 0] for table in whittle_index(true_hazards(gaps_s, 0.0)[None, :], np.array([1e-3])))
    ages_s = np.arange(0, 500, 0.05)
    waiting = 1 - np.searchsorted(np.sort(gaps_s), ages_s) / len(gaps_s)
    rooms, hits = [], []
    for rent in np.geomspace(1e-4, 1, 400):
        held = held_ages(hold, fetch, float(rent))
        rooms.append((waiting * held[bins_of(ages_s)]).sum() / waiting.sum())
        hits.append(held[bins_of(gaps_s)].mean())
    order = np.argsort(rooms)
    reached = np.interp([0.05, 0.1, 0.2, 0.4], np.array(rooms)[order], np.array(hits)[order])
    assert reached == pytest.approx([0.10, 0.19, 0.37, 0.66], abs=0.05)


def test_widths_and_begins_are_those_of_the_bins() -> None:
    assert BEGINS[1:] == pytest.approx(BEGINS[:-1] + WIDTHS[:-1])
