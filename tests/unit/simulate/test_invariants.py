"""Invariants of a run at every moment, for every workload and every policy."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy import PLACEMENTS
from kvservice.policy.base import Promotion
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.bounds import EverythingKept
from kvservice.simulate.clairvoyant import Clairvoyant
from kvservice.simulate.engine import CONTENDERS, Engine, simulate
from kvservice.simulate.generate import sharegpt
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.workload import Workload
from tests.workloads import Request, machine, path_workloads, paths, session_workloads, sessions

SHARES = ("dram_on_time", "dram_late", "ssd", "miss")


class Whimsical(Placement):
    """Random decisions: what moves, when, and what stays."""

    name: ClassVar[str] = "whimsical"

    def __init__(self, seed: int) -> None:
        self._lots = random.Random(seed)
        self.look_at_s = 0.0

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return np.array([self._lots.random() for _ in rows])

    def wants_in_dram(self, items: ItemTable, row: int, now_s: float) -> bool:
        return self._lots.random() < 0.8

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        return self._lots.random() < 0.8

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        self.look_at_s = now_s + self._lots.choice([0.5, 2.0])
        rows = np.flatnonzero(items.live).tolist()
        chosen = self._lots.sample(rows, min(len(rows), 3))
        return [Promotion(row, now_s + self._lots.random() * 9, self._lots.choice([0.5, math.inf])) for row in chosen]


class WhimsicalWholes(Whimsical):
    name: ClassVar[str] = "whimsical-wholes"
    whole_items: ClassVar[bool] = True


def watched(policy: Placement) -> Placement:
    """The same policy; it checks the invariants each time the simulator calls it."""

    class Watched(type(policy)):  # type: ignore[misc]
        engine: Engine
        last_s = -math.inf

        def _see(self, items: ItemTable, now_s: float, is_settled: bool = True) -> None:
            core, channel = self.engine.core, self.engine.store.channel
            assert now_s >= self.last_s
            self.last_s = now_s
            dram, ssd = core.dram, core.ssd
            writing = channel._write_size if channel.write_row >= 0 else 0
            if is_settled:
                assert dram.used_bytes == items.dram_bytes.sum() + items.coming_bytes.sum() <= dram.capacity_bytes
                assert ssd.used_bytes == items.ssd_bytes.sum() + writing <= ssd.capacity_bytes
            assert (items.dram_bytes >= 0).all()
            assert (items.ssd_bytes >= 0).all()
            assert (items.dram_bytes + items.coming_bytes <= items.size_bytes).all()
            assert (items.ssd_bytes <= items.size_bytes).all()
            begun_s = now_s - self.engine.now_s
            moved = channel.read_bytes + channel.written_bytes
            backlog_s = max(0.0, channel._read_now_until_s - channel.now_s) + channel._deferred_s
            assert moved <= channel._rate * (begun_s + backlog_s) + 1e-6

        def queued(self, items: ItemTable, row: int, now_s: float) -> None:
            self._see(items, now_s)
            super().queued(items, row, now_s)

        def used(self, items: ItemTable, row: int, now_s: float) -> None:
            self._see(items, now_s)
            if not self.engine.workload.shares_prefixes:
                assert items.in_use[row] == 1  # The answer before it has ended.
            super().used(items, row, now_s)

        def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
            self._see(items, now_s, is_settled=False)
            assert not items.in_use[row]
            assert not items.coming_bytes[row]
            assert tier == TierName.DRAM or self.engine.store.channel.write_row != row
            super().left(items, row, tier, now_s)

        def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
            assert not items.dram_bytes[row]
            assert not items.ssd_bytes[row]
            super().forgotten(items, row, now_s)

        def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
            self._see(items, now_s)
            return super().promotions(items, queue, now_s)  # type: ignore[no-any-return]

    policy.__class__ = Watched
    return policy


def contenders(workload: Workload) -> list[Callable[[], Placement]]:
    return [
        *PLACEMENTS.values(),
        lambda: Clairvoyant(workload),
        lambda: Clairvoyant(workload, exclusive=True),
        lambda: Whimsical(1),
        lambda: WhimsicalWholes(2),
    ]


machines = st.builds(
    machine,
    st.sampled_from([0, 40, 100, 250]),
    st.sampled_from([0, 60, 200, 2000]),
    ssd_bytes_per_s=st.sampled_from([1.0, 10.0, 60.0]),
    service_turns_per_s=st.sampled_from([0.3, 1.0, 4.0, None]),
    batch=st.sampled_from([1, 3]),
    prefill_tokens_per_s=st.just(60.0),
    blocking_loads=st.booleans(),
    always_load=st.booleans(),
    overflow_keeps=st.booleans(),
    session_ttl_s=st.sampled_from([5.0, math.inf]),
)
workloads = st.one_of(session_workloads(), session_workloads(context_tokens=90), path_workloads())


def played(workload: Workload, on: Machine, policy: Placement) -> tuple[Engine, Any]:
    policy = watched(policy)
    engine = Engine(workload, on, policy)
    policy.engine = engine  # type: ignore[attr-defined]
    return engine, engine.run()


@given(workloads, machines, st.data())
def test_tiers_channel_and_requests_keep_their_bounds_at_every_moment(
    workload: Workload, on: Machine, data: st.DataObject
) -> None:
    policy = data.draw(st.sampled_from(contenders(workload)))()
    engine, result = played(workload, on, policy)
    assert result.turns == workload.turns
    if result.turns_with_history:
        assert sum(getattr(result, share) for share in SHARES) == pytest.approx(1)
    assert not engine.items.in_use.any()
    assert (engine.items.queue_seq == -1).all()
    for space, column in ((engine.core.dram, engine.items.dram_bytes), (engine.core.ssd, engine.items.ssd_bytes)):
        free = [row for row in np.flatnonzero(column).tolist() if row not in engine.core.reading]
        if engine.store.channel.write_row in free:
            free.remove(engine.store.channel.write_row)
        assert set(free) <= set(space.rows.tolist())
        assert all(column[row] for row in space.rows)


class RecordedEverything(EverythingKept):
    """Counts the repeated blocks of requests, and how many of them an ended answer had stored."""

    def __init__(self) -> None:
        self.known = self.stored_before = 0.0
        self._stored: set[int] = set()

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        if items.uses[row] > 1:
            self.known += items.value[row]
            self.stored_before += items.value[row] * (row in self._stored)

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        self._stored.add(row)


# The fifth and the sixth request are dispatched together: the sixth has the item that the fifth still computes.
STILL_COMPUTED = paths([1, 1], (0.0, [0]), (1.0, [0]), (2.0, [0]), (2.5, [0]), (3.0, [0, 1]), (3.0, [0, 1]), (3.0, [0]))


@given(workloads, machines)
@example(STILL_COMPUTED, machine(service_turns_per_s=None, batch=3, prefill_tokens_per_s=60.0))
def test_with_endless_dram_all_that_was_stored_is_on_time_and_without_tiers_nothing_is(
    workload: Workload, on: Machine
) -> None:
    on = dataclasses.replace(on, overflow_keeps=True, session_ttl_s=math.inf)
    recorded = RecordedEverything()
    everything, nothing = simulate(workload, on, recorded), simulate(workload, on, "none")

    assert (everything.dram_late, everything.ssd, nothing.hit_rate) == (0, 0, 0)
    assert nothing.moved_gb == everything.moved_gb == 0
    if everything.turns_with_history:
        assert everything.dram_on_time == pytest.approx(recorded.stored_before / recorded.known)
        assert everything.dram_on_time == 1 or workload.shares_prefixes, "a session has one request at a time"
    if nothing.turns_with_history:
        assert nothing.miss == 1


def test_a_request_misses_the_blocks_that_another_one_is_computing() -> None:
    on = machine(service_turns_per_s=None, batch=3, prefill_tokens_per_s=60.0)

    result = simulate(STILL_COMPUTED, on, "infinite")

    assert result.dram_on_time == pytest.approx(6 / 7)
    assert result.miss == pytest.approx(1 / 7)


@settings(max_examples=8, deadline=None)
@given(workloads, machines)
def test_the_same_workload_gives_the_same_result(workload: Workload, on: Machine) -> None:
    for name in CONTENDERS:
        first, second = (
            dataclasses.replace(simulate(workload, on, name), seconds=0, turns_simulated_per_s=0) for _ in range(2)
        )
        assert first == second


def test_write_behind_is_the_same_for_every_policy() -> None:
    """If nothing must be evicted, and no policy can know that a session is over."""
    workload = sharegpt(sessions=60, think_s=20.0, seed=3)
    on = Machine(2000 * GIB, 4000 * GIB, 2.0 * GIB, MIB, service_turns_per_s=4.0)
    names = [name for name in PLACEMENTS if not name.startswith("foresight")]
    assert len({simulate(workload, on, name).ssd_written_gb for name in names}) == 1


def test_without_tiers_nothing_hits_and_with_one_only_that() -> None:
    workload = sharegpt(sessions=50, think_s=20.0, seed=4)
    for name in (*PLACEMENTS, "optimum"):
        for dram_gb, ssd_gb in ((0, 0), (8, 0), (0, 4000)):
            on = Machine(dram_gb * GIB, ssd_gb * GIB, 20.0 * GIB, MIB, service_turns_per_s=4.0)
            result = simulate(workload, on, name)
            assert (result.ssd + result.dram_late > 0.9) == (ssd_gb > 0)
            assert (result.dram_on_time > 0) == (dram_gb > 0)
            assert (result.hit_rate > 0) == (dram_gb + ssd_gb > 0)


def test_under_a_deep_queue_recency_keeps_nothing_on_time() -> None:
    workload = sharegpt(sessions=1200, seed=5)
    on = Machine(16 * GIB, 400 * GIB, 20.0 * GIB, int(0.78 * MIB), service_turns_per_s=1.9)
    result = simulate(workload, on, "lru", warmup_turns=1000)
    assert result.queue_p50 > 200
    assert result.dram_on_time <= 0.02


@pytest.mark.parametrize("load", [0.8, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_server_of_fixed_rate_has_the_mean_wait_of_theory(load: float) -> None:
    """M/D/1: load / (2 x rate x (1 - load)), by Pollaczek and Khinchine."""
    rng = np.random.default_rng(6)
    arrives_s = np.cumsum(rng.exponential(1 / load, 60_000))
    turns = sessions(*(Request(session, at_s, new_tokens=1) for session, at_s in enumerate(arrives_s.tolist())))
    result = simulate(turns, machine(), "none")
    waited_s = result.ttft_mean_s - result.service_ttft_mean_s
    assert waited_s == pytest.approx(load / (2 * (1 - load)), rel=0.06)
