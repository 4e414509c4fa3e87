"""Predicted durations: with few observations, with outliers, and after changes of conditions."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapter.fit import Fit


def observed(fit: Fit, size: float, seconds: float) -> None:
    fit.observe((int(size).bit_length(),), (size, 1.0), seconds)


def linear(size: float, *, fixed_s: float = 0.002, rate: float = 1e9) -> float:
    return fixed_s + size / rate


def test_nothing_is_known_before_the_first_observation_and_after_forgetting() -> None:
    fit = Fit()
    known = [fit.is_known]
    observed(fit, 1e6, 0.1)
    known.append(fit.is_known)
    fit.forget()
    known.append(fit.is_known)
    assert known == [False, True, False]


def test_one_observation_is_scaled() -> None:
    fit = Fit()
    observed(fit, 1e6, 0.1)
    assert fit.seconds((3e6, 1.0)) == pytest.approx(0.3)


def test_of_one_small_observation_a_part_is_thought_to_be_fixed() -> None:
    fit = Fit(fixed_s_max=0.005)
    observed(fit, 1e6, 0.004)
    assert fit.seconds((1e6, 1.0)) == pytest.approx(0.004)
    assert fit.seconds((1e8, 1.0)) == pytest.approx(0.002 + 0.2)
    fit.forget()
    observed(fit, 1e9, 10.0)
    assert fit.seconds((2e9, 1.0)) == pytest.approx(20, rel=0.01)


def test_two_observations_of_two_sizes_tell_what_is_fixed() -> None:
    fit = Fit()
    observed(fit, 1e6, linear(1e6))
    observed(fit, 1e8, linear(1e8))
    for size in (1e5, 1e7, 1e9):
        assert fit.seconds((size, 1.0)) == pytest.approx(linear(size))


@given(
    st.lists(
        st.tuples(st.floats(1, 1e9), st.floats(1e-6, 1e3)),
        min_size=1,
        max_size=40,
    ),
    st.floats(1, 1e9),
)
def test_after_any_observations_more_work_takes_longer_and_no_work_takes_no_time(
    observations: list[tuple[float, float]], size: float
) -> None:
    fit = Fit(fixed_s_max=0.005)
    for each, seconds in observations:
        observed(fit, each, seconds)
    some, more = fit.seconds((size, 1.0)), fit.seconds((2 * size, 1.0))
    assert 0 < some <= more < math.inf


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_duration_teaches_nothing(seconds: float) -> None:
    fit = Fit()
    observed(fit, 1e6, seconds)
    assert not fit.is_known
    fit.observe((0,), (0.0, 1.0), 1.0)
    assert not fit.is_known


def learned(noise: float = 0.1, seed: int = 0, count: int = 60) -> tuple[Fit, random.Random]:
    chance, fit = random.Random(seed), Fit()
    for _ in range(count):
        size = 10 ** chance.uniform(5, 9)
        observed(fit, size, linear(size) * chance.uniform(1 - noise, 1 + noise))
    return fit, chance


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_tenth_leaves_estimates_not_much_further_off(seed: int) -> None:
    fit, _ = learned(seed=seed)
    for size in (1e5, 1e6, 1e7, 1e8, 1e9):
        assert fit.seconds((size, 1.0)) == pytest.approx(linear(size), rel=0.15)


@pytest.mark.parametrize("count", [25, 60])
@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_two_outliers_change_little(factor: float, count: int) -> None:
    fit, _ = learned(count=count)
    for size in (1e6, 1e8):
        observed(fit, size, factor * linear(size))
    for size in (1e6, 1e7, 1e8):
        assert fit.seconds((size, 1.0)) == pytest.approx(linear(size), rel=0.25)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_change_of_conditions_is_followed_after_three_observations_for_all_sizes(factor: float) -> None:
    fit, chance = learned()
    for _ in range(3):
        size = 10 ** chance.uniform(6, 7)
        observed(fit, size, factor * linear(size))
    for size in (1e5, 1e7, 1e9):
        assert fit.seconds((size, 1.0)) == pytest.approx(factor * linear(size), rel=0.35)


def test_many_small_observations_do_not_push_out_a_large_one() -> None:
    fit = Fit()
    observed(fit, 1e9, linear(1e9))
    for _ in range(1000):
        observed(fit, 1e5, linear(1e5))
    assert fit.seconds((1e9, 1.0)) == pytest.approx(linear(1e9))
    assert sum(map(len, fit._kept.values())) <= 9
