"""The SSD tier on a real file system, with and without the page cache: its contract, and its files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvservice.tiers import ssd_files
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.files import FileCalls
from kvservice.tiers.ssd import SsdTier
from kvservice_api.errors import TierFull
from tests.contracts.tier import KIB, MIB, PAGE, TierContract, columns, content, noise, stored
from tests.file_faults import FaultyCalls
from tests.ssd_tiers import CAPACITY, OTHER_STORE, STORE, Direct, OpenTier, path_of


class TestSsdTierPastThePageCache(TierContract):
    @pytest.fixture
    def tier(self, open_tier: OpenTier) -> SsdTier:
        tier = open_tier(direct="auto")
        if not tier.is_direct:
            pytest.skip("this file system has no O_DIRECT")
        return tier


class TestSsdTierThroughThePageCache(TierContract):
    @pytest.fixture
    def tier(self, open_tier: OpenTier) -> SsdTier:
        tier = open_tier(direct="off")
        assert not tier.is_direct
        return tier


class TestSsdTierOfSeveralFiles(TierContract):
    @pytest.fixture
    def tier(self, open_tier: OpenTier) -> SsdTier:
        return open_tier(files=3)


# The files


def test_files_are_allocated_whole_and_stay_within_the_capacity(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier(files=2, capacity_bytes=CAPACITY + 5)

    found = [path_of(tmp_path, number).stat() for number in range(2)]
    assert sum(each.st_size for each in found) <= CAPACITY
    assert all(each.st_blocks * 512 >= each.st_size for each in found)
    assert tier.capacity_bytes == CAPACITY - 2 * PAGE  # One header per file.


def test_files_are_closed_to_other_users(open_tier: OpenTier, tmp_path: Path) -> None:
    open_tier()
    assert path_of(tmp_path).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("direct", ["auto", "off"])
async def test_bytes_survive_a_restart(open_tier: OpenTier, calls: FaultyCalls, direct: Direct) -> None:
    first, data = open_tier(files=2), [noise(MIB), noise(MIB)]
    extents = [await stored(first, each) for each in data]
    assert {extent.segment for extent in extents} == {0, 1}
    first.close()
    calls.made.clear()

    second = open_tier(files=2, direct=direct)
    second.adopt(*columns(extents))

    assert [await content(second, extent, MIB) for extent in extents] == data
    assert "posix_fallocate" not in calls.names()
    first._files.clear()  # Closed already.


@pytest.fixture
def made(open_tier: OpenTier, tmp_path: Path) -> Path:
    """The file of a tier that was closed."""
    tier = open_tier()
    tier.close()
    tier._files.clear()
    return path_of(tmp_path)


def test_a_file_that_is_not_ours_is_refused_and_left_alone(open_tier: OpenTier, made: Path) -> None:
    foreign = os.urandom(CAPACITY)
    made.write_bytes(foreign)
    with pytest.raises(StoreMismatch, match=f"{made} is no SSD file of this version: move it away"):
        open_tier()
    assert made.read_bytes() == foreign


def test_an_empty_file_is_refused(open_tier: OpenTier, made: Path) -> None:
    made.write_bytes(b"")
    with pytest.raises(StoreMismatch, match="is no SSD file"):
        open_tier()


def test_a_file_of_another_store_is_refused(open_tier: OpenTier, made: Path) -> None:
    with pytest.raises(StoreMismatch, match=f"{made} belongs to another store"):
        open_tier(store_id=OTHER_STORE)


def test_a_truncated_file_is_refused(open_tier: OpenTier, made: Path) -> None:
    os.truncate(made, CAPACITY // 2)
    with pytest.raises(StoreMismatch, match=f"has {CAPACITY // 2} bytes, and its header says {CAPACITY}: it was cut"):
        open_tier()


async def test_a_tier_grows_and_keeps_its_bytes(open_tier: OpenTier) -> None:
    first, data = open_tier(), noise(MIB)
    extent = await stored(first, data)
    first.close()
    first._files.clear()

    second = open_tier(capacity_bytes=2 * CAPACITY)

    second.adopt(*columns([extent]))
    assert second.capacity_bytes == 2 * CAPACITY - PAGE
    assert await content(second, extent, MIB) == data


def test_a_file_that_cannot_grow_keeps_its_size(open_tier: OpenTier, calls: FaultyCalls, made: Path) -> None:
    calls.failing["posix_fallocate"] = errno.ENOSPC
    with pytest.raises(OSError, match=f"cannot grow from {CAPACITY - PAGE} to {2 * CAPACITY - PAGE} bytes"):
        open_tier(capacity_bytes=2 * CAPACITY)
    assert made.stat().st_size == CAPACITY
    calls.failing.clear()
    assert open_tier().capacity_bytes == CAPACITY - PAGE


async def test_a_tier_that_is_to_be_smaller_keeps_its_size_until_it_is_truncated(
    open_tier: OpenTier, tmp_path: Path
) -> None:
    first, data = open_tier(capacity_bytes=2 * CAPACITY), noise(MIB)
    extents = [await stored(first, noise(CAPACITY - MIB)), await stored(first, data)]
    first.close()
    first._files.clear()

    second = open_tier()
    assert second.is_too_large
    second.adopt(*columns(extents[1:]))
    second.shrink()
    with pytest.raises(TierFull):
        second.reserve(CAPACITY)
    moved = await stored(second, data)
    second.release(extents[1])
    second.truncate()

    assert path_of(tmp_path).stat().st_size == CAPACITY
    assert second.capacity_bytes == CAPACITY - PAGE
    assert second.used_bytes == MIB
    assert await content(second, moved, MIB) == data


def test_a_file_that_leaves_is_deleted_when_it_is_empty(open_tier: OpenTier, tmp_path: Path) -> None:
    first = open_tier(files=2)
    first.close()
    first._files.clear()

    second = open_tier(files=2, leaving=[0])
    second.shrink()
    assert {second.reserve(PAGE).segment for _ in range(20)} == {1}
    second.truncate()

    assert not path_of(tmp_path, 0).exists()
    assert path_of(tmp_path, 1).stat().st_size == CAPACITY


def test_files_that_changed_places_are_refused(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier(files=2)
    tier.close()
    tier._files.clear()
    one, other = path_of(tmp_path, 0), path_of(tmp_path, 1)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(StoreMismatch, match="is the store's SSD file 1, and file 0 is expected there"):
        open_tier(files=2)


def test_a_disk_too_small_for_a_file_is_named_and_nothing_is_left(
    open_tier: OpenTier, calls: FaultyCalls, tmp_path: Path
) -> None:
    calls.failing["posix_fallocate"] = errno.ENOSPC

    with pytest.raises(OSError, match=f"No space left on device: an SSD file of {CAPACITY} bytes") as refusal:
        open_tier()

    assert refusal.value.errno == errno.ENOSPC
    assert refusal.value.filename == str(path_of(tmp_path))
    assert not list(path_of(tmp_path).parent.iterdir())
    calls.failing.clear()
    open_tier()


def test_a_file_that_a_killed_daemon_left_unfinished_is_created_again(open_tier: OpenTier, tmp_path: Path) -> None:
    path = path_of(tmp_path)
    path.parent.mkdir()
    path.with_name(path.name + ".partial").write_bytes(os.urandom(MIB))

    open_tier()

    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_new_file_is_durable_before_it_gets_its_name(open_tier: OpenTier, calls: FaultyCalls) -> None:
    open_tier(direct="off")
    assert calls.names() == ["open", "posix_fallocate", "fdatasync", "open"]


@pytest.mark.parametrize("call", ["open_direct", "preadv", "pwritev"])
async def test_the_page_cache_is_used_where_a_probe_of_o_direct_fails(
    open_tier: OpenTier, calls: FaultyCalls, call: str
) -> None:
    calls.failing[call] = errno.EINVAL
    tier = open_tier()
    calls.failing.clear()

    assert not tier.is_direct
    data = noise(64 * KIB)
    assert await content(tier, await stored(tier, data), len(data)) == data


async def test_the_probe_leaves_the_header_as_it_is(open_tier: OpenTier, made: Path) -> None:
    before = made.read_bytes()[:PAGE]
    open_tier(direct="auto")
    assert made.read_bytes()[:PAGE] == before


async def test_blocks_are_spread_over_the_files(open_tier: OpenTier) -> None:
    tier = open_tier(files=4)
    extents = [tier.reserve(128 * KIB) for _ in range(16)]
    assert sorted(extent.segment for extent in extents) == sorted([0, 1, 2, 3] * 4)


async def test_a_block_goes_where_it_fits(open_tier: OpenTier) -> None:
    tier = open_tier(files=2)
    large = tier.reserve(5 * MIB)
    assert tier.reserve(5 * MIB).segment != large.segment
    with pytest.raises(TierFull):
        tier.reserve(5 * MIB)
    tier.release(large)
    assert tier.reserve(5 * MIB).segment == large.segment


def test_a_missing_file_that_may_not_be_created_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    paths = [tmp_path / f"drive-{number}" / "ssd.kv" for number in range(2)]

    for creatable in ([], [0], [1]):
        with pytest.raises(StoreMismatch, match=r"is missing.*mount its drive.*kvservice check --repair"):
            SsdTier.open(paths, store_id=STORE, capacity_bytes=CAPACITY, io_threads=1, creatable=creatable)
        assert not any(path.exists() for path in paths)

    SsdTier.open(paths, store_id=STORE, capacity_bytes=CAPACITY, io_threads=1, creatable=[0, 1]).close()
    SsdTier.open(paths, store_id=STORE, capacity_bytes=CAPACITY, io_threads=1, creatable=[]).close()


def test_where_one_file_cannot_be_used_no_other_is_created(tmp_path: Path) -> None:
    paths = [tmp_path / f"ssd-{number}.kv" for number in range(2)]
    paths[1].write_bytes(b"something else")

    with pytest.raises(StoreMismatch):
        SsdTier.open(paths, store_id=STORE, capacity_bytes=CAPACITY, io_threads=1)
    assert not paths[0].exists()


def test_a_killed_start_leaves_a_file_that_only_its_own_store_removes(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class KilledCalls(FileCalls):
        def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
            os.link(partial, tmp_path / "left")
            raise Killed

    file = tmp_path / "ssd-001.kv"
    partial = ssd_files.partial_of(file)
    with pytest.raises(Killed):
        ssd_files.create(file, ssd_files.FileHeader(STORE, 1, 2, MIB), KilledCalls())
    (tmp_path / "left").rename(partial)
    others = [tmp_path / f"ssd-{name}.kv.partial" for name in ("002", "1", "backup")]
    for each in others:
        each.write_bytes(partial.read_bytes())
    (tmp_path / "ssd-003.kv.partial").touch()

    ssd_files.remove_partial_files(tmp_path, OTHER_STORE)
    assert partial.exists()
    ssd_files.remove_partial_files(tmp_path, STORE)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "ssd-003.kv.partial"])
