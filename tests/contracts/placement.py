"""The contract of every policy over items. Subclass it, provide `make`, inherit the specification."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.policy import PLACEMENTS, Placement
from kvservice.policy.base import Hint
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable
from tests.items import SmallMover

ITEMS = 40


def played(
    policy: Placement, *, seed: int, turns: int = 150, reuse: bool = False, comebacks: bool = True
) -> SmallMover:
    """A mover after some turns of sessions of different sizes, with a queue and more data than fits into the tiers.

    Without `comebacks`, an item that was dropped is never asked for again.
    """
    random = np.random.default_rng(seed)
    mover = SmallMover(policy, 100, 200, row_count=2 * turns, reuse=reuse)
    play(mover, random, turns, comebacks)
    return mover


def play(mover: SmallMover, random: np.random.Generator, turns: int, comebacks: bool = True) -> None:
    known = {item for item in mover.row_of if mover.table.live[mover.row_of[item]]}
    busy = {mover.item_of[row] for row in mover.queue}
    sizes = {item: int(mover.table.size_bytes[mover.row_of[item]]) for item in known}
    newest = max(mover.item_of.values(), default=0)
    for _ in range(turns):
        for _ in range(int(random.integers(0, 3))):
            candidates = sorted(known - busy)
            if candidates and random.random() < 0.7:
                item = candidates[int(random.integers(len(candidates)) * random.random())]
            else:
                newest += 1
                item = newest
            known.add(item)
            busy.add(item)
            mover.request(item)
        if mover.queue:
            item = mover.begin()
            sizes[item] = sizes.get(item, 0) + int(random.integers(1, 6))
            sizes[item] = min(sizes[item], 20)
            mover.end(item, sizes[item])
            busy.discard(item)
        if not comebacks:
            known = {item for item in known if item in mover.row_of and mover.table.live[mover.row_of[item]]}


class PlacementContract:
    #: Whether a score depends on past events alone: then a batch is evicted in the order of single evictions.
    worth_stands_still = True

    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        raise NotImplementedError("each policy's tests override this fixture")

    @pytest.fixture(params=range(3))
    def mover(self, make: Callable[[], Placement], request: pytest.FixtureRequest) -> SmallMover:
        return played(make(), seed=request.param)

    def test_it_is_known_by_its_name(self, make: Callable[[], Placement]) -> None:
        assert make().name in PLACEMENTS and make() is not make()

    def test_it_explains_every_item(self, mover: SmallMover) -> None:
        table = mover.table
        for row in np.flatnonzero(table.live).tolist():
            for tier in (TierName.DRAM, TierName.SSD):
                inputs = mover.policy.explain(table, row, tier, mover.now_s)
                assert inputs["size_bytes"] == table.size_bytes[row]
                assert all(math.isfinite(value) for value in inputs.values())
                assert ("requests_before_it" in inputs) == (table.queue_seq[row] != NOT_QUEUED)

    @pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
    def test_every_item_has_one_worth(self, mover: SmallMover, tier: TierName) -> None:
        residents = mover.idle_in(tier)
        assert len(residents) > 3, "the test has something to look at"
        for rows in (residents, residents[::3], np.empty(0, np.int64)):
            worth = mover.policy.retention(mover.table, rows, tier, mover.now_s)
            assert worth.shape == rows.shape and worth.dtype == np.float64
            assert np.isfinite(worth).all()

    @pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
    def test_an_items_worth_depends_on_the_state_alone(self, mover: SmallMover, tier: TierName) -> None:
        rows, policy = mover.idle_in(tier), mover.policy
        worth = policy.retention(mover.table, rows, tier, mover.now_s)
        order = np.random.default_rng(1).permutation(len(rows))
        assert (policy.retention(mover.table, rows, tier, mover.now_s) == worth).all(), "not on being asked before"
        assert (policy.retention(mover.table, rows[order], tier, mover.now_s) == worth[order]).all(), "nor on the order"
        assert (policy.retention(mover.table, rows[2:5], tier, mover.now_s) == worth[2:5]).all(), "nor on who else is"

    def test_it_answers_for_every_item_and_changes_nothing(self, mover: SmallMover) -> None:
        table, policy, now_s = mover.table, mover.policy, mover.now_s
        for column in vars(table).values():
            if isinstance(column, np.ndarray):
                column.flags.writeable = False
        for row in np.flatnonzero(table.live).tolist():
            assert policy.wants_in_dram(table, row, now_s) in (True, False)
            assert policy.wants_on_ssd(table, row, now_s) in (True, False)
            policy.hinted(table, row, Hint.TYPING, now_s)
            policy.queued(table, row, now_s)
            policy.used(table, row, now_s)
            policy.stored(table, row, now_s)
            for tier in (TierName.DRAM, TierName.SSD):
                policy.left(table, row, tier, now_s)
                policy.retention(table, mover.idle_in(tier), tier, now_s)
                policy.arrived(table, row, tier, now_s)
            policy.promotions(table, mover.queue, now_s)
            policy.forgotten(table, row, now_s)

    def test_it_asks_for_what_ssd_has_and_dram_has_not(self, make: Callable[[], Placement]) -> None:
        for seed in range(5):
            mover = played(make(), seed=seed)
            for item in list(mover.row_of)[:ITEMS]:
                row = mover.row_of[item]
                if mover.table.queue_seq[row] == NOT_QUEUED:
                    mover.request(item)
            asked = mover.policy.promotions(mover.table, mover.queue, mover.now_s)
            for row, due_s, worth in asked:
                assert mover.table.ssd_bytes[row] > mover.table.dram_bytes[row]
                assert mover.now_s <= due_s < math.inf and not math.isnan(worth)
            assert len({promotion.row for promotion in asked}) == len(asked)
            assert mover.policy.look_at_s > mover.now_s, "it says when to ask again"

    @pytest.mark.parametrize("seed", range(4))
    def test_a_row_tells_nothing_of_the_item_that_had_it_before(self, make: Callable[[], Placement], seed: int) -> None:
        apart = played(make(), seed=seed, comebacks=False)
        reused = played(make(), seed=seed, comebacks=False, reuse=True)
        assert max(reused.item_of) < max(apart.item_of), "rows were used again"
        assert reused.moves == apart.moves

    @pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
    @pytest.mark.parametrize("seed", range(4))
    def test_a_batch_leaves_in_the_order_in_which_single_items_would(
        self, make: Callable[[], Placement], seed: int, tier: TierName
    ) -> None:
        if not self.worth_stands_still:
            pytest.skip("what others are worth may change when one leaves")
        at_once, one_by_one = played(make(), seed=seed), played(make(), seed=seed)
        for count in (3, 1, 8, 2, ITEMS):
            assert at_once.evict(tier, count, rank_once=True) == one_by_one.evict(tier, count)
            for mover in (at_once, one_by_one):
                play(mover, np.random.default_rng(count), 10)
            assert at_once.moves == one_by_one.moves, "and it knows the same afterwards"

    @pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
    def test_a_prefix_is_worth_no_less_than_what_continues_it(
        self, make: Callable[[], Placement], tier: TierName
    ) -> None:
        """Items of one request, the suffix first in every order that the table keeps."""
        table, policy = ItemTable(8, Conditions(80, 80, 1e9)), make()
        path = np.arange(8)
        table.size_bytes[:] = 10
        table.live[:] = True
        for uses in (1, 2, 3):
            table.uses[:] = uses
            for number, row in enumerate(path[::-1].tolist()):
                table.access_seq[row] = 100 * uses + number
                policy.used(table, row, 10.0 * uses)
            for number, row in enumerate(path[::-1].tolist()):
                if uses == 1:
                    for arrivals in (table.dram_seq, table.ssd_seq):
                        arrivals[row] = number + 1
                    table.dram_bytes[row] = table.ssd_bytes[row] = 10
                    for each in (TierName.DRAM, TierName.SSD):
                        policy.arrived(table, row, each, 10.0)
                table.used_at_s[row] = 10.0 * uses + 1
                policy.stored(table, row, 10.0 * uses + 1)
            worth = policy.retention(table, path, tier, 10.0 * uses + 2)
            assert (np.diff(worth) <= 0).all()

    @pytest.mark.slow
    def test_a_million_items_are_ranked_in_less_than_a_few_calls_take_for_each(
        self, make: Callable[[], Placement]
    ) -> None:
        """Under 20 microseconds each, on an otherwise idle machine."""
        count, random = 1_000_000, np.random.default_rng(0)
        table, policy = ItemTable(count, Conditions(count * 5, count * 10, 1e9)), make()
        rows = np.arange(count)
        table.size_bytes[:] = table.dram_bytes[:] = table.ssd_bytes[:] = 10
        table.access_seq[:] = random.permutation(count)
        table.dram_seq[:], table.ssd_seq[:] = random.permutation(count), random.permutation(count)
        table.used_at_s[:] = random.uniform(0, 1000, count)
        table.uses[:] = 2
        table.live[:] = True
        began_s = time.thread_time()
        for row in rows.tolist():
            policy.used(table, row, 1.0)
            policy.arrived(table, row, TierName.DRAM, 1.0)
            policy.arrived(table, row, TierName.SSD, 1.0)
            policy.stored(table, row, 1.0)
        calls_s = time.thread_time() - began_s
        for tier in (TierName.DRAM, TierName.SSD):
            began_s = time.thread_time()
            policy.retention(table, rows, tier, 1001.0)
            took_s = time.thread_time() - began_s
            print(f"{took_s:.2f} s, and {calls_s:.2f} s for four calls each")
            assert took_s < calls_s
