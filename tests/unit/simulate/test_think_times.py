from __future__ import annotations

import math

import numpy as np
import pytest

from kvservice.simulate.think_times import PEOPLE_QUANTILES, SHAPES, draw, people_gap_s, people_mean_s, return_times
from kvservice.simulate.workload import Workload


def workload(session: list[int], arrives_s: list[float], think_s: list[float] | None = None) -> Workload:
    ones = np.ones(len(session), np.int32)
    return Workload(
        name="test",
        session=np.array(session, np.int32),
        arrives_s=np.array(arrives_s),
        think_s=np.zeros(len(session)) if think_s is None else np.array(think_s),
        new_tokens=ones,
        output_tokens=ones,
    )


def test_peoples_gaps_go_through_the_measured_quantiles() -> None:
    shares, gaps = np.array(PEOPLE_QUANTILES).T

    assert people_gap_s(shares) == pytest.approx(gaps)


def test_peoples_gaps_rise_and_have_tails_on_both_sides() -> None:
    gaps = people_gap_s(np.linspace(0, 0.999999, 10_001))

    assert (np.diff(gaps) > 0).all()
    assert gaps[0] == pytest.approx(3.0)
    assert 200 < gaps[-1] < 1000


def test_the_mean_of_peoples_gaps_is_that_of_what_is_drawn() -> None:
    drawn = draw("people", 400_000, np.random.default_rng(1)) * people_mean_s()

    assert drawn.mean() == pytest.approx(people_mean_s(), rel=0.005)
    assert np.quantile(drawn, 0.5) == pytest.approx(43, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_mean_of_one_and_no_negative_time(shape: str) -> None:
    drawn = draw(shape, 400_000, np.random.default_rng(1))  # type: ignore[arg-type]

    assert drawn.mean() == pytest.approx(1.0, rel=0.01)
    assert drawn.min() >= 0


def test_the_bimodal_shape_has_few_gaps_between_its_two_hills() -> None:
    drawn = draw("bimodal", 100_000, np.random.default_rng(1))
    quick = 1 / (0.6 + 0.4 * 8)

    assert (drawn < 1.9 * quick).mean() == pytest.approx(0.6, abs=0.02)
    assert ((drawn > 1.9 * quick) & (drawn < 4 * quick)).mean() < 0.03


def test_generated_sessions_return_after_their_think_times() -> None:
    load = workload([0, 0, 0, 1], [5, math.nan, math.nan, 6], [0, 9, 7, 0])

    gaps, never = return_times(load)

    assert gaps.tolist() == [7, 9]
    assert never == 0.5


def test_a_traces_sessions_return_after_the_time_between_their_requests() -> None:
    gaps, never = return_times(workload([0, 0, 0, 1, 2, 2], [0, 30, 31, 2, 3, 13]))

    assert gaps.tolist() == [1, 10, 30]
    assert never == 0.5


def test_shared_prefixes_return_with_the_next_request_that_uses_them() -> None:
    ones = np.ones(3, np.int32)
    shared = Workload(
        name="test",
        session=np.arange(3, dtype=np.int32),
        arrives_s=np.array([0.0, 2.0, 5.0]),
        think_s=np.zeros(3),
        new_tokens=ones,
        output_tokens=ones,
        block_tokens=512,
        path_begins=np.array([0, 2, 4, 6]),
        path_items=np.array([0, 1, 0, 2, 0, 1], np.int32),
        item_blocks=ones,
    )

    gaps, never = return_times(shared)

    assert gaps.tolist() == [2, 3, 5]
    assert never == 0.5


def test_no_turn_returns_where_there_is_none() -> None:
    gaps, never = return_times(workload([], []))

    assert (len(gaps), never) == (0, 1.0)
