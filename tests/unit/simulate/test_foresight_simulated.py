"""The benefit of foresight, compared with the other policies and the bounds, on many loads and seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import people, sharegpt
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.traces import read
from kvservice.simulate.workload import Workload

OTHERS = ("lru", "fifo", "s3fifo", "lookahead")
KV_BYTES = 800 * 1024  # Bytes per token.
MOONCAKE = Path(__file__).parents[4] / "shared" / "traces" / "mooncake_conversation_trace.jsonl"


def live_bytes(workload: Workload) -> float:
    """Mean KV of sessions whose users think and will return, while sessions begin."""
    tokens = (workload.new_tokens + workload.output_tokens).astype(np.float64)
    firsts = np.flatnonzero(np.diff(workload.session, prepend=-1))
    before = np.repeat((np.cumsum(tokens) - tokens)[firsts], np.diff(np.append(firsts, workload.turns)))
    history = np.minimum(np.cumsum(tokens) - before, workload.context_tokens or np.inf)
    comes_back = workload.session[1:] == workload.session[:-1]
    return float((workload.think_s[1:] * history[:-1])[comes_back].sum() * KV_BYTES / np.nanmax(workload.arrives_s))


def machine(workload: Workload, dram_share: float, busy: float = 0.5, ssd_gib_per_s: float = 20.0) -> Machine:
    """DRAM as a share of the live set; a server that is `busy` while sessions begin."""
    turns_per_s = workload.turns / float(np.nanmax(workload.arrives_s))
    return Machine(
        dram_bytes=int(dram_share * live_bytes(workload)),
        ssd_bytes=10**16,
        ssd_bytes_per_s=ssd_gib_per_s * GIB,
        kv_bytes_per_token=KV_BYTES,
        service_turns_per_s=turns_per_s / busy,
        always_load=True,  # These tests are about which KV is where in time, not about what that saves.
    )


def played(workload: Workload, on: Machine, *policies: str) -> dict[str, Result]:
    return {name: simulate(workload, on, name, warmup_turns=workload.turns // 4) for name in policies}


# Short queues: only think times.


@pytest.mark.parametrize(
    ("seed", "dram_share"), [(1, 0.05), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 0.1), (3, 0.2)))]
)
def test_with_think_times_alone_it_reaches_what_knowing_their_distribution_allows(seed: int, dram_share: float) -> None:
    workload = sharegpt(sessions=550, session_rate=1.5, think_s=45.0, seed=seed)
    results = played(workload, machine(workload, dram_share), *OTHERS, "foresight", "foresight-unlearned", "ages-only")
    on_time = {name: result.dram_on_time for name, result in results.items()}
    assert on_time["foresight"] >= 0.9 * on_time["ages-only"]
    assert on_time["foresight"] >= 2 * max(on_time[name] for name in OTHERS)
    assert on_time["foresight"] >= on_time["foresight-unlearned"] + 0.1
    assert results["foresight"].ssd_written_gb <= 1.005 * results["lru"].ssd_written_gb


@pytest.mark.slow
def test_users_with_a_pace_of_their_own_are_known_better_than_by_the_distribution_of_all() -> None:
    workload = people(users=150, user_rate=0.4, pace_sigma=0.7, start_tokens=2000, answer_share=0, seed=4)
    on_time = {
        name: result.dram_on_time
        for name, result in played(workload, machine(workload, 0.1), "foresight", "ages-only").items()
    }
    assert on_time["foresight"] > 1.1 * on_time["ages-only"]


def test_where_there_is_nothing_to_learn_it_does_no_harm() -> None:
    """Exponential think times have no memory: all ages are alike."""
    workload = sharegpt(sessions=600, session_rate=1.5, think_s=45.0, shape="exponential", seed=5)
    results = played(workload, machine(workload, 0.1), "lru", "foresight", "ages-only")
    assert results["foresight"].dram_on_time >= results["lru"].dram_on_time
    assert results["foresight"].dram_on_time >= 0.9 * results["ages-only"].dram_on_time


def test_the_same_run_twice_is_the_same() -> None:
    workload = sharegpt(sessions=60, session_rate=1.5, think_s=45.0, typing_lead_s=(2, 5), false_hints=0.3, seed=6)
    first, second = (
        dataclasses.replace(
            simulate(workload, machine(workload, 0.1), "foresight"), seconds=0.0, turns_simulated_per_s=0.0
        )
        for _ in range(2)
    )
    assert first == second


# Short queues: typing hints.


@pytest.mark.parametrize(("seed", "dram_share"), [(1, 0.05), pytest.param(2, 0.2, marks=pytest.mark.slow)])
def test_with_typing_hints_it_comes_near_who_knows_the_future(seed: int, dram_share: float) -> None:
    workload = sharegpt(sessions=500, session_rate=1.5, think_s=45.0, typing_lead_s=(2, 5), seed=seed)
    results = played(workload, machine(workload, dram_share), "foresight", "optimum")
    assert results["foresight"].read_busy < 0.7
    # All reads stay near those of `lru`: with the smallest DRAM that is short of some hints.
    assert results["foresight"].dram_on_time >= 0.85 * results["optimum"].dram_on_time


@pytest.mark.slow
def test_when_most_hints_are_false_little_is_lost() -> None:
    on_time = {}
    for name, lead_s, false_share in (("none", None, 0.0), ("true", (2.0, 5.0), 0.0), ("false", (2.0, 5.0), 0.6)):
        workload = sharegpt(
            sessions=500, session_rate=1.5, think_s=45.0, typing_lead_s=lead_s, false_hints=false_share, seed=3
        )
        on_time[name] = played(workload, machine(workload, 0.3), "foresight")["foresight"].dram_on_time
    assert on_time["false"] >= on_time["true"] - 0.1
    assert on_time["false"] >= on_time["none"] - 0.02


# Overload, and shared prefixes.


@pytest.mark.slow
def test_in_overload_it_is_as_good_as_looking_at_the_queue() -> None:
    """Sessions arrive three times as fast as they are served, and the tiers hold a fifth of the waiting ones."""
    workload = sharegpt(sessions=700, session_rate=1.0, think_s=30.0, seed=1)
    on = Machine(24 * GIB, 180 * GIB, 5 * GIB, int(0.78 * MIB), service_turns_per_s=1.9)
    results = played(workload, on, "lru", "lookahead", "foresight")
    assert results["lookahead"].hit_rate > results["lru"].hit_rate + 0.2, "the queue tells what comes"
    assert results["foresight"].hit_rate >= results["lookahead"].hit_rate - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("busy", [0.5, 0.7])
@pytest.mark.parametrize("shape", ["people", "lognormal", "bimodal", "exponential"])
def test_of_any_shape_of_think_times_it_reaches_what_their_distribution_allows(shape: str, busy: float) -> None:
    for seed in (11, 12):
        workload = sharegpt(sessions=1500, session_rate=1.5, think_s=45.0, shape=shape, seed=seed)  # type: ignore[arg-type]
        for dram_share in (0.05, 0.1, 0.2, 0.4):
            on = machine(workload, dram_share, busy)
            on_time = {
                name: result.dram_on_time
                for name, result in played(workload, on, *OTHERS, "foresight", "ages-only").items()
            }
            assert on_time["foresight"] >= 0.9 * on_time["ages-only"], (seed, dram_share)
            assert on_time["foresight"] >= max(on_time[name] for name in OTHERS), (seed, dram_share)


@pytest.mark.slow
@pytest.mark.skipif(not MOONCAKE.exists(), reason=f"no trace at {MOONCAKE}")
@pytest.mark.parametrize("dram_share", [0.01, 0.05, 0.2, 1.0])
def test_on_shared_prefixes_it_is_within_a_point_of_the_best(dram_share: float) -> None:
    workload = read(MOONCAKE)
    block_bytes = workload.block_tokens * KV_BYTES
    on = Machine(
        int(dram_share * int(workload.item_blocks.sum()) * block_bytes),
        0,
        5 * GIB,
        KV_BYTES,
        service_turns_per_s=10.0,
    )
    hits = {name: simulate(workload, on, name).hit_rate for name in (*OTHERS, "foresight")}
    assert hits["foresight"] >= max(hits[name] for name in OTHERS) - 0.01
