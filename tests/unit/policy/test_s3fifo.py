"""S3-FIFO: the contract, and the authors' algorithm in plain Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW, TierName
from kvservice.policy import Placement, S3FifoPolicy
from kvservice.policy.items import Conditions, ItemTable
from tests.contracts.placement import PlacementContract, played
from tests.items import SmallMover


class TestS3Fifo(PlacementContract):
    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return S3FifoPolicy


class Reference:
    """Algorithm 1 of the paper, item by item, with sizes. The right end of a queue is its old one.

    The paper has no items in use: here a scan skips them, and they keep their place.
    """

    def __init__(self, capacity_bytes: int, sizes: dict[int, int]) -> None:
        self.capacity_bytes, self.sizes = capacity_bytes, sizes
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghost: deque[int] = deque()
        self.freq: dict[int, int] = {}
        self.in_use: set[int] = set()
        self.dropped: list[int] = []

    def begin(self, item: int) -> None:
        self.in_use.add(item)
        if item in self.freq:
            self.freq[item] = min(self.freq[item] + 1, 3)

    def end(self, item: int) -> None:
        if item not in self.freq:
            queue = self.small
            if item in self.ghost:
                self.ghost.remove(item)
                queue = self.main
            while self.bytes_of(self.freq) + self.sizes[item] > self.capacity_bytes and set(self.freq) - self.in_use:
                self.evict()
            queue.appendleft(item)
            self.freq[item] = 0
        self.in_use.remove(item)
        while self.bytes_of(self.freq) > self.capacity_bytes:
            self.evict()  # The items in use left no space for it.

    def bytes_of(self, items: Iterable[int]) -> int:
        return sum(self.sizes[item] for item in items)

    def evict(self) -> None:
        small = [item for item in reversed(self.small) if item not in self.in_use]
        main = [item for item in reversed(self.main) if item not in self.in_use]
        if small and (self.bytes_of(self.small) >= self.capacity_bytes // 10 or not main):
            item = small[0]
            self.small.remove(item)
            if self.freq[item] > 1:
                self.main.appendleft(item)
                self.freq[item] = 0
                return
            self.ghost.appendleft(item)
            while self.bytes_of(self.ghost) > self.capacity_bytes - self.capacity_bytes // 10:
                self.ghost.pop()
        else:
            item = main[0]
            self.main.remove(item)
            if self.freq[item] > 0:
                self.main.appendleft(item)
                self.freq[item] -= 1
                return
        del self.freq[item]
        self.dropped.append(item)


def compare(capacity_bytes: int, sizes: dict[int, int], steps: Iterable[tuple[int, int, bool]]) -> Reference:
    """Each step uses an item several times; the last use may continue until the item's next step."""
    reference = Reference(capacity_bytes, sizes)
    mover = SmallMover(S3FifoPolicy(), capacity_bytes, 0, row_count=len(sizes))
    for item, uses, goes_on in steps:
        for use in range(uses):
            if item in reference.in_use:
                reference.end(item)
                mover.end(item, sizes[item])
            reference.begin(item)
            mover.request(item)
            mover.begin()
            if use < uses - 1 or not goes_on:
                reference.end(item)
                mover.end(item, sizes[item])
            assert [dropped for _, dropped in mover.moves] == reference.dropped
    return reference


@example(  # Two move to the main queue before one of them leaves it.
    15,
    [1, 1, 1, 1, 2, 6, 1, 6] + [1] * 12,
    [
        (1, 3, False),
        (4, 2, True),
        (7, 2, True),
        (0, 3, False),
        (5, 2, False),
        (0, 1, False),
        (5, 1, False),
        (1, 1, False),
    ],
)
@given(
    capacity_bytes=st.integers(5, 60),
    sizes=st.lists(st.integers(1, 6), min_size=20, max_size=20),
    steps=st.lists(
        st.tuples(st.integers(0, 19) | st.integers(0, 5), st.integers(1, 4), st.sampled_from([False, False, True])),
        max_size=150,
    ),
)
def test_it_drops_what_the_algorithm_drops(
    capacity_bytes: int, sizes: list[int], steps: list[tuple[int, int, bool]]
) -> None:
    compare(capacity_bytes, dict(enumerate(sizes)), steps)


@pytest.mark.parametrize("goes_on", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_it_drops_what_the_algorithm_drops_in_a_long_trace(seed: int, goes_on: float) -> None:
    random = np.random.default_rng(seed)
    sizes = dict(enumerate(random.integers(1, 10, 200).tolist()))
    popularity = 1 / np.arange(1, 201) ** 0.8
    items = random.choice(200, 1500, p=popularity / popularity.sum()).tolist()
    uses = random.choice([1, 2, 3, 4], 1500, p=[0.7, 0.1, 0.15, 0.05]).tolist()
    reference = compare(400, sizes, zip(items, uses, (random.random(1500) < goes_on).tolist(), strict=True))
    assert len(reference.dropped) > 300 and reference.main and reference.ghost


def test_a_scan_of_what_is_used_once_leaves_the_main_queue_alone() -> None:
    mover = SmallMover(S3FifoPolicy(), 20, 0, row_count=200)
    for item in [*range(10)] * 3:
        mover.turn(item, 1)
    for item in range(10, 150):
        mover.turn(item, 1)
    assert all(item >= 10 for _, item in mover.moves)


def test_what_comes_back_while_the_ghost_remembers_it_is_not_sifted_again() -> None:
    mover = SmallMover(S3FifoPolicy(), 10, 0)
    for item in range(11):
        mover.turn(item, 1)
    assert mover.moves[-1].item == 0
    mover.turn(0, 1)
    for item in range(20, 29):
        mover.turn(item, 1)
    assert 0 not in [item for _, item in mover.moves[1:]]


def test_what_is_in_use_keeps_its_place_while_the_hands_go_past_it() -> None:
    mover = SmallMover(S3FifoPolicy(), 10, 0)
    for item in range(10):
        mover.turn(item, 1)
    mover.request(0)
    mover.begin()
    assert mover.evict(TierName.DRAM, 3) == [1, 2, 3]
    mover.end(0, 1)
    assert mover.evict(TierName.DRAM, 2) == [0, 4]


def test_what_room_is_made_for_leaves_only_when_nothing_else_is_there() -> None:
    mover = SmallMover(S3FifoPolicy(), 30, 0)
    for item, size_bytes in ((1, 1), (2, 1), (3, 30), (4, 31)):
        mover.turn(item, size_bytes)
    assert [item for _, item in mover.moves] == [1, 2, 3, 4]


def test_an_end_that_leaves_keeps_the_rest_in_its_place() -> None:
    table, policy = ItemTable(3, Conditions(30, 0, 1e9)), S3FifoPolicy()
    table.size_bytes[:] = 10
    for row in range(3):
        policy.used(table, row, 0.0)
        table.dram_bytes[row] = 10
        policy.arrived(table, row, TierName.DRAM, 0.0)
    rows = np.arange(3)
    before = policy.retention(table, rows, TierName.DRAM, 0.0)
    table.dram_bytes[0] = 4
    policy.left(table, 0, TierName.DRAM, 0.0)
    assert (policy.retention(table, rows, TierName.DRAM, 0.0) == before).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_next_to_leave_is_the_one_of_the_lowest_score(seed: int) -> None:
    mover = played(S3FifoPolicy(), seed=seed)
    for tier in (TierName.DRAM, TierName.SSD):
        held = mover.idle_in(tier)
        for rows in (held, held[::3], held[:0]):
            places = np.full(mover.table.row_count, NO_ROW, np.int32)
            places[rows] = np.arange(len(rows))
            worth = mover.policy.retention(mover.table, rows, tier, mover.now_s)
            first = rows[worth.argmin()] if len(rows) else NO_ROW
            assert mover.policy.next_to_leave(mover.table, tier, places.data, begins=True) == first


def test_it_has_state_for_rows_that_the_table_got_later() -> None:
    policy = S3FifoPolicy()
    small, large = ItemTable(10, Conditions(100, 0, 1e9)), ItemTable(5000, Conditions(100, 0, 1e9))
    for table, row in ((small, 9), (large, 4999), (large, 3000)):
        table.dram_bytes[row] = table.size_bytes[row] = 10
        policy.arrived(table, row, TierName.DRAM, 0.0)
    large.dram_bytes[9] = 10
    worth = policy.retention(large, np.array([9, 4999, 3000]), TierName.DRAM, 0.0)
    assert (np.argsort(worth) == [0, 1, 2]).all()
