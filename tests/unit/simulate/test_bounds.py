"""The bounds beside the policies: no policy is above the optimum."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice.policy import PLACEMENTS
from kvservice.simulate.clairvoyant import optimum_plays
from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import sharegpt
from kvservice.simulate.result import Result, best_of
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.workload import Workload
from tests.workloads import Request, machine, path_workloads, sessions


def belady_hits(workload: Workload, capacity_blocks: int) -> int:
    """By definition, block by block: evict the block whose next use is latest, the end of a path first."""
    blocks: list[list[tuple[int, int]]] = []
    for turn in range(workload.turns):
        path = workload.path_items[workload.path_begins[turn] : workload.path_begins[turn + 1]].tolist()
        blocks.append([(item, block) for item in path for block in range(workload.item_blocks[item])])
    kept: set[tuple[int, int]] = set()
    hits = 0
    for turn, path_blocks in enumerate(blocks):
        for block in path_blocks:
            if block not in kept:
                break
            hits += 1
        next_use = {}
        for block in kept | set(path_blocks):
            for later in range(turn + 1, workload.turns):
                if block in blocks[later]:
                    next_use[block] = (later, blocks[later].index(block))
                    break
        kept = set(sorted(next_use, key=lambda block: next_use[block])[:capacity_blocks])
    return hits


def clairvoyant(workload: Workload, on: Machine, warmup_turns: int = 0) -> Result:
    """The optimum without the policies' runs."""
    return best_of([simulate(workload, on, play, warmup_turns=warmup_turns) for play in optimum_plays(workload, on)])


@given(path_workloads(), st.integers(0, 12))
def test_on_blocks_the_clairvoyant_is_beladys(workload: Workload, capacity_blocks: int) -> None:
    on = machine(capacity_blocks, 0, service_turns_per_s=1000.0)
    result = clairvoyant(workload, on)
    units = int(workload.item_blocks[workload.path_items].sum())
    assert result.hit_rate * units == pytest.approx(belady_hits(workload, capacity_blocks))


@settings(max_examples=15, deadline=None)
@given(path_workloads(), st.integers(0, 12))
def test_no_policy_has_more_hits_on_blocks_than_the_clairvoyant(workload: Workload, capacity_blocks: int) -> None:
    on = machine(capacity_blocks, 0, service_turns_per_s=1000.0)
    best = clairvoyant(workload, on)
    for name in PLACEMENTS:
        assert simulate(workload, on, name).hit_rate <= best.hit_rate + 1e-9


def some_sessions(rng: random.Random) -> Workload:
    """Up to thirty sessions of up to six turns, half of them with think times after the previous answer."""
    requests = []
    for session in range(rng.randint(4, 30)):
        at_s = rng.random() * 50
        for turn in range(rng.randint(1, 6)):
            gap_s = rng.expovariate(1 / 15)
            at_s += gap_s
            closed = turn > 0 and rng.random() < 0.5
            new, output = rng.randint(1, 20), rng.randint(0, 10)
            requests.append(Request(session, math.nan if closed else at_s, gap_s if closed else 0.0, new, output))
    return sessions(*requests)


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 40))])
def test_no_policy_is_above_the_clairvoyant_on_small_sessions(seed: int) -> None:
    """Each tier has space for at least a few sessions, and the channel has enough bandwidth."""
    rng = random.Random(seed)
    workload = some_sessions(rng)
    on = machine(rng.choice([200, 400]), rng.choice([0, 600, 1500, 5000]), ssd_bytes_per_s=rng.choice([30.0, 100.0]))
    best = clairvoyant(workload, on)
    for name in PLACEMENTS:
        result = simulate(workload, on, name)
        assert result.hit_rate <= best.hit_rate + 1e-9
        assert result.dram_on_time <= best.dram_on_time + 1e-9


@pytest.mark.parametrize(
    ("dram_gb", "ssd_gb", "service_turns_per_s"),
    [
        (8, 100, 1.9),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((16, 30, 6.0), (8, 2000, 1.9), (16, 2000, 6.0), (16, 0, 6.0), (0, 100, 6.0))
        ),
    ],
)
def test_no_policy_is_above_the_clairvoyant_under_load(dram_gb: int, ssd_gb: int, service_turns_per_s: float) -> None:
    """With a queue that is hundreds deep, and with hardly any."""
    workload = sharegpt(sessions=250, think_s=30.0, seed=7)
    on = Machine(dram_gb * GIB, ssd_gb * GIB, 5.0 * GIB, MIB // 2, service_turns_per_s=service_turns_per_s)
    best = clairvoyant(workload, on, warmup_turns=100)
    for name in PLACEMENTS:
        result = simulate(workload, on, name, warmup_turns=100)
        assert result.hit_rate_history <= best.hit_rate_history + 0.002
        assert result.dram_on_time <= best.dram_on_time + 0.002


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 8))])
def test_no_policy_is_above_the_optimum_where_the_clairvoyant_is_at_a_loss(seed: int) -> None:
    """A channel with too little bandwidth, and tiers with hardly any space for a session."""
    rng = random.Random(seed)
    workload = some_sessions(rng)
    on = machine(rng.choice([20, 60]), rng.choice([0, 30, 5000]), ssd_bytes_per_s=rng.choice([0.3, 3.0]))
    best = simulate(workload, on, "optimum")
    for name in (*PLACEMENTS, "ages-only", "ages-and-answers"):
        result = simulate(workload, on, name)
        assert result.hit_rate_history <= best.hit_rate_history
        assert result.dram_on_time <= best.dram_on_time
    assert best.policy == "optimum"


def test_everything_kept_is_paid_for_as_the_machine_and_nothing_kept_as_its_gpus() -> None:
    workload = sharegpt(sessions=20, think_s=5.0, seed=8)
    on = Machine(128 * GIB, 10240 * GIB, 5.0 * GIB, MIB, service_turns_per_s=4.0, gpus=2)
    nothing, everything = simulate(workload, on, "none"), simulate(workload, on, "infinite")
    assert nothing.storage_share_of_cost == 0
    assert everything.storage_share_of_cost == pytest.approx(0.164, abs=0.001)
    assert nothing.gpu_hours > everything.gpu_hours
