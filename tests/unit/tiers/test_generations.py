"""Generations: a client that reads in place detects that space was released, also across a daemon's restart."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvservice.blocks import Extent
from kvservice.tiers.arena import Arena, without_generations
from kvservice.tiers.dram import DramTier
from kvservice_api.arena import GENERATIONS_NAME, generations_file_bytes
from kvservice_api.image import PAGE_BYTES
from tests.file_faults import FaultyCalls

STORE = bytes(range(16))
MIB = 2**20
CAPACITY = 2 * MIB


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvservice-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def open_tier(shm: Path) -> Iterator[Callable[..., DramTier]]:
    """Opens the tier, after closing an earlier one. `kept` are the extents that records name."""
    opened: list[Arena] = []

    def open_tier(*kept: Extent, share: bool = True, calls: FaultyCalls | None = None) -> DramTier:
        while opened:
            opened.pop().close()
        opened.append(Arena.open(shm, STORE, CAPACITY, calls=calls))
        tier = DramTier(opened[-1])
        if share:
            tier.arena.share()
        columns = np.array(kept or np.zeros((0, 3)), np.uint64).reshape(-1, 3).T
        tier.adopt(*columns)
        return tier

    yield open_tier
    for arena in opened:
        arena.close()


def seen(tier: DramTier) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """All words, read as in another process."""
    data = (tier.arena.directory / GENERATIONS_NAME).read_bytes()
    return np.frombuffer(data, "<u4", tier.arena.capacity_bytes // PAGE_BYTES, PAGE_BYTES).copy()


def generations(tier: DramTier, *extents: Extent) -> list[int]:
    return tier.generations(np.array([extent.offset_bytes for extent in extents], np.int64))


def test_an_extents_generation_is_raised_by_its_release_and_by_nothing_else(open_tier: Callable[..., DramTier]) -> None:
    tier = open_tier()
    first, second = tier.reserve(100_000), tier.reserve(100_000)
    before = tuple(generations(tier, first, second))
    tier.release(first)
    again = tier.reserve(100_000)
    assert again == first
    assert tuple(generations(tier, first, second)) == (before[0] + 1, before[1])
    assert seen(tier)[first.offset_bytes // PAGE_BYTES] == before[0] + 1


def test_a_generation_starts_again_at_its_lowest_number_after_its_highest(open_tier: Callable[..., DramTier]) -> None:
    tier = open_tier()
    extent = tier.reserve(PAGE_BYTES)
    with (tier.arena.directory / GENERATIONS_NAME).open("r+b") as file:
        file.seek(PAGE_BYTES + 4 * (extent.offset_bytes // PAGE_BYTES))
        file.write(b"\xff" * 4)
    assert generations(tier, extent)[0] == 2**32 - 1
    tier.release(extent)
    assert generations(tier, extent)[0] == 0


def test_after_a_restart_only_what_records_name_has_its_generation_still(open_tier: Callable[..., DramTier]) -> None:
    """The generations of all other pages are raised: a client may still read there, and no release raised them."""
    tier = open_tier()
    extents = [tier.reserve(40_000) for _ in range(10)]
    before = seen(tier)
    kept = extents[2:5]
    after = seen(open_tier(*kept))
    raised = after != before
    assert not raised[[extent.offset_bytes // PAGE_BYTES for extent in kept]].any()
    assert raised.sum() == len(raised) - 3


def test_a_daemon_that_does_not_share_still_increments_existing_generations(open_tier: Callable[..., DramTier]) -> None:
    open_tier()
    tier = open_tier(share=False)
    assert tier.arena.not_shared_because == "dram.share is off"
    extent = tier.reserve(PAGE_BYTES)
    before = generations(tier, extent)[0]
    tier.release(extent)
    assert generations(tier, extent)[0] == before + 1


def test_an_arena_that_was_never_shared_has_no_generations_until_it_is(open_tier: Callable[..., DramTier]) -> None:
    arena_id = open_tier(share=False).arena.arena_id
    tier = open_tier()
    assert (tier.arena.arena_id, tier.arena.not_shared_because) == (arena_id, "")
    assert (tier.arena.directory / GENERATIONS_NAME).stat().st_blocks * 512 >= generations_file_bytes(
        CAPACITY - PAGE_BYTES
    )


@pytest.mark.parametrize("damage", ["gone", "short", "another arena's"])
def test_an_arena_that_lost_its_generations_is_replaced(open_tier: Callable[..., DramTier], damage: str) -> None:
    """A client may still read the old generations, which no daemon would ever raise."""
    tier = open_tier()
    arena_id, path = tier.arena.arena_id, tier.arena.directory / GENERATIONS_NAME
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        os.truncate(path, 100)
    else:
        path.write_bytes(path.read_bytes()[:8] + bytes(16) + path.read_bytes()[24:])
    assert open_tier().arena.arena_id != arena_id


def test_a_tmpfs_without_space_for_the_generations_has_an_arena_all_the_same(
    open_tier: Callable[..., DramTier],
) -> None:
    calls = FaultyCalls()
    tier = open_tier(share=False, calls=calls)
    calls.failing["posix_fallocate"] = errno.ENOSPC
    tier.arena.share()
    assert "No space left" in tier.arena.not_shared_because
    tier.release(tier.reserve(PAGE_BYTES))
    assert not (tier.arena.directory / GENERATIONS_NAME).exists()


@pytest.mark.parametrize("size", [0, 4096, 8192, 12_288, MIB, 10 * MIB + 4096, 3 << 30, 1 << 40])
def test_arena_and_generations_together_take_what_they_may_and_no_page_less(size: int) -> None:
    arena_bytes = without_generations(size)
    if arena_bytes:
        assert arena_bytes + generations_file_bytes(arena_bytes - PAGE_BYTES) <= size
    larger = arena_bytes + PAGE_BYTES
    assert larger + generations_file_bytes(larger - PAGE_BYTES) > size or arena_bytes == 0
