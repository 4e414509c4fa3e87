"""Load, recompute, or both: the plan for given measurements."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapter.rates import Rates
from kvservice_api.cost import Kind, Plan, plan
from tests.clock import FakeClock

KIB = 2**10


@dataclass(frozen=True)
class Machine:
    """The true durations."""

    call_s: float = 0.002
    bytes_per_s: float = 100e6
    forward_s: float = 0.005
    token_s: float = 0.001
    pair_s: float = 2e-7

    def load_s(self, size_bytes: int) -> float:
        return self.call_s + size_bytes / self.bytes_per_s

    def prefill_s(self, new: int, context: int = 0) -> float:
        return self.forward_s + new * self.token_s + new * (context + new / 2) * self.pair_s

    def rates(self) -> Rates:
        """Rates that have observed these durations."""
        rates = Rates()
        for new, context in ((1000, 0), (100, 0), (10, 3000), (500, 2000), (4000, 0), (30, 0)):
            rates.observe_prefill(new, context, self.prefill_s(new, context))
        for size_bytes in (10**6, 10**8, 10**7):
            rates.observe_load(size_bytes, self.load_s(size_bytes), "dram", "shm")
        return rates


@dataclass(frozen=True)
class Request:
    history_tokens: int = 2048
    new_tokens: int = 40
    bytes_per_token: int = 45 * KIB
    block_tokens: int = 256
    layers: int = 30
    loads_ahead: int = 0

    @property
    def size_bytes(self) -> int:
        return self.history_tokens * self.bytes_per_token

    def plan(self, rates: Rates, tier: str = "dram", *, may_mix: bool = True) -> Plan:
        return plan(
            rates,
            self.history_tokens,
            self.new_tokens,
            self.bytes_per_token,
            tier,
            self.block_tokens,
            transport="shm",
            layers=self.layers,
            loads_ahead=self.loads_ahead,
            may_mix=may_mix,
        )


machines = st.builds(
    Machine,
    call_s=st.floats(1e-5, 0.05),
    bytes_per_s=st.floats(1e6, 1e11),
    forward_s=st.floats(1e-4, 0.1),
    token_s=st.floats(1e-6, 1e-2),
    pair_s=st.floats(1e-12, 1e-6),
)
requests = st.builds(
    Request,
    history_tokens=st.integers(1, 50_000),
    new_tokens=st.integers(1, 5000),
    bytes_per_token=st.integers(KIB, 3000 * KIB),
    block_tokens=st.integers(1, 512),
    layers=st.integers(1, 96),
    loads_ahead=st.integers(0, 5),
)


# Learning


def test_what_was_measured_is_what_is_expected() -> None:
    machine = Machine()
    rates = machine.rates()
    for new, context in ((2000, 0), (64, 5000), (1, 0)):
        assert rates.prefill_s(new, context) == pytest.approx(machine.prefill_s(new, context), rel=0.01)
    assert rates.load_s(5 * 10**7, "dram", "shm") == pytest.approx(machine.load_s(5 * 10**7), rel=0.01)
    assert rates.prefill_s(0, 1000) == rates.load_s(0, "dram", "shm") == 0.0


def test_tiers_and_transports_are_measured_apart() -> None:
    rates = Rates()
    rates.observe_load(10**8, 0.1, "dram", "shm")
    rates.observe_load(10**8, 1.0, "dram", "grpc")
    rates.observe_load(10**8, 2.0, "ssd", "shm")
    found = [rates.load_s(10**8, tier, by) for tier, by in (("dram", "shm"), ("dram", "grpc"), ("ssd", "shm"))]
    assert found == [pytest.approx(0.1), pytest.approx(1.0), pytest.approx(2.0)]
    assert rates.load_s(10**8, "ssd", "grpc") is None


def test_what_other_loads_took_of_the_way_is_not_this_ones_and_adds_to_the_next() -> None:
    rates = Rates()
    rates.observe_load(10**8, 3.0, "dram", loads_ahead=2)
    assert rates.load_s(10**8, "dram") == pytest.approx(1.0)
    assert rates.load_s(10**8, "dram", loads_ahead=1) == pytest.approx(2.0)


def test_old_loads_are_forgotten_and_measured_again() -> None:
    clock = FakeClock()
    rates = Rates(clock.monotonic_s, memory_s=600)
    rates.observe_load(10**8, 100.0, "dram")
    clock.advance(seconds=599)
    assert rates.load_s(10**8, "dram") == pytest.approx(100)
    clock.advance(seconds=2)
    assert rates.load_s(10**8, "dram") is None
    rates.observe_load(10**8, 0.1, "dram")
    assert rates.load_s(10**8, "dram") == pytest.approx(0.1)


def test_one_overhead_of_five_that_is_far_off_does_not_count() -> None:
    rates = Rates()
    assert rates.overhead_s() == 0.0
    for seconds in (9.0, 0.003, 0.002, 5.0, 0.001, 0.002):
        rates.observe_overhead(seconds)
    assert rates.overhead_s() == 0.002


def test_threads_may_observe_and_ask_at_once() -> None:
    rates, failed = Rates(), []

    def work(number: int) -> None:
        try:
            for each in range(1, 100):
                rates.observe_prefill(each * (number + 1), each, each / 1000)
                rates.observe_load(each * 1000, each / 1000, "dram")
                assert math.isfinite(rates.prefill_s(each) or 0.0)
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


# Decisions


def test_where_nothing_was_measured_the_history_is_loaded_and_so_gets_measured() -> None:
    made = Request().plan(Rates())
    assert (made.kind, made.load_tokens, made.compute_tokens) == (Kind.LOAD, 2048, 0)
    assert "no load from dram by shm was measured" in made.reason

    rates = Machine().rates()
    assert Request().plan(rates, "ssd").kind is Kind.LOAD, "another tier was measured, not this one"
    assert Request(history_tokens=3).plan(rates, "ssd").kind is Kind.RECOMPUTE, "that is not worth finding out"

    rates = Rates()
    rates.observe_load(10**6, 1.0, "dram", "shm")
    assert Request().plan(rates).kind is Kind.LOAD
    assert "how fast this model computes" in Request().plan(rates).reason


def test_without_a_history_there_is_nothing_to_decide() -> None:
    made = Request(history_tokens=0).plan(Machine().rates())
    assert (made.kind, made.load_tokens, made.compute_tokens) == (Kind.RECOMPUTE, 0, 0)


def test_a_short_history_is_recomputed_and_a_long_one_loaded() -> None:
    rates = Machine(call_s=0.05, bytes_per_s=2e9).rates()
    kinds = [Request(history_tokens=tokens).plan(rates).kind for tokens in (8, 32, 128, 512, 4096)]
    assert kinds == [Kind.RECOMPUTE, Kind.RECOMPUTE, Kind.LOAD, Kind.LOAD, Kind.LOAD]


def test_a_link_that_is_about_as_fast_as_computing_does_both() -> None:
    machine = Machine(bytes_per_s=45 * KIB / 0.001)
    made = Request().plan(machine.rates())
    assert made.kind is Kind.MIXED
    assert made.compute_tokens + made.load_tokens == 2048
    assert made.compute_tokens % 256 == 0
    assert made.estimate_s[Kind.MIXED] < 0.65 * min(made.estimate_s[Kind.LOAD], made.estimate_s[Kind.RECOMPUTE])
    assert Request().plan(machine.rates(), may_mix=False).kind is not Kind.MIXED
    assert Request(block_tokens=2048).plan(machine.rates()).kind is not Kind.MIXED, "one block has no edge within"


def test_blocks_that_differ_are_cut_at_their_own_edges() -> None:
    rates = Machine(bytes_per_s=45 * KIB / 0.001).rates()
    made = plan(rates, 1000, 40, 45 * KIB, "dram", 256, transport="shm", edges=(0, 4, 130, 470, 600, 900))
    assert (made.kind, made.compute_tokens) == (Kind.MIXED, 470)


def test_loading_while_the_new_tokens_are_computed_counts() -> None:
    """PL-B0 of the paper: of n layers, each l to load and c to compute, max(l + n c, n l + c)."""
    machine = Machine(call_s=1e-9, bytes_per_s=100e6)
    request = Request(new_tokens=500, history_tokens=1000, layers=40)
    layer_load_s = machine.load_s(request.size_bytes) / 40
    layer_compute_s = machine.prefill_s(500, 1000) / 40
    loads = request.plan(machine.rates()).estimate_s[Kind.LOAD]
    assert loads == pytest.approx(
        max(layer_load_s + 40 * layer_compute_s, 40 * layer_load_s + layer_compute_s), rel=0.01
    )
    all_at_once = replace(request, layers=1).plan(machine.rates()).estimate_s[Kind.LOAD]
    assert all_at_once == pytest.approx(40 * (layer_load_s + layer_compute_s), rel=0.01)


def test_a_longer_queue_makes_loading_less_attractive() -> None:
    rates = Machine(bytes_per_s=150e6).rates()
    estimates = [Request(loads_ahead=ahead).plan(rates).estimate_s[Kind.LOAD] for ahead in (0, 1, 5)]
    assert estimates == sorted(estimates)
    assert estimates[2] > 3 * estimates[0]
    assert Request(loads_ahead=20).plan(rates, may_mix=False).kind is Kind.RECOMPUTE


@given(machines, requests)
def test_no_plan_is_expected_to_take_longer_than_computing_all_again(machine: Machine, request: Request) -> None:
    made = request.plan(machine.rates())
    assert made.estimate_s[made.kind] <= made.estimate_s[Kind.RECOMPUTE]
    assert made.estimate_s[made.kind] == pytest.approx(min(made.estimate_s.values()), rel=0.0527)
    assert made.compute_tokens + made.load_tokens == request.history_tokens


@given(machines, requests)
def test_the_mixed_plan_is_taken_only_where_it_beats_both_others_clearly(machine: Machine, request: Request) -> None:
    made = request.plan(machine.rates())
    if made.kind is Kind.MIXED:
        others = min(made.estimate_s[Kind.LOAD], made.estimate_s[Kind.RECOMPUTE])
        assert made.estimate_s[Kind.MIXED] < 0.95 * others
        assert made.compute_tokens % request.block_tokens == 0
        assert 0 < made.compute_tokens < request.history_tokens


@given(machines, requests)
def test_no_other_edge_would_have_been_better(machine: Machine, request: Request) -> None:
    request = replace(request, history_tokens=min(request.history_tokens, 40 * request.block_tokens))
    rates = machine.rates()
    made = request.plan(rates)
    if Kind.MIXED not in made.estimate_s:
        return
    for head in range(request.block_tokens, request.history_tokens, request.block_tokens):
        only = plan(
            rates,
            request.history_tokens,
            request.new_tokens,
            request.bytes_per_token,
            "dram",
            request.block_tokens,
            transport="shm",
            layers=request.layers,
            loads_ahead=request.loads_ahead,
            edges=(0, head),
        )
        assert made.estimate_s[Kind.MIXED] <= only.estimate_s[Kind.MIXED] * (1 + 1e-9)


@given(machines, requests, st.floats(1.0, 100.0))
def test_a_faster_link_never_makes_it_recompute(machine: Machine, request: Request, faster: float) -> None:
    made = request.plan(machine.rates())
    better = replace(machine, bytes_per_s=faster * machine.bytes_per_s, call_s=machine.call_s / faster)
    if made.kind is not Kind.RECOMPUTE and faster > 1.01:
        assert request.plan(better.rates()).kind is not Kind.RECOMPUTE


@given(machines, requests)
def test_a_longer_history_is_never_expected_to_take_less(machine: Machine, request: Request) -> None:
    rates = machine.rates()
    lengths = (request.history_tokens, 2 * request.history_tokens, 4 * request.history_tokens)
    plans = [replace(request, history_tokens=tokens).plan(rates) for tokens in lengths]
    for shorter, longer in pairwise(plans):
        for kind in (Kind.LOAD, Kind.RECOMPUTE):
            assert shorter.estimate_s[kind] <= longer.estimate_s[kind] * (1 + 1e-9)
