"""The bound that knows the distribution of return times, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvservice.policy.survival import BEGINS, WIDTHS
from kvservice.simulate.bounds import true_hazards
from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import sharegpt
from kvservice.simulate.settings import GIB, MIB, Machine

ON = Machine(30 * GIB, 10**16, 20 * GIB, MIB, service_turns_per_s=20.0)


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
    results = [simulate(workload, ON, "distribution-bound") for workload in (plain, hinted)]
    assert results[0].dram_on_time == results[1].dram_on_time
    assert simulate(hinted, ON, "foresight").dram_on_time > results[1].dram_on_time
