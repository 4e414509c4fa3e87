"""The bounds that know the true return times: by age alone, and by the last answer's length too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvservice.policy.survival import BEGINS, WIDTHS
from kvservice.simulate.bounds import KnownReturns, true_hazards
from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import people, sharegpt
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.think_times import Uses, uses_of
from tests.workloads import Request, sessions

ON = Machine(30 * GIB, 10**16, 20 * GIB, MIB, service_turns_per_s=20.0)
FEW = Machine(6 * GIB, 10**16, 20 * GIB, MIB // 8, service_turns_per_s=1000.0)


def test_the_hazard_of_exponential_gaps_is_their_rate_and_of_those_who_leave_less_with_age() -> None:
    gaps_s = np.random.default_rng(0).exponential(20.0, 200_000)
    inner = (BEGINS > 2) & (BEGINS + WIDTHS < 40)
    assert true_hazards(gaps_s, 0.0)[inner] == pytest.approx(1 / 20, rel=0.05)
    some_leave = true_hazards(gaps_s, 0.5)[inner]
    assert (np.diff(some_leave[::4]) < 0).all() and some_leave[0] == pytest.approx(1 / 40, rel=0.15)


def test_at_ages_without_returns_nothing_is_held() -> None:
    hazards = true_hazards(np.full(1000, 30.0), 0.1)
    assert hazards[BEGINS < 20].max() < 1e-6 and hazards[BEGINS > 60].max() < 1e-6


def test_hints_tell_it_nothing() -> None:
    plain = sharegpt(sessions=80, session_rate=2.0, think_s=20.0, seed=1)
    hinted = sharegpt(sessions=80, session_rate=2.0, think_s=20.0, seed=1, typing_lead_s=(2, 5))
    hinted = dataclasses.replace(plain, hints=hinted.hints)
    results = [simulate(workload, ON, "ages-only") for workload in (plain, hinted)]
    assert results[0].dram_on_time == results[1].dram_on_time
    assert simulate(hinted, ON, "foresight").dram_on_time > results[1].dram_on_time


def test_a_use_has_the_gap_that_follows_it_and_its_own_answer() -> None:
    uses = uses_of(
        sessions(
            Request(0, 0.0, output_tokens=7), Request(0, think_s=9.0, output_tokens=8), Request(1, 5.0, output_tokens=6)
        )
    )
    assert uses.gap_s.tolist() == [9, np.inf, np.inf]
    assert uses.answer_tokens.tolist() == [7, 8, 6]


def test_hazards_after_short_and_after_long_answers_are_their_own() -> None:
    uses = Uses(np.tile([10.0, 100.0], 500), np.tile([5, 50], 500).astype(np.int32))
    known = KnownReturns.of(uses, [20.0])
    peaks_s = BEGINS[known.hazards.argmax(axis=1)]
    assert peaks_s[0] <= 10 < peaks_s[0] * 1.2 and peaks_s[1] <= 100 < peaks_s[1] * 1.2


@pytest.mark.slow
def test_where_gaps_follow_answers_the_bound_that_knows_answers_has_more_on_time() -> None:
    follow, apart = (people(users=150, user_rate=0.4, answer_share=share, seed=3) for share in (0.62, 0.0))
    on_time = {
        (load is follow, name): simulate(load, FEW, name, warmup_turns=load.turns // 4).dram_on_time
        for load in (follow, apart)
        for name in ("ages-only", "ages-and-answers", "foresight")
        if load is follow or name != "foresight"
    }
    assert on_time[True, "ages-and-answers"] > 1.2 * on_time[True, "ages-only"]
    assert on_time[True, "ages-and-answers"] > on_time[True, "foresight"] > on_time[True, "ages-only"]
    # Classes of some hundred gaps each know a little about them.
    assert on_time[False, "ages-and-answers"] == pytest.approx(on_time[False, "ages-only"], abs=0.12)


@pytest.mark.parametrize("name", ["ages-only", "ages-and-answers"])
def test_a_load_of_one_turn_has_nothing_to_know(name: str) -> None:
    assert simulate(sessions(Request(0, 0.0)), ON, name).hit_rate == 0


def test_the_former_name_is_refused_with_the_new_one() -> None:
    with pytest.raises(ValueError, match="'distribution-bound' is called ages-only now"):
        simulate(sessions(), ON, "distribution-bound")
