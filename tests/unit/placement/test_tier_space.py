"""Victims by score: one sorted list serves several evictions, and no victim is taken from an outdated list."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.placement.tier_space import NO_ROW, RowEpochs, TierSpace
from kvservice.policy.items import Conditions, ItemTable
from kvservice.policy.placement import Placement


class ByNumber(Placement):
    """Each row has its score beside it."""

    name: ClassVar[str] = "by-number"

    def __init__(self, worth: NDArray[np.float64]) -> None:
        self.worth = worth
        self.asked = 0

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        self.asked += 1
        return self.worth[rows]


def space_of(count: int) -> tuple[TierSpace, ByNumber, RowEpochs]:
    policy = ByNumber(np.random.default_rng(count).permutation(count).astype(np.float64))
    row_epochs = RowEpochs(count)
    space = TierSpace(TierName.DRAM, 0, ItemTable(count, Conditions(0, 0, 1.0)), policy, row_epochs)
    for row in range(count):
        space.add(row)
    return space, policy, row_epochs


@pytest.mark.parametrize("count", [1, 7, 256, 300, 5000])
def test_victims_come_worst_first(count: int) -> None:
    space, policy, _ = space_of(count)
    space.begin_eviction()
    victims = []
    while (row := space.next_victim(0.0)) != NO_ROW:
        assert space.retention == policy.worth[row]
        space.discard(row)
        victims.append(row)
    assert victims == np.argsort(policy.worth).tolist()


def test_few_rows_are_ranked_whenever_victims_are_sought() -> None:
    space, policy, _ = space_of(200)
    for _ in range(5):
        space.begin_eviction()
        row = space.next_victim(0.0)
        policy.worth[row] = 1e9
    assert policy.asked == 5


def test_an_order_of_many_rows_serves_a_64th_of_them() -> None:
    space, policy, _ = space_of(6400)
    for _ in range(100):
        space.begin_eviction()
        space.discard(space.next_victim(0.0))
    assert policy.asked == 1
    space.discard(space.next_victim(0.0))
    assert policy.asked == 2


def test_what_something_happened_to_does_not_leave_by_the_order_before() -> None:
    space, policy, row_epochs = space_of(6400)
    first, second, third = np.argsort(policy.worth)[:3].tolist()
    assert space.next_victim(0.0) == first
    row_epochs.last[second] = row_epochs.epoch
    space.discard(first)
    space.begin_eviction()
    assert space.next_victim(0.0) == third


def test_a_victim_that_is_put_back_is_still_the_next() -> None:
    space, _, _ = space_of(6400)
    row = space.next_victim(0.0)
    space.put_back(row, space.retention)
    assert space.next_victim(0.0) == row


def test_what_is_held_is_no_candidate() -> None:
    space, policy, _ = space_of(10)
    first, second = np.argsort(policy.worth)[:2].tolist()
    space.discard(first)
    space.discard(first)
    space.begin_eviction()
    assert space.next_victim(0.0) == second
    assert sorted(space.rows.tolist()) == [row for row in range(10) if row != first]
    space.add(first)
    space.add(first)
    assert space.count == 10


def test_a_newcomer_leaves_at_once_where_newcomers_may_be_worth_least() -> None:
    class ByNumberAnew(ByNumber):
        newcomers_may_leave: ClassVar[bool] = True

    count = 5000
    policy = ByNumberAnew(np.arange(count, dtype=np.float64))
    row_epochs = RowEpochs(count)
    space = TierSpace(TierName.DRAM, 0, ItemTable(count, Conditions(0, 0, 1.0)), policy, row_epochs)
    for row in range(1, count):
        space.add(row)
    space.begin_eviction()
    assert space.next_victim(0.0) == 1
    space.discard(1)
    space.add(0)
    row_epochs.last[0] = row_epochs.epoch
    space.begin_eviction()
    assert space.next_victim(0.0) == 0
