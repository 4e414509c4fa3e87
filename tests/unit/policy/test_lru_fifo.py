"""LRU and FIFO over items, and the common behaviour of all policies without foresight."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvservice.blocks import TierName
from kvservice.policy import FifoPolicy, LookaheadPolicy, LruPolicy, Placement, S3FifoPolicy
from tests.contracts.placement import PlacementContract
from tests.items import Move, SmallMover


class TestFifoOverItems(PlacementContract):
    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return FifoPolicy


class TestLruOverItems(PlacementContract):
    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return LruPolicy


def test_fifo_drops_what_came_first_however_it_was_used_since() -> None:
    mover = SmallMover(FifoPolicy(), 3, 0)
    for item in (1, 2, 3):
        mover.turn(item, 1)
    mover.turn(1, 1)
    mover.turn(4, 1)
    assert mover.moves == [Move("drop", 1)]


def test_lru_drops_what_was_used_the_longest_ago() -> None:
    mover = SmallMover(LruPolicy(), 3, 0)
    for item in (1, 2, 3):
        mover.turn(item, 1)
    mover.turn(1, 1)
    mover.turn(4, 1)
    assert mover.moves == [Move("drop", 2)]


def test_fifo_counts_what_comes_back_from_ssd_as_new_in_dram_and_as_old_on_ssd() -> None:
    mover = SmallMover(FifoPolicy(), 2, 3)
    for item in (1, 2, 3):
        mover.turn(item, 1)  # DRAM: 2, 3. SSD: 1, 2, 3.
    mover.turn(1, 1)
    assert mover.evict(TierName.DRAM, 1) == [3]
    assert mover.evict(TierName.SSD, 1) == [1]


@pytest.mark.parametrize("make", [LruPolicy, FifoPolicy, S3FifoPolicy, LookaheadPolicy])
def test_what_ssd_gave_up_is_not_written_there_again_before_it_is_used(make: Callable[[], Placement]) -> None:
    """It had the lowest score there, so a new copy would only evict another item."""
    mover = SmallMover(make(), 4, 4)
    for item in (1, 2):
        mover.turn(item, 1)
    assert mover.evict(TierName.SSD, 1) == [1]
    assert not mover.policy.wants_on_ssd(mover.table, mover.row_of[1], mover.now_s)
    mover.turn(1, 1)
    assert mover.table.ssd_bytes[mover.row_of[1]] == 1
