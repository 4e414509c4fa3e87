"""The bounds beside the policies: nobody is above the optimum."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice.policy import PLACEMENTS
from kvservice.simulate.engine import simulate
from kvservice.simulate.workload import Workload
from tests.workloads import machine, path_workloads, session_workloads


def belady_hits(workload: Workload, capacity_blocks: int) -> int:
    """By its definition, block by block: what is used the furthest ahead leaves, of one path the end first."""
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


@settings(max_examples=100, deadline=None)
@given(path_workloads(), st.integers(0, 12))
def test_on_blocks_the_optimum_is_beladys(workload: Workload, capacity_blocks: int) -> None:
    on = machine(capacity_blocks, 0, service_turns_per_s=1000.0)
    result = simulate(workload, on, "optimum")
    units = int(workload.item_blocks[workload.path_items].sum())
    assert result.hit_rate * units == pytest.approx(belady_hits(workload, capacity_blocks))


@settings(max_examples=40, deadline=None)
@given(path_workloads(), st.integers(0, 12))
def test_no_policy_has_more_hits_on_blocks_than_the_optimum(workload: Workload, capacity_blocks: int) -> None:
    on = machine(capacity_blocks, 0, service_turns_per_s=1000.0)
    best = simulate(workload, on, "optimum")
    for name in PLACEMENTS:
        assert simulate(workload, on, name).hit_rate <= best.hit_rate + 1e-9


@settings(max_examples=60, deadline=None)
@given(session_workloads(), st.sampled_from([50, 100, 200]), st.sampled_from([0, 100, 300, 3000]))
def test_no_policy_is_above_the_optimum_on_small_sessions(workload: Workload, dram_bytes: int, ssd_bytes: int) -> None:
    on = machine(dram_bytes, ssd_bytes, ssd_bytes_per_s=60.0)
    best = simulate(workload, on, "optimum")
    for name in PLACEMENTS:
        result = simulate(workload, on, name)
        assert result.hit_rate <= best.hit_rate + 1e-9
        assert result.dram_on_time <= best.dram_on_time + 1e-9
