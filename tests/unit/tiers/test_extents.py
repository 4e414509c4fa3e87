"""The space map beside a plain model: a list with one entry per page."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvservice.tiers.extents import SpaceMap, extent_size
from kvservice_api.errors import TierFull

PAGE = 4096
KIB, MIB = 2**10, 2**20

sizes = st.one_of(st.integers(1, 20 * PAGE), st.integers(1, 2 * MIB))


class SpaceMapMachine(RuleBasedStateMachine):
    """Drives a map and the model side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[bool] = [False] * 600  # True: in use.
        self.space = SpaceMap(len(self.pages) * PAGE)
        self.reserved: list[tuple[int, int]] = []

    def runs(self) -> list[int]:
        """Lengths of the free runs, in pages."""
        return [len(list(group)) for used, group in itertools.groupby(self.pages) if not used]

    def mark(self, offset: int, size: int, used: bool) -> None:
        first, end = offset // PAGE, (offset + size) // PAGE
        assert self.pages[first:end] == [not used] * (size // PAGE)
        self.pages[first:end] = [used] * (size // PAGE)

    @rule(size=sizes)
    def reserve(self, size: int) -> None:
        taken = extent_size(size)
        fitting = [run for run in self.runs() if run * PAGE >= taken]
        try:
            offset = self.space.reserve(size)
        except TierFull:
            assert not fitting
            return
        before = sorted(self.runs())
        self.mark(offset, taken, True)
        self.reserved.append((offset, taken))
        # Best fit: exactly one of the shortest fitting runs has become shorter.
        before.remove(min(fitting))
        rest = min(fitting) - taken // PAGE
        assert sorted(self.runs()) == sorted([*before, rest] if rest else before)

    @rule(first=st.integers(0, 599), count=st.integers(1, 40))
    def take(self, first: int, count: int) -> None:
        pages = self.pages[first : first + count]
        taken = self.space.take(first * PAGE, count * PAGE)
        assert taken == (len(pages) == count and not any(pages))
        if taken:
            self.mark(first * PAGE, count * PAGE, True)
            self.reserved.append((first * PAGE, count * PAGE))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        offset, size = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.space.release(offset, size)
        self.mark(offset, size, False)

    @precondition(lambda self: not all(self.pages))
    @rule(data=st.data())
    def release_what_is_free(self, data: st.DataObject) -> None:
        free = [page for page, used in enumerate(self.pages) if not used]
        page = data.draw(st.sampled_from(free))
        with pytest.raises(AssertionError):
            self.space.release(page * PAGE, PAGE)

    @rule(pages=st.integers(0, 50))
    def grow(self, pages: int) -> None:
        self.pages += [False] * pages
        self.space.grow(len(self.pages) * PAGE)

    @rule()
    def start_again(self) -> None:
        """As after a restart: the same state, from the extents alone."""
        again = SpaceMap(len(self.pages) * PAGE)
        reserved = np.array(self.reserved, np.int64).reshape(-1, 2)
        again.adopt(reserved[:, 0], reserved[:, 1])
        assert again.used_bytes == self.space.used_bytes
        assert again.largest_free_bytes == self.space.largest_free_bytes
        self.space = again

    @invariant()
    def the_numbers_agree(self) -> None:
        assert self.space.capacity_bytes == len(self.pages) * PAGE
        assert self.space.used_bytes == sum(self.pages) * PAGE
        assert self.space.largest_free_bytes == max(self.runs(), default=0) * PAGE


SpaceMapMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


TestSpaceMapBesideThePlainModel = SpaceMapMachine.TestCase


@given(st.integers(1, 2**34))
def test_rounding_wastes_little_and_never_cuts(size: int) -> None:
    taken = extent_size(size)

    assert taken >= size
    assert taken % PAGE == 0
    assert taken - size < max(PAGE, size / 32)
    assert extent_size(taken) == taken


@pytest.mark.parametrize("size", [64 * 1024, 2 * MIB, 32 * MIB])
def test_a_power_of_two_with_and_without_the_page_of_a_trailer_wastes_nothing(size: int) -> None:
    assert extent_size(size) == size
    assert extent_size(size + PAGE) == size + PAGE


def test_freed_neighbours_become_one_run_again() -> None:
    space = SpaceMap(12 * PAGE)
    offsets = [space.reserve(4 * PAGE) for _ in range(3)]

    for offset in (offsets[0], offsets[2], offsets[1]):
        space.release(offset, 4 * PAGE)

    assert space.reserve(12 * PAGE) == 0


def test_a_full_map_names_the_longest_free_run() -> None:
    space = SpaceMap(8 * PAGE)
    space.reserve(4 * PAGE)

    with pytest.raises(TierFull, match=f"the longest has {4 * PAGE}"):
        space.reserve(5 * PAGE)


def test_an_empty_map_reserves_nothing_until_it_grows() -> None:
    space = SpaceMap(0)
    with pytest.raises(TierFull):
        space.reserve(1)

    space.grow(PAGE)

    assert space.reserve(1) == 0


def test_extents_outside_the_map_are_not_adopted() -> None:
    for offset, size in ((8 * PAGE, PAGE), (7 * PAGE, 2 * PAGE), (-PAGE, PAGE), (PAGE, -PAGE), (1, PAGE), (0, 0)):
        space = SpaceMap(8 * PAGE)
        with pytest.raises(ValueError, match="outside"):
            space.adopt(np.array([offset]), np.array([size]))
        assert space.used_bytes == 0


def test_very_many_extents_are_adopted_sooner_than_they_are_sorted_into_a_dict() -> None:
    """0.1 s on an otherwise idle machine; one by one it would take much longer."""
    count, size = 200_000, 64 * KIB
    offsets = np.random.default_rng(1).permutation(count) * (size + PAGE)  # The worst case: a gap after each extent.
    space = SpaceMap(count * (size + PAGE))

    started = time.thread_time()
    space.adopt(offsets, np.full(count, size))

    took_s = time.thread_time() - started
    started = time.thread_time()
    places = offsets.tolist()
    plain = dict(sorted(zip(places, places, strict=True)))
    plain_s = time.thread_time() - started
    print(f"{took_s:.2f} s, and {plain_s:.2f} s for a dict")
    assert len(plain) == count
    assert took_s < plain_s
    assert space.used_bytes == count * size
    assert space.largest_free_bytes == PAGE
