"""The placement core by its events and commands: who leaves a tier, what is read ahead, what is known of an item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.placement.core import NO_ITEM, Evict, PlacementCore
from kvservice.placement.item_state import ItemPart
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable
from kvservice.policy.placement import Placement

DRAM, SSD = TierName.DRAM, TierName.SSD
FOR_ALL = math.inf


class ByNumber(Placement):
    """Item 0 has the lowest score, which is 0. Wants the promotions that a test gives it, and records its calls."""

    name: ClassVar[str] = "by-number"

    def __init__(self) -> None:
        self.wanted: list[Promotion] = []
        self.unwanted_on_ssd: set[int] = set()
        self.told: list[tuple[str, int]] = []

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return rows.astype(np.float64)

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        return row not in self.unwanted_on_ssd

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        return self.wanted

    def split(self, items: ItemTable, row: int, front_row: int, now_s: float) -> None:
        self.told.append(("split", row))

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float, kind: int = 0) -> None:
        self.told.append((hint, row))

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        self.told.append(("forgotten", row))


class WholeByNumber(ByNumber):
    whole_items: ClassVar[bool] = True


def core_of(
    items: int = 3,
    *,
    dram_bytes: int = 300,
    ssd_bytes: int = 1000,
    policy: Placement | None = None,
    block_bytes: int = 0,
) -> PlacementCore:
    """Every item has 100 bytes in DRAM, and was used once."""
    table = ItemTable(items, Conditions(dram_bytes, ssd_bytes, 1.0))
    core = PlacementCore(table, policy or ByNumber(), block_bytes)
    for item in range(items):
        run(core, item, 100)
    return core


def run(core: PlacementCore, item: int, size_bytes: int, now_s: float = 0.0) -> None:
    """A request for the item runs and stores it."""
    core.queued((item,), 7, now_s)
    core.hold(item)
    core.used((item,), 7, now_s)
    core.answered(item, 5, now_s)
    core.saved(item, size_bytes, now_s)
    core.release(item)
    core.stored((item,), now_s)


def written(core: PlacementCore, item: int) -> None:
    """What DRAM has of the item is copied to SSD."""
    size = core.write_began(item, int(core.items.dram_bytes[item]), 0.0)
    core.reserve(item, SSD, size)
    core.entered(item, SSD, size, 0.0)
    core.write_ended(item)


def carried_out(core: PlacementCore, tier: TierName, wanted_bytes: int, worth: float = FOR_ALL) -> list[Evict]:
    column = core.items.dram_bytes if tier is DRAM else core.items.ssd_bytes
    commands = []
    for command in core.victims(tier, wanted_bytes, worth, 0.0):
        item, keep_bytes, _ = command
        core.left(item, tier, int(column[item]) - keep_bytes, 0.0)
        commands.append(command)
    return commands


def only_on_ssd(core: PlacementCore, *items: int) -> None:
    for item in items:
        written(core, item)
        core.left(item, DRAM, int(core.items.dram_bytes[item]), 0.0)


# Eviction


def test_the_lowest_scores_leave_first_and_of_the_last_one_only_what_is_needed() -> None:
    core = core_of()
    assert carried_out(core, DRAM, 130) == [(0, 0, 0.0), (1, 70, 1.0)]
    assert core.items.dram_bytes.tolist() == [0, 70, 100]
    assert carried_out(core, DRAM, 140) == [(1, 60, 1.0)]
    assert core.dram.used_bytes == 160


def test_nothing_leaves_while_there_is_space() -> None:
    assert carried_out(core_of(dram_bytes=400), DRAM, 100) == []


def test_only_what_scores_below_a_reads_worth_leaves_for_it() -> None:
    core = core_of()
    assert [item for item, _, _ in carried_out(core, DRAM, 300, worth=2.0)] == [0, 1]
    assert core.items.dram_bytes.tolist() == [0, 0, 100]


def test_blocks_are_evicted_whole_and_so_are_the_items_of_a_policy_that_does_not_cut() -> None:
    assert carried_out(core_of(block_bytes=25), DRAM, 30) == [(0, 50, 0.0)]
    assert carried_out(core_of(policy=WholeByNumber()), DRAM, 30) == [(0, 0, 0.0)]
    assert carried_out(core_of(policy=WholeByNumber(), block_bytes=25), DRAM, 30) == [(0, 50, 0.0)]


def test_a_held_item_stays_until_its_last_hold_ends() -> None:
    core = core_of()
    core.hold(0)
    core.hold(0)
    core.release(0)
    assert [item for item, _, _ in core.victims(DRAM, 10, FOR_ALL, 0.0)] == [1, 2]
    core.release(0)
    assert next(core.victims(DRAM, 10, FOR_ALL, 0.0))[0] == 0


def test_a_victim_that_cannot_leave_now_is_passed_over_and_is_a_victim_again_later() -> None:
    core = core_of()
    left = []
    for command in core.victims(DRAM, 150, FOR_ALL, 0.0):
        item, keep_bytes, _ = command
        if item != 0:
            left.append(command)
            core.left(item, DRAM, 100 - keep_bytes, 0.0)
    assert left == [(1, 0, 1.0), (2, 50, 2.0)]
    assert next(core.victims(DRAM, 300, FOR_ALL, 0.0))[0] == 0


def test_an_item_that_no_tier_has_is_forgotten_unless_a_request_waits_for_it() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    core.queued((1,), 8, 0.0)
    carried_out(core, DRAM, 300)
    assert policy.told == [("forgotten", 0), ("forgotten", 2)]
    core.unqueued((1,), 8, 0.0)
    assert policy.told[2:] == [("forgotten", 1)]
    assert not core.items.live.any()


# Reads


def test_a_read_is_commanded_once_and_again_with_another_deadline() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    only_on_ssd(core, 0, 1)
    policy.wanted = [Promotion(0, 5.0, 3.0), Promotion(1, 6.0), Promotion(2, 7.0)]
    assert core.reads((), 0.0) == policy.wanted[:2]  # DRAM has item 2.
    policy.wanted = [Promotion(0, 5.0, 4.0), Promotion(1, 2.0)]
    assert core.reads((), 1.0) == [Promotion(1, 2.0)]
    assert core.reading[0].worth == 4.0


def test_what_a_request_uses_is_not_read_ahead() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    only_on_ssd(core, 0)
    core.hold(0)
    core.used((0,), NOT_QUEUED, 0.0)
    policy.wanted = [Promotion(0, 5.0)]
    assert core.reads((), 0.0) == []


def test_a_read_reserves_space_holds_its_item_and_leaves_what_has_come() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    only_on_ssd(core, 0)
    policy.wanted = [Promotion(0, 5.0)]
    core.reads((), 0.0)
    assert core.read_began(0) == 100
    assert core.reserve(0, DRAM, 100) == 100
    assert (core.dram.used_bytes, int(core.items.coming_bytes[0])) == (300, 100)
    assert [item for item, _, _ in core.victims(SSD, 1000, FOR_ALL, 0.0)] == []
    core.entered(0, DRAM, 60, 1.0)
    core.read_ended(0, unread_bytes=40)
    assert (core.dram.used_bytes, int(core.items.coming_bytes[0]), int(core.items.dram_bytes[0])) == (260, 0, 60)
    assert next(core.victims(DRAM, 300, FOR_ALL, 0.0))[0] == 0
    core.reads((), 2.0)
    assert core.read_began(0) == 40


def test_a_read_gets_whole_blocks_of_the_space_there_is_and_an_item_that_leaves_whole_gets_all_or_nothing() -> None:
    for policy, block_bytes, got in ((ByNumber(), 0, 90), (ByNumber(), 25, 75), (WholeByNumber(), 0, 0)):
        core = core_of(dram_bytes=290, policy=policy, block_bytes=block_bytes)
        only_on_ssd(core, 0)
        assert core.reserve(0, DRAM, 100) == got


def test_a_read_that_is_not_needed_any_more_does_not_begin_and_a_cancelled_one_may_be_asked_for_again() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    only_on_ssd(core, 0, 1)
    policy.wanted = [Promotion(0, 5.0), Promotion(1, 5.0)]
    assert len(core.reads((), 0.0)) == 2
    core.left(0, SSD, 100, 0.0)
    assert core.read_began(0) == 0
    core.read_cancelled(1)
    assert [read.row for read in core.reads((), 0.0)] == [1]


def test_the_read_to_stop_is_the_one_needed_last_of_those_that_take_space() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    only_on_ssd(core, 0, 1, 2)
    policy.wanted = [Promotion(0, 5.0), Promotion(1, 6.0), Promotion(2, 7.0)]
    core.reads((), 0.0)
    assert core.read_to_stop() == NO_ITEM
    for item in (0, 1):
        core.read_began(item)
        core.reserve(item, DRAM, 100)
    assert core.read_to_stop() == 1


def test_bytes_that_were_read_ahead_count_as_unused_if_they_leave_before_a_request() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    only_on_ssd(core, 0, 1)
    policy.wanted = [Promotion(0, 5.0), Promotion(1, 5.0)]
    core.reads((), 0.0)
    for item in (0, 1):
        core.read_began(item)
        core.reserve(item, DRAM, 100)
        core.entered(item, DRAM, 100, 1.0)
        core.read_ended(item)
    core.used((1,), NOT_QUEUED, 2.0)
    core.left(0, DRAM, 70, 3.0)
    core.left(1, DRAM, 100, 3.0)
    assert core.read_unused_bytes == 70


# Writes


def test_ssd_keeps_what_it_has_of_an_item_that_is_being_written() -> None:
    core = core_of(ssd_bytes=220)
    written(core, 0)
    run(core, 0, 150)
    written(core, 1)
    assert core.write_began(0, 150, 0.0) == 50
    assert [item for item, _, _ in carried_out(core, SSD, 50)] == [1]
    assert core.reserve(0, SSD, 50) == 50
    core.write_ended(0, unwritten_bytes=50)
    assert core.ssd.used_bytes == core.items.ssd_bytes.sum() == 170
    assert [item for item, _, _ in carried_out(core, SSD, 220)] == [0, 1]


def test_nothing_is_written_that_ssd_has_or_that_the_policy_does_not_want_there() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    written(core, 0)
    policy.unwanted_on_ssd = {1}
    assert [core.write_began(item, 100, 0.0) for item in range(3)] == [0, 0, 100]
    assert core_of(ssd_bytes=0).write_began(0, 100, 0.0) == 0


def test_what_ssd_evicted_is_unwanted_there_until_its_next_use() -> None:
    core = core_of()
    written(core, 0)
    core.left(0, SSD, 10, 0.0)
    assert core.items.unwanted_on_ssd[0]
    run(core, 0, 100)
    assert not core.items.unwanted_on_ssd[0]


# Requests


def test_an_item_waits_with_the_number_of_its_first_request() -> None:
    core = core_of()
    for number in (10, 11, 12):
        core.queued((0, 1), number, 0.0)
    core.unqueued((0,), 11, 0.0)
    core.unqueued((0,), 99, 0.0)  # It was never announced.
    core.used((0, 1), 10, 0.0)
    assert core.items.queue_seq.tolist() == [12, 11, NOT_QUEUED]
    core.used((1,), NOT_QUEUED, 0.0)
    core.used((0, 1), 12, 0.0)
    assert core.items.queue_seq.tolist() == [NOT_QUEUED, 11, NOT_QUEUED]
    assert core.items.in_use.tolist() == [2, 3, 0]


def test_of_one_request_the_prefix_is_used_last() -> None:
    core = core_of()
    core.used((2, 0, 1), NOT_QUEUED, 0.0)
    assert np.argsort(core.items.access_seq).tolist() == [1, 0, 2]


def test_a_hint_counts_until_the_next_request() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    core.hinted(0, Hint.ENDED, 1.0)
    assert (bool(core.items.ended[0]), float(core.items.hinted_at_s[0])) == (True, 1.0)
    core.queued((0,), 8, 2.0)
    core.hinted(0, Hint.TYPING, 3.0)
    core.used((0,), 8, 4.0)
    core.hinted(0, Hint.TYPING, 5.0)
    assert policy.told == [(Hint.ENDED, 0)]
    assert (bool(core.items.ended[0]), int(core.items.hint[0])) == (False, 0)


def test_an_item_is_idle_since_its_last_answer() -> None:
    core = core_of()
    run(core, 0, 100, now_s=5.0)
    assert (core.is_idle_since(0, 4.0), core.is_idle_since(0, 5.0)) == (False, True)
    core.queued((0,), 8, 6.0)
    assert not core.is_idle_since(0, 5.0)


def test_a_front_is_cut_off_both_tiers_and_a_dropped_item_is_forgotten() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    written(core, 0)
    core.left(0, DRAM, 40, 0.0)
    core.cut_front(0, 70)
    assert [int(column[0]) for column in (core.items.size_bytes, core.items.dram_bytes, core.items.ssd_bytes)] == [
        30,
        0,
        30,
    ]
    core.dropped(0, 0.0)
    assert (core.dram.used_bytes, core.ssd.used_bytes, policy.told) == (200, 0, [("forgotten", 0)])


# The table


def test_a_split_item_keeps_its_bytes_holds_and_queue_in_two_parts() -> None:
    policy = ByNumber()
    core = core_of(policy=policy)
    only_on_ssd(core, 1)
    policy.wanted = [Promotion(1, 5.0)]
    core.reads((), 0.0)
    core.read_began(1)
    core.reserve(1, DRAM, 100)
    core.entered(1, DRAM, 80, 0.0)
    core.queued((1,), 10, 0.0)
    core.queued((1,), 11, 0.0)
    core.grow(5)
    core.split(1, 3, ItemPart(60, 60, 60, 0, 0.6), 0.0)
    items = core.items
    assert (items.size_bytes[[3, 1]].tolist(), items.dram_bytes[[3, 1]].tolist()) == ([60, 40], [60, 20])
    assert (items.ssd_bytes[[3, 1]].tolist(), items.coming_bytes[[3, 1]].tolist()) == ([60, 40], [0, 20])
    assert items.value[[3, 1]].tolist() == pytest.approx([0.6, 0.4])
    assert policy.told == [("split", 1)]
    assert [item for item, _, _ in core.victims(DRAM, 200, FOR_ALL, 0.0)] == [0, 2]
    core.release(3)
    core.read_ended(1, unread_bytes=20)
    assert core.dram.used_bytes == items.dram_bytes.sum() == 280
    core.used((3, 1), 10, 0.0)
    assert items.queue_seq[[3, 1]].tolist() == [11, 11]
    core.left(1, DRAM, 20, 0.0)
    assert core.read_unused_bytes == 0


def test_a_table_that_grows_keeps_what_it_knows_and_has_space_for_new_items() -> None:
    core = core_of(dram_bytes=20_270)
    core.hold(1)
    core.grow(2000)
    for item in range(3, 2000):
        core.created(item)
        core.resized(item, 10)
        core.entered(item, DRAM, 10, 0.0)
    assert core.dram.used_bytes == 300 + 1997 * 10 == 20_270
    assert [item for item, _, _ in carried_out(core, DRAM, 100)] == [0]
    assert [item for item, _, _ in carried_out(core, DRAM, 205)] == [2, 3]
    assert core.items.access_seq[3] < core.items.access_seq[4]
