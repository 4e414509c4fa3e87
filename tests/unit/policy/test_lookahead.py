"""The paper's policy: its example, its windows, and what it may cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvservice.blocks import TierName
from kvservice.policy import LookaheadPolicy, Placement
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable
from tests.contracts.placement import PlacementContract
from tests.items import Move, SmallMover

DRAM, SSD = TierName.DRAM, TierName.SSD


class TestLookahead(PlacementContract):
    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return LookaheadPolicy


def figure_9() -> SmallMover:
    """DRAM has KV4 and KV2, KV1 whose job runs, and a free place; SSD has KV9, KV8, KV7 and KV3. Jobs 2 to 9 wait."""
    mover = SmallMover(LookaheadPolicy(dram_kept_free=1 / 4), 4, 4)
    for session in (9, 8, 7, 3):
        mover.place(session, SSD, 1)
    for session in (4, 2, 1):
        mover.place(session, DRAM, 1)
    mover.request(1)
    assert mover.begin() == 1
    return mover


def test_it_fetches_demotes_and_drops_what_the_papers_figure_9_does() -> None:
    mover = figure_9()
    for session in range(2, 10):
        mover.request(session, look=False)
    policy = mover.policy
    assert isinstance(policy, LookaheadPolicy)
    assert policy.prefetch_window(mover.table) == 2, "jobs 2 and 3"
    assert policy.eviction_window(mover.table) == 6, "jobs 2 to 7"
    assert not mover.moves
    mover.look()
    assert mover.moves == [Move("fetch", 3), Move("drop", 9), Move("demote", 4)], "room for KV4 comes before KV4"


# Windows


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10**10)), min_size=1, max_size=30),
    forgotten=st.sets(st.integers(0, 9)),
    running=st.dictionaries(st.integers(10, 19), st.integers(0, 10**10), max_size=3),
    dram_bytes=st.integers(0, 10**12),
    ssd_bytes=st.integers(0, 10**14),
    kept_free=st.sampled_from([0.0, 1 / 32, 0.25]),
)
def test_the_windows_are_the_papers(
    sizes: list[tuple[int, int]],
    forgotten: set[int],
    running: dict[int, int],
    dram_bytes: int,
    ssd_bytes: int,
    kept_free: float,
) -> None:
    """L_pw = floor(C_mem / S_kv), L_ev = floor((C_mem + C_disk) / S_kv)."""
    table, policy = ItemTable(20, Conditions(dram_bytes, ssd_bytes, 1e9)), LookaheadPolicy(kept_free)
    for row, size_bytes in sizes:
        table.size_bytes[row] = size_bytes
        policy.stored(table, row, 1.0)
    for row in forgotten:
        policy.forgotten(table, row, 2.0)
    for row, size_bytes in running.items():
        table.dram_bytes[row] = size_bytes
        policy.used(table, row, 3.0)
    known = {row: size_bytes for row, size_bytes in sizes if row not in forgotten}
    if not known:
        assert policy.prefetch_window(table) > 10**9, "nothing is known that would limit it"
        return
    average = Fraction(sum(known.values()), len(known))
    free_bytes = max(0, dram_bytes - int(dram_bytes * kept_free) - sum(running.values()))
    assert policy.prefetch_window(table) == floor(free_bytes / average)
    assert policy.eviction_window(table) == floor((free_bytes + ssd_bytes) / average)


class Watched(SmallMover):
    """Checks each move against the window of that moment."""

    one_size = False

    def outside(self) -> NDArray[np.bool_]:
        policy, seq = self.policy, self.table.queue_seq
        assert isinstance(policy, LookaheadPolicy)
        end = self.conditions.served + policy.eviction_window(self.table)
        outside: NDArray[np.bool_] = (seq == NOT_QUEUED) | (seq >= end)
        return outside

    def _leave(self, row: int, tier: TierName) -> None:
        outside, table = self.outside(), self.table
        if not outside[row] and (tier is DRAM or table.ssd_bytes[row] > table.dram_bytes[row]):
            others = self.idle_in(tier)
            assert not outside[others].any(), "something outside the window could have left the tier instead"
        super()._leave(row, tier)

    def note(self, move: Move) -> None:
        if move.what == "drop" and self.one_size:
            outside, row, table = self.outside(), self.row_of[move.item], self.table
            idle = (table.dram_bytes + table.ssd_bytes > 0) & (table.in_use == 0)
            idle[row] = False
            assert outside[row] or not (idle & outside).any(), "something outside the window could have been dropped"
        if move.what == "fetch":
            kept_free_bytes = int(self.policy.dram_kept_free * self.conditions.dram_capacity_bytes)
            assert self.free_bytes(DRAM) >= kept_free_bytes
        super().note(move)


STEPS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)) | st.none(), max_size=120)


def run(mover: SmallMover, steps: list[tuple[int, int] | None], size_bytes: int | None) -> None:
    """A number: that session's request comes, if it has none; None: the queue's first is served."""
    growth: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for step in steps:
        if step is not None and step[0] not in growth:
            growth[step[0]] = step[1]
            mover.request(step[0])
        elif step is None and mover.queue:
            item = mover.begin()
            sizes[item] = size_bytes or sizes.get(item, 0) + growth[item]
            del growth[item]
            mover.end(item, sizes[item])


@given(steps=STEPS, dram_bytes=st.integers(4, 20), ssd_bytes=st.integers(0, 30))
def test_nothing_inside_the_window_leaves_a_tier_before_what_is_outside(
    steps: list[tuple[int, int] | None], dram_bytes: int, ssd_bytes: int
) -> None:
    run(Watched(LookaheadPolicy(), dram_bytes, ssd_bytes), steps, None)


@given(steps=STEPS, dram_bytes=st.integers(2, 8), ssd_bytes=st.integers(0, 10))
def test_no_item_inside_the_window_is_dropped_while_one_outside_exists(
    steps: list[tuple[int, int] | None], dram_bytes: int, ssd_bytes: int
) -> None:
    mover = Watched(LookaheadPolicy(), dram_bytes, ssd_bytes)
    mover.one_size = True
    run(mover, steps, 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_window_holds_in_overload(seed: int) -> None:
    """Many more sessions wait than the tiers can hold."""
    random = np.random.default_rng(seed)
    mover = Watched(LookaheadPolicy(1 / 8), 8, 24, row_count=200)
    mover.one_size = True
    waiting: set[int] = set()
    for _ in range(600):
        item = int(random.integers(0, 150))
        if item not in waiting:
            waiting.add(item)
            mover.request(item)
        if random.random() < 0.5 and mover.queue:
            item = mover.begin()
            waiting.discard(item)
            mover.end(item, 1)
    what = [what for what, _ in mover.moves]
    assert what.count("drop") > 50 and what.count("fetch") > 20 and len(mover.queue) > 20


# What leaves


def test_what_no_request_waits_for_leaves_first_and_the_tail_of_the_queue_next() -> None:
    mover = SmallMover(LookaheadPolicy(), 6, 6)
    for item in range(1, 7):
        mover.turn(item, 1)
    for item in (5, 1, 3):
        mover.request(item)
    for tier in (TierName.DRAM, TierName.SSD):
        assert mover.evict(tier, 6) == [2, 4, 6, 3, 1, 5]


def test_ssd_gives_up_a_copy_of_what_dram_has_before_the_only_one_of_a_session_that_waits() -> None:
    mover = SmallMover(LookaheadPolicy(), 4, 4)
    for item in (1, 2):
        mover.place(item, SSD, 1)
    mover.turn(3, 1)
    for item in (3, 1, 2):
        mover.request(item, look=False)
    assert mover.evict(SSD, 3) == [3, 2, 1]


def test_what_runs_makes_no_room_on_ssd() -> None:
    mover = SmallMover(LookaheadPolicy(), 8, 2)
    for item in (1, 2):
        mover.place(item, SSD, 1)
        mover.request(item)
    mover.begin()
    mover.place(3, DRAM, 1)
    mover.request(3, look=False)
    row = mover.row_of[3]
    assert mover.policy.wants_on_ssd(mover.table, row, 0.0), "DRAM has KV2 as well: it is not lost with its copy"
    mover.begin()
    assert not mover.policy.wants_on_ssd(mover.table, row, 0.0)


def test_only_what_is_needed_sooner_takes_the_place_of_another_that_is_needed() -> None:
    mover = SmallMover(LookaheadPolicy(), 2, 2)
    for item, tier in ((1, DRAM), (2, SSD), (3, SSD), (4, DRAM)):
        mover.place(item, tier, 1)
    for item in (1, 2, 3, 4):
        mover.request(item, look=False)
    wants = [mover.policy.wants_on_ssd(mover.table, mover.row_of[item], 0.0) for item in (1, 4)]
    assert wants == [True, False]


def test_nothing_that_is_needed_is_dropped_while_dram_has_something_that_is_not() -> None:
    mover = SmallMover(LookaheadPolicy(), 2, 2)
    for item, tier in ((1, DRAM), (2, SSD), (3, SSD), (4, DRAM)):
        mover.place(item, tier, 1)
    for item in (1, 2, 3):
        mover.request(item, look=False)
    row = mover.row_of[1]
    assert not mover.policy.wants_on_ssd(mover.table, row, 0.0), "nobody needs KV4: it leaves DRAM before KV1 must"
    assert mover.evict(DRAM, 1) == [4]
    assert mover.policy.wants_on_ssd(mover.table, row, 0.0)


def test_what_runs_takes_no_place_of_what_is_needed() -> None:
    mover = SmallMover(LookaheadPolicy(), 1, 2)
    for item, tier in ((1, DRAM), (2, SSD), (3, SSD)):
        mover.place(item, tier, 1)
    for item in (1, 2, 3):
        mover.request(item, look=False)
    mover.begin()
    assert not mover.policy.wants_on_ssd(mover.table, mover.row_of[1], 0.0)


def test_what_is_larger_than_the_ssd_is_not_wanted_there() -> None:
    mover = SmallMover(LookaheadPolicy(), 8, 2)
    mover.place(1, DRAM, 3)
    assert not mover.policy.wants_on_ssd(mover.table, mover.row_of[1], 0.0)


# What comes


class CountingQueue(deque[int]):
    """Counts how many places of it were looked at."""

    looked = 0

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        self.looked += 1
        return super().__getitem__(place)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for item in super().__iter__():
            self.looked += 1
            yield item


def waiting(count: int, dram_bytes: int) -> tuple[ItemTable, LookaheadPolicy, CountingQueue]:
    """So many sessions on SSD, of one byte each, wait in the order of their rows."""
    table = ItemTable(count, Conditions(dram_bytes, count, 1e9))
    policy = LookaheadPolicy(0.0)
    table.size_bytes[:] = table.ssd_bytes[:] = 1
    table.queue_seq[:] = np.arange(count)
    table.conditions.queued = count
    for row in range(count):
        policy.stored(table, row, 0.0)
    return table, policy, CountingQueue(range(count))


def test_it_fetches_the_prefetch_window_in_the_order_of_the_queue() -> None:
    table, policy, queue = waiting(100, 10)
    table.ssd_bytes[3] = 0  # Nowhere.
    table.dram_bytes[5] = 1  # In DRAM.
    table.coming_bytes[7] = 1  # Being read.
    table.conditions.turns_per_s = 2.0
    asked = policy.promotions(table, queue, 50.0)
    assert [promotion.row for promotion in asked] == [0, 1, 2, 4, 6, 8, 9]
    assert [promotion.deadline_s for promotion in asked] == [50 + row / 2 for row in (0, 1, 2, 4, 6, 8, 9)]
    rows = np.array([0, 1, 2, 4, 6, 8, 9])
    assert [each.worth for each in asked] == policy.retention(table, rows, DRAM, 50.0).tolist()


def test_a_prefix_that_several_requests_wait_for_is_fetched_once() -> None:
    table, policy, _ = waiting(10, 10)
    table.queue_seq[:] = [0, 0, 1, 1, 2, *[NOT_QUEUED] * 5]
    table.conditions.queued = 3
    queue = deque([0, 1, 0, 2, 3, 0, 2, 4])
    assert [promotion.row for promotion in policy.promotions(table, queue, 0.0)] == [0, 1, 2, 3, 4]
    table.dram_bytes[[0, 1, 3, 4]] = 1
    assert [promotion.row for promotion in policy.promotions(table, queue, 0.0)] == [2], "all of the window is seen"


def serve(table: ItemTable, policy: LookaheadPolicy, queue: deque[int]) -> None:
    """The queue's first has its turn, and needs no place in DRAM."""
    row = queue.popleft()
    table.conditions.served += 1
    table.conditions.queued -= 1
    table.queue_seq[row] = NOT_QUEUED
    policy.used(table, row, 1.0)
    policy.stored(table, row, 1.0)


def test_a_turn_costs_a_look_at_what_came_into_the_window() -> None:
    table, policy, queue = waiting(10_000, 5_000)
    assert len(policy.promotions(table, queue, 0.0)) == 5_000
    table.dram_bytes[:5_000] = 1
    for turn in range(20):
        queue.looked = 0
        serve(table, policy, queue)
        assert policy.look_at_s <= 1.0, "the window moved"
        assert [promotion.row for promotion in policy.promotions(table, queue, 1.0)] == [5_000 + turn]
        assert queue.looked < 50


def test_what_left_dram_while_its_request_waits_within_the_window_is_fetched_again() -> None:
    table, policy, queue = waiting(1_000, 500)
    policy.promotions(table, queue, 0.0)
    table.dram_bytes[:500] = 1
    table.dram_bytes[400] = 0
    policy.left(table, 400, DRAM, 1.0)
    serve(table, policy, queue)
    assert [promotion.row for promotion in policy.promotions(table, queue, 1.0)] == [400, 500]


def test_what_found_no_room_is_asked_for_again_when_its_turn_is_near() -> None:
    table, policy, queue = waiting(1_000, 500)
    policy.promotions(table, queue, 0.0)
    table.dram_bytes[:500] = 1
    table.dram_bytes[100] = 0  # Was asked for, and nobody came to read it.
    asked = [set[int]() for _ in range(100)]
    for turn in range(100):
        serve(table, policy, queue)
        asked[turn] = {promotion.row for promotion in policy.promotions(table, queue, 1.0)}
    assert all(100 in rows for rows in asked[75:])


def test_a_request_that_comes_within_the_window_is_looked_at_at_once() -> None:
    mover = SmallMover(LookaheadPolicy(0.0), 4, 8)
    for item in range(1, 8):
        mover.turn(item, 1)
    mover.moves.clear()
    mover.request(1)
    assert mover.moves == [Move("demote", 4), Move("fetch", 1)]
