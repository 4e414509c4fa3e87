"""What foresight decides from the calls that it receives, without a simulator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.policy import ForesightPolicy, Placement
from kvservice.policy.base import Hint, Promotion, hint_kind
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable
from tests.contracts.placement import PlacementContract

DRAM, SSD = TierName.DRAM, TierName.SSD
SIZE = 1024
RATE = 1e6  # The SSD's rate: an item takes a millisecond.


class TestForesight(PlacementContract):
    worth_stands_still = False

    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return ForesightPolicy


class TestForesightUnlearned(PlacementContract):
    worth_stands_still = False

    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return partial(ForesightPolicy, learning=False)

    def test_it_is_known_by_its_name(self, make: Callable[[], Placement]) -> None:
        """Only the simulator has it, under another name."""


class Stage:
    """Items that are used one after the other, in DRAM or on SSD as a test says."""

    def __init__(self, items: int, *, dram_items: float = 4, ssd_items: float = 1e6, learning: bool = True) -> None:
        self.policy = ForesightPolicy(learning)
        self.conditions = Conditions(int(dram_items * SIZE), int(ssd_items * SIZE), RATE, turns_per_s=100.0)
        self.items = ItemTable(items, self.conditions)
        self.items.size_bytes[:] = SIZE
        self.now_s = 0.0

    def come(self, row: int, at_s: float) -> None:
        """A request that is dispatched at once."""
        self.now_s = at_s
        items = self.items
        items.live[row] = True
        items.queue_seq[row] = self.conditions.served
        self.policy.queued(items, row, at_s)
        items.queue_seq[row] = NOT_QUEUED
        self.conditions.served += 1
        items.uses[row] += 1
        self.policy.used(items, row, at_s)

    def answer(self, row: int, at_s: float, *, in_dram: bool = True) -> None:
        self.now_s = at_s
        items = self.items
        items.used_at_s[row] = at_s
        items.ssd_bytes[row] = items.size_bytes[row] if self.conditions.ssd_capacity_bytes else 0
        items.dram_bytes[row] = items.size_bytes[row] if in_dram else 0
        self.policy.stored(items, row, at_s)

    def hint(self, row: int, hint: Hint, at_s: float) -> None:
        self.now_s = at_s
        self.policy.hinted(self.items, row, hint, at_s)

    def asked(self, at_s: float) -> list[Promotion]:
        """All promotions that it requests when it scans all items at this time."""
        self.now_s = at_s
        self.policy.look_at_s = self.policy._looks.next_s = at_s
        return list(self.policy.promotions(self.items, [], at_s))

    def worth(self, *rows: int, tier: TierName = DRAM) -> list[float]:
        self.asked(self.now_s)
        worths: list[float] = self.policy.retention(self.items, np.array(rows), tier, self.now_s).tolist()
        return worths

    def teach(
        self, gap_s: Callable[[], float], *, returns: int = 1000, lead_s: Callable[[], float] | None = None
    ) -> None:
        """The last row returns repeatedly after such gaps, with a typing hint `lead_s` before."""
        items, at_s = self.items, 0.0
        row = items.row_count - 1
        for number in range(returns):
            self.come(row, at_s)
            self.answer(row, at_s)
            wait_s = gap_s()
            if lead_s:
                self.hint(row, Hint.TYPING, at_s + wait_s - lead_s())
            at_s += wait_s
            if self.policy.look_at_s <= at_s:
                self.policy.promotions(items, [], at_s)
            if number % 5 == 4:  # Another item has the row.
                self.policy.forgotten(items, row, at_s)
                items.uses[row] = 0
        self.come(row, at_s)
        items.in_use[row] = 1
        items.live[row] = False
        items.dram_bytes[row] = 0
        self.now_s = at_s
        self.policy._lru.follows = False  # As after a few times as many uses as DRAM has items.


def people(seed: int = 0) -> Callable[[], float]:
    """Return times in seconds; no user returns within 30 seconds."""
    random = np.random.default_rng(seed)
    return lambda: float(random.uniform(30, 50))


def test_before_it_learned_anything_what_was_used_last_is_worth_most() -> None:
    stage = Stage(4)
    for row in range(3):
        stage.come(row, 10.0 * row)
        stage.answer(row, 10.0 * row)
    assert np.argsort(stage.worth(0, 1, 2)).tolist() == [0, 1, 2]


def test_what_was_just_used_goes_before_what_soon_comes_back() -> None:
    stage = Stage(4)
    stage.teach(people())
    now_s = stage.now_s
    for row, age_s in enumerate((300.0, 32.0, 1.0)):
        stage.come(row, now_s + 300 - age_s)
        stage.answer(row, now_s + 300 - age_s)
    stage.now_s = now_s + 300
    gone, soon, fresh = stage.worth(0, 1, 2)
    assert soon > 5 * fresh and soon > 5 * gone


def test_without_learning_it_stays_with_recency() -> None:
    stage = Stage(4, learning=False)
    stage.teach(people())
    now_s = stage.now_s
    for row, age_s in enumerate((300.0, 32.0, 1.0)):
        stage.come(row, now_s + 300 - age_s)
        stage.answer(row, now_s + 300 - age_s, in_dram=row > 0)
    stage.now_s = now_s + 300
    assert np.argsort(stage.worth(0, 1, 2)).tolist() == [0, 1, 2]


def test_it_fetches_what_soon_comes_back_and_not_before() -> None:
    stage = Stage(4)
    stage.teach(people())
    stage.conditions.dram_capacity_bytes = 2 * SIZE
    now_s = stage.now_s
    for row in range(2):
        stage.come(row, now_s)
        stage.answer(row, now_s, in_dram=False)
    stage.come(2, now_s - 20)
    stage.answer(2, now_s - 20)
    stage.come(2, now_s + 27)
    stage.answer(2, now_s + 27)  # In DRAM, with no return soon.
    stage.conditions.dram_capacity_bytes = SIZE
    assert stage.asked(now_s + 5) == []
    assert len(stage.asked(now_s + 33)) == 1, "one more would have to leave for the second"
    stage.conditions.dram_capacity_bytes = 2 * SIZE
    assert sorted(promotion.row for promotion in stage.asked(now_s + 33.1)) == [0, 1]


def test_by_the_byte_a_small_session_is_worth_more_than_a_large_one() -> None:
    stage = Stage(4)
    stage.teach(people())
    for row in range(2):
        stage.come(row, stage.now_s)
        stage.answer(row, stage.now_s)
    stage.items.size_bytes[1] = stage.items.dram_bytes[1] = stage.items.ssd_bytes[1] = 10 * SIZE
    for tier in (TierName.DRAM, TierName.SSD):
        small, large = stage.worth(0, 1, tier=tier)
        assert small == pytest.approx(10 * large, rel=0.2)


def test_whose_session_has_ended_goes_first_and_is_not_written() -> None:
    stage = Stage(4)
    stage.teach(people())
    now_s = stage.now_s
    for row in range(2):
        stage.come(row, now_s)
        stage.answer(row, now_s)
    stage.hint(1, Hint.ENDED, now_s + 31)
    for tier in (TierName.DRAM, TierName.SSD):
        waits, ended = stage.worth(0, 1, tier=tier)
        assert ended < 1e-3 * waits
    assert stage.policy.wants_on_ssd(stage.items, 0, stage.now_s)
    assert not stage.policy.wants_on_ssd(stage.items, 1, stage.now_s)


def test_the_end_of_a_session_that_no_tier_has_any_more_changes_no_score() -> None:
    stage = Stage(2)
    stage.come(0, 0.0)
    stage.answer(0, 1.0)
    stage.items.dram_bytes[0] = stage.items.ssd_bytes[0] = 0
    stage.items.live[0] = False
    stage.policy.forgotten(stage.items, 0, 2.0)
    stage.hint(0, Hint.ENDED, 3.0)
    assert stage.worth(0)[0] < 1e-12


def test_what_a_hint_announces_is_fetched_when_it_is_time_and_worth_most() -> None:
    random = np.random.default_rng(1)
    stage = Stage(4, dram_items=1)
    stage.teach(lambda: float(random.uniform(30, 50)), lead_s=lambda: float(random.uniform(2, 5)))
    now_s = stage.now_s
    for row in (0, 1):
        stage.come(row, now_s)
        stage.answer(row, now_s, in_dram=row == 1)
    stage.hint(0, Hint.TYPING, now_s + 35)
    assert stage.policy.look_at_s < now_s + 36, "it does not wait for the next look at all of them"
    [promotion] = stage.asked(now_s + 36.9)
    assert promotion.row == 0
    assert promotion.deadline_s <= now_s + 37.5, "when the first of such requests come"
    hinted, other = stage.worth(0, 1)
    assert hinted > 3 * other


def test_hints_that_were_false_are_not_believed_any_more() -> None:
    random = np.random.default_rng(2)
    stage = Stage(4, dram_items=1)
    stage.teach(lambda: float(random.uniform(60, 90)), lead_s=lambda: float(random.uniform(40, 55)))
    now_s = stage.now_s
    for row in (0, 1):
        stage.come(row, now_s)
        stage.answer(row, now_s, in_dram=row == 1)
    stage.hint(0, Hint.TYPING, now_s + 20)
    assert stage.asked(now_s + 23) == []
    hinted, other = stage.worth(0, 1)
    assert hinted < 2 * other


def test_requests_that_wait_are_worth_most_and_the_first_of_them_the_very_most() -> None:
    stage = Stage(8, dram_items=8)
    stage.teach(people())
    for row in range(4):
        stage.come(row, stage.now_s)
        stage.answer(row, stage.now_s, in_dram=row < 2)
    for place, row in enumerate((1, 3, 2)):
        stage.items.queue_seq[row] = stage.conditions.served + place
        stage.conditions.queued += 1
        stage.policy.queued(stage.items, row, stage.now_s)
    asked = list(stage.policy.promotions(stage.items, [1, 3, 2], stage.now_s))
    assert [promotion.row for promotion in asked] == [3, 2], "in the order in which they are needed"
    assert asked[0].deadline_s == pytest.approx(stage.now_s + 0.01)
    assert asked[1].deadline_s == pytest.approx(stage.now_s + 0.02)
    first, second, third, thinks = stage.worth(1, 3, 2, 0)
    assert first > second > third > thinks


def test_a_queue_beyond_what_dram_holds_is_read_when_it_is_nearer() -> None:
    stage = Stage(8, dram_items=3)
    for row in range(6):
        stage.come(row, 1.0)
        stage.answer(row, 1.0, in_dram=False)
        stage.items.queue_seq[row] = stage.conditions.served + row
    stage.items.queue_seq[:6] = stage.conditions.served + np.arange(6)
    stage.conditions.queued = 6
    for row in range(6):
        stage.policy.queued(stage.items, row, 2.0)
    assert [wanted.row for wanted in stage.policy.promotions(stage.items, list(range(6)), 2.0)] == [0, 1, 2]


def test_it_sees_nothing_of_the_future() -> None:
    """Two items with the same past have the same score, also if their futures differ."""
    worths = []
    for later in (5.0, 500.0):
        stage = Stage(4)
        stage.teach(people())
        now_s = stage.now_s
        stage.come(0, now_s)
        stage.answer(0, now_s)
        worths.append(stage.worth(0))
        stage.come(0, now_s + later)
    assert worths[0] == worths[1]


@pytest.mark.parametrize("factor", [2.0**-4, 2.0**4])
def test_what_is_kept_does_not_depend_on_the_unit_of_bytes(factor: float) -> None:
    worths = []
    for scale in (1.0, factor):
        stage = Stage(4)
        stage.items.size_bytes[:] = int(SIZE * scale)
        stage.conditions.ssd_bytes_per_s = RATE * scale
        stage.conditions.dram_capacity_bytes = int(4 * SIZE * scale)
        stage.teach(people())
        for row, age_s in enumerate((35.0, 3.0)):
            stage.come(row, stage.now_s + 100 - age_s)
            stage.answer(row, stage.now_s)
            stage.now_s -= 100 - age_s
        stage.items.dram_bytes[:2] = stage.items.ssd_bytes[:2] = int(SIZE * scale)
        stage.now_s += 100
        worths.append(np.array(stage.worth(0, 1)) * scale)
    assert worths[1] == pytest.approx(worths[0], rel=1e-6)


def test_among_equals_the_prefix_is_worth_more_than_what_continues_it() -> None:
    stage = Stage(4, dram_items=4, ssd_items=0)
    for row in (2, 1, 0):
        stage.items.access_seq[row] = 10 - row
        stage.answer(row, 5.0)
    assert np.argsort(stage.worth(0, 1, 2)).tolist() == [2, 1, 0]


def test_with_no_ssd_what_leaves_is_lost_and_what_may_come_back_some_day_is_worth_keeping() -> None:
    """Of two items without a return soon, recency would keep the wrong one."""
    stage = Stage(4, ssd_items=0)
    stage.teach(people())
    now_s = stage.now_s
    for row, age_s in enumerate((70.0, 5.0)):
        stage.come(row, now_s + 100 - age_s)
        stage.answer(row, now_s + 100 - age_s)
    stage.now_s = now_s + 100
    gone, waits = stage.worth(0, 1)
    assert waits > 2 * gone


# Seconds


def test_without_the_engines_rates_a_use_counts_as_the_table_says_and_with_them_by_its_seconds() -> None:
    """A large session saves more, by as much as it takes more space."""
    shares = {}
    for computed_per_s in (0.0, RATE):
        stage = Stage(4)
        stage.conditions.recompute_bytes_per_s = computed_per_s
        stage.teach(people())
        for row in range(2):
            stage.come(row, stage.now_s)
            stage.answer(row, stage.now_s)
        stage.items.size_bytes[1] = stage.items.dram_bytes[1] = stage.items.ssd_bytes[1] = 10 * SIZE
        small, large = stage.worth(0, 1)
        shares[computed_per_s] = small / large
    assert shares == pytest.approx({0.0: 10.0, RATE: 1.0}, rel=0.2)


def test_what_is_computed_sooner_than_read_is_neither_written_nor_read_ahead() -> None:
    written, read = {}, {}
    for wait_s in (0.0, 10.0):
        stage = Stage(4)
        stage.conditions.recompute_bytes_per_s, stage.conditions.demand_wait_s = RATE, wait_s
        stage.teach(people())
        now_s = stage.now_s
        stage.come(0, now_s)
        stage.answer(0, now_s, in_dram=False)
        stage.asked(now_s + 1)
        written[wait_s] = stage.policy.wants_on_ssd(stage.items, 0, now_s + 1)
        stage.conditions.link_bytes_per_s = math.inf if not wait_s else RATE
        read[wait_s] = len(stage.asked(now_s + 33))
    assert written == {0.0: True, 10.0: False}
    assert read == {0.0: 1, 10.0: 0}


# Following `lru`


def taught_by_lru(dram_items: int, *, kept: bool) -> Stage:
    """Items return after ten others, in turn. The store has them in DRAM then, or not."""
    stage = Stage(64, dram_items=dram_items)
    for number in range(3000):
        row, at_s = number % 11, float(number)
        stage.come(row, at_s)
        stage.answer(row, at_s + 0.5)
        stage.items.dram_bytes[row] = SIZE if kept else 0
        if stage.policy.look_at_s <= at_s:
            stage.policy.promotions(stage.items, [], at_s)
    stage.items.access_seq[:11] = (5, 4, 3, 2, 1, 11, 10, 9, 8, 7, 6)
    stage.items.dram_bytes[:11] = SIZE
    return stage


def by_recency(stage: Stage) -> bool:
    return bool((np.argsort(stage.worth(*range(11))) == np.argsort(stage.items.access_seq[:11])).all())


def test_until_lru_would_have_replaced_dram_some_times_recency_decides() -> None:
    assert by_recency(taught_by_lru(12, kept=True)), "DRAM never was full"
    assert not by_recency(taught_by_lru(8, kept=True))


def test_where_lru_would_have_more_recency_decides_again() -> None:
    stage = taught_by_lru(8, kept=True)
    stage.conditions.dram_capacity_bytes = stage.policy._lru.shadow._capacity_bytes = 12 * SIZE
    for number in range(3000, 6000):
        row, at_s = number % 11, float(number)
        stage.come(row, at_s)
        stage.answer(row, at_s + 0.5, in_dram=False)
    assert by_recency(stage)


def test_a_store_that_forgets_what_lru_would_have_kept_is_behind_it() -> None:
    """The item comes back in another row, with the same key."""
    stage = Stage(64, dram_items=12, ssd_items=0)
    stage.items.key[:] = np.arange(64) % 11 + 100
    for number in range(3000):
        row, at_s = number % 64, float(number)
        stage.items.key[row] = 100 + number % 11
        stage.items.uses[row] = 1
        stage.items.live[row] = True
        stage.answer(row, at_s)
        stage.policy._lru.follows = stage.policy._lru.shadow.is_ahead
        stage.policy.forgotten(stage.items, row, at_s + 5)
    assert stage.policy._lru.follows


# Tool calls


def test_a_tool_that_most_often_ends_within_seconds_keeps_its_session_where_it_is() -> None:
    """Another tool takes minutes. Both were called three seconds ago."""
    random = np.random.default_rng(3)
    stage = Stage(6)
    quick, slow = hint_kind("grep"), hint_kind("build")
    at_s = 0.0
    for number in range(1500):
        stage.come(5, at_s)
        stage.answer(5, at_s)
        is_quick = number % 2 == 0
        stage.policy.hinted(stage.items, 5, Hint.TOOL_CALL, at_s, quick if is_quick else slow)
        at_s += float(random.uniform(6, 9) if is_quick else random.uniform(200, 300))
        if stage.policy.look_at_s <= at_s:
            stage.policy.promotions(stage.items, [], at_s)
    stage.policy._lru.follows = False
    for row, kind in enumerate((quick, slow)):
        stage.come(row, at_s)
        stage.answer(row, at_s)
        stage.policy.hinted(stage.items, row, Hint.TOOL_CALL, at_s, kind)
    stage.now_s = at_s + 3
    soon, late = stage.worth(0, 1)
    assert quick != slow and soon > 20 * late


def test_names_have_the_same_kind_in_every_process() -> None:
    assert [hint_kind(name) for name in ("", "grep", "build")] == [0, 1, 3]


# Over restarts


def test_what_was_learned_is_used_after_a_restart() -> None:
    before = Stage(4)
    before.teach(people())
    state = before.policy.state()
    assert len(state) < 45_000
    after = Stage(4)
    assert after.policy.restore(state)
    for row, age_s in enumerate((300.0, 32.0, 1.0)):
        after.come(row, 400 - age_s)
        after.answer(row, 400 - age_s)
    after.policy._lru.follows = False
    after.now_s = 400.0
    gone, soon, fresh = after.worth(0, 1, 2)
    assert soon > 5 * fresh and soon > 5 * gone


@pytest.mark.parametrize("change", [lambda state: state[:-8], lambda state: b"KVPL\x09" + state[5:], lambda _: b""])
def test_a_state_of_another_length_or_version_is_refused(change: Callable[[bytes], bytes]) -> None:
    stage = Stage(4)
    stage.teach(people(), returns=50)
    fresh = ForesightPolicy()
    assert not fresh.restore(change(stage.policy.state()))
    assert fresh.state() == b""


def test_a_policy_that_has_begun_is_not_restored() -> None:
    stage = Stage(4)
    stage.teach(people(), returns=50)
    assert not stage.policy.restore(stage.policy.state())
