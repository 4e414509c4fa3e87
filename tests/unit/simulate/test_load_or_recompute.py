"""What is on SSD is read, computed again, or both, whichever is there first."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.policy import LruPolicy
from kvservice.simulate.engine import Engine, simulate
from kvservice.simulate.load_or_recompute import LoadOrRecompute, Read
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.workload import Workload
from tests.workloads import Request, machine, path_workloads, paths, session_workloads, sessions

A, B, C = 0, 1, 2
RETURNS = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0))  # A's 50 tokens are on SSD at 20 s.


def chooses(**others: Any) -> Machine:
    return machine(dram_bytes=60, always_load=False, **others)


def test_a_read_that_would_take_longer_than_computing_is_not_made() -> None:
    # 5 s from SSD, 0.05 s of computing: the third turn takes as long as a miss.
    result = simulate(RETURNS, chooses(), "lru")

    assert (result.ssd, result.recomputed_hits, result.read_gb) == (1, 1, 0)
    assert result.ttft_mean_s == pytest.approx((0.03 + 0.03 + 0.08) / 3)


def test_a_read_that_is_faster_is_made() -> None:
    result = simulate(RETURNS, chooses(prefill_tokens_per_s=5.0), "lru")

    assert (result.ssd, result.recomputed_hits, result.read_gb * 2**30) == (1, 0, 50)


def test_with_always_load_a_read_is_made_although_computing_is_faster() -> None:
    result = simulate(RETURNS, dataclasses.replace(chooses(), always_load=True), "lru")

    assert (result.recomputed_hits, result.read_gb * 2**30) == (0, 50)


def test_where_both_are_about_as_fast_the_head_is_computed_while_the_rest_is_read() -> None:
    # 5,120 tokens take 5.12 s to read and to compute: half of them each takes half of that.
    long = [Request(session, at_s, new_tokens=5100) for session, at_s in ((A, 0.0), (B, 100.0))]
    turns = sessions(*long, Request(A, 200.0, new_tokens=100))
    on = chooses(ssd_bytes=20_000, ssd_bytes_per_s=1000.0)

    result = simulate(turns, dataclasses.replace(on, dram_bytes=6000), "lru")

    assert (result.ssd, result.recomputed_hits, result.read_gb * 2**30) == (1, 0.5, 2560)
    assert result.service_ttft_p50_s == pytest.approx(5.1)
    assert result.service_ttft_mean_s == pytest.approx((5.1 + 5.1 + 2.56 + 0.1) / 3)


def test_a_request_computes_its_history_where_others_reads_would_delay_its_own() -> None:
    # 50 tokens take 1 s to read and 1.25 s to compute. The second request finds a channel that is busy for 1 s.
    turns = sessions(*(Request(session, at_s) for session in (A, B) for at_s in (session * 10.0, 100.0)))
    on = machine(
        dram_bytes=0, ssd_bytes_per_s=50.0, prefill_tokens_per_s=40.0, service_turns_per_s=1000.0, always_load=False
    )

    result = simulate(turns, on, "lru")

    assert (result.ssd, result.recomputed_hits) == (1, 0.5)


def test_blocks_of_shared_prefixes_are_computed_again_by_blocks() -> None:
    turns = paths([2, 3], (0.0, [0, 1]), (10.0, [0, 1]))

    result = simulate(turns, machine(dram_bytes=3, ssd_bytes=100, always_load=False), "lru")

    assert (result.dram_on_time, result.ssd, result.recomputed_hits, result.read_gb) == (3 / 5, 2 / 5, 2 / 5, 0)


def test_the_decision_counts_the_tokens_that_are_computed_in_any_case() -> None:
    """A mixed plan must save a share of the whole time: with many new tokens it is not worth it."""
    on = machine(ssd_bytes_per_s=100.0, prefill_tokens_per_s=30.0, always_load=False)
    decision = LoadOrRecompute(on, Engine(sessions(), on, LruPolicy()).store.channel, block_tokens=10)

    assert decision.read(1000, new_tokens=1) == Read(770, 230)
    assert decision.read(1000, new_tokens=10_000) == Read(1000, 0)


def test_the_plan_of_the_page_on_policies_is_the_simulators() -> None:
    """docs/policies.md: 2,048 tokens of 13B KV on an SSD that is busy for 0.1 s."""
    kv_bytes = round(0.78125 * MIB)
    on = Machine(0, GIB, 5 * GIB, kv_bytes)
    channel = Engine(sessions(), on, LruPolicy()).store.channel
    channel.read_now(GIB // 2)

    assert LoadOrRecompute(on, channel).read(2048 * kv_bytes, new_tokens=40) == Read(512 * kv_bytes, 1536)


@given(
    st.one_of(session_workloads(), session_workloads(context_tokens=90), path_workloads()),
    st.sampled_from([1.0, 30.0, 60.0, 200.0]),
    st.sampled_from([0.3, 1.0, 50.0]),
)
def test_a_hit_on_ssd_is_never_worse_than_a_miss(
    workload: Workload, ssd_bytes_per_s: float, turns_per_s: float
) -> None:
    on = machine(
        dram_bytes=0,
        ssd_bytes_per_s=ssd_bytes_per_s,
        service_turns_per_s=turns_per_s,
        prefill_tokens_per_s=60.0,
        always_load=False,
    )
    engine = Engine(workload, on, LruPolicy())
    engine.run()
    account = engine.account
    for number in range(account.dispatched):
        turn = account.turn[number]
        new_tokens = account.to_compute(turn, number) - account.missing_tokens[number]
        miss_s = (new_tokens + account.history_tokens[number]) / 60.0
        assert account.load_s[number] + account.prefill_s(turn, number) <= miss_s + 1e-4
