"""The SSD tier on a real file system, with and without the page cache, and with failing calls."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal

import pytest

from kvservice.blocks import Extent
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.ssd import SsdTier
from kvservice_api.errors import StorageFailed, TierFull
from tests.contracts.tier import KIB, MIB, PAGE, TierContract, columns, content, memory, noise, stored
from tests.file_faults import FaultyCalls

STORE, OTHER_STORE = bytes(range(16)), bytes(range(16, 32))
CAPACITY = 16 * MIB

Direct = Literal["auto", "off"]
OpenTier = Callable[..., SsdTier]


@pytest.fixture
def calls() -> FaultyCalls:
    return FaultyCalls()


@pytest.fixture
def open_tier(tmp_path: Path, calls: FaultyCalls) -> Iterator[OpenTier]:
    """Opens the tier of files in `tmp_path`, and closes it at the end."""
    opened: list[SsdTier] = []

    def open_tier(
        files: int = 1,
        store_id: bytes = STORE,
        capacity_bytes: int = CAPACITY,
        direct: Direct = "auto",
        io_threads: int = 4,
        folder: Path = tmp_path,
        leaving: Collection[int] = (),
    ) -> SsdTier:
        paths = [folder / f"drive-{number}" / f"ssd-{number:03}.kv" for number in range(files)]
        opened.append(
            SsdTier.open(
                paths,
                store_id=store_id,
                capacity_bytes=capacity_bytes,
                io_threads=io_threads,
                calls=calls,
                direct=direct,
                leaving=leaving,
            )
        )
        return opened[-1]

    yield open_tier
    for tier in opened:
        tier.close()


@pytest.fixture(params=["auto", "off"])
def tier(open_tier: OpenTier, request: pytest.FixtureRequest) -> SsdTier:
    return open_tier(direct=request.param)


def path_of(tmp_path: Path, number: int = 0) -> Path:
    return tmp_path / f"drive-{number}" / f"ssd-{number:03}.kv"


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


# Calls that fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
async def test_a_failed_write_says_why_and_the_tier_recovers_by_itself(
    tier: SsdTier, calls: FaultyCalls, tmp_path: Path, number: int
) -> None:
    extent, data = tier.reserve(64 * KIB), noise(64 * KIB)
    calls.failing["pwritev"] = number

    with pytest.raises(StorageFailed) as refusal:
        await tier.write(extent, 0, data)

    for part in (os.strerror(number), errno.errorcode[number], str(path_of(tmp_path)), str(extent.offset_bytes)):
        assert part in refusal.value.message
    assert refusal.value.details["errno"] == errno.errorcode[number]
    assert tier.refusing_because == refusal.value.message

    calls.failing.clear()
    await tier.write(extent, 0, data)
    assert tier.refusing_because == ""
    assert await content(tier, extent, len(data)) == data


async def test_a_failed_read_says_why_and_the_next_one_may_succeed(tier: SsdTier, calls: FaultyCalls) -> None:
    data = noise(64 * KIB)
    extent = await stored(tier, data)
    calls.failing["preadv"] = errno.EIO
    seen: list[memoryview] = []

    with pytest.raises(StorageFailed, match=r"could not read 65536 bytes at .*: Input/output error \(EIO\)"):
        await tier.read(extent, 0, memory(64 * KIB), seen.append)

    assert not seen
    assert tier.refusing_because == ""
    calls.failing.clear()
    assert await content(tier, extent, len(data)) == data


@pytest.mark.parametrize("direct", ["auto", "off"])
@pytest.mark.parametrize("most_bytes", [PAGE, 3 * PAGE, PAGE + 100, 5 * PAGE - 1])
async def test_short_reads_and_writes_continue_where_they_ended(
    open_tier: OpenTier, calls: FaultyCalls, direct: Direct, most_bytes: int
) -> None:
    tier, data = open_tier(direct=direct), noise(16 * PAGE)
    calls.most_bytes = most_bytes

    extent = await stored(tier, data)
    found = await content(tier, extent, len(data))

    calls.most_bytes = None
    assert found == data == await content(tier, extent, len(data))
    aligned = [call for call in calls.made if call.name in ("preadv", "pwritev") and call.offset % PAGE == 0]
    if tier.is_direct:
        assert len(aligned) == sum(call.name in ("preadv", "pwritev") for call in calls.made)


async def test_a_call_that_moves_nothing_ends_in_an_error(tier: SsdTier, calls: FaultyCalls) -> None:
    extent = tier.reserve(PAGE)
    calls.most_bytes = 0
    with pytest.raises(StorageFailed, match="only 0 bytes were moved"):
        await tier.write(extent, 0, noise(PAGE))
    with pytest.raises(StorageFailed, match="only 0 bytes were moved"):
        await tier.read(extent, 0, memory(PAGE))


async def test_a_file_cut_while_it_is_open_is_a_failed_read(tier: SsdTier, tmp_path: Path) -> None:
    extent = await stored(tier, noise(2 * PAGE))
    os.truncate(path_of(tmp_path), PAGE + extent.offset_bytes + PAGE)

    with pytest.raises(StorageFailed, match="only 4096 bytes were moved"):
        await tier.read(extent, 0, memory(2 * PAGE))


async def test_one_drive_in_trouble_is_avoided_while_another_works(open_tier: OpenTier, calls: FaultyCalls) -> None:
    tier = open_tier(files=2)
    broken = tier.reserve(PAGE)
    calls.failing["pwritev"] = errno.EIO
    with pytest.raises(StorageFailed):
        await tier.write(broken, 0, noise(PAGE))
    calls.failing.clear()

    assert tier.refusing_because == ""
    assert {tier.reserve(MIB).segment for _ in range(5)} == {1 - broken.segment}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a file system takes more rights than this user has")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


async def test_a_really_full_disk_refuses_writes_until_space_is_back(open_tier: OpenTier, small_disk: Path) -> None:
    tier = open_tier(capacity_bytes=2 * MIB, folder=small_disk)
    extent, data = tier.reserve(MIB), noise(MIB)
    os.truncate(path_of(small_disk), PAGE)  # Frees the file's blocks, so that writes need new ones.
    (small_disk / "others").write_bytes(bytes(4 * MIB - 16 * PAGE))

    with pytest.raises(StorageFailed):
        await tier.write(extent, 0, data)
    assert "No space left" in tier.refusing_because or "only" in tier.refusing_because

    (small_disk / "others").unlink()
    await tier.write(extent, 0, data)
    assert tier.refusing_because == ""
    assert await content(tier, extent, MIB) == data


def remount(path: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", path], check=True)


async def test_a_really_read_only_disk_is_an_error_of_the_start(open_tier: OpenTier, small_disk: Path) -> None:
    tier = open_tier(capacity_bytes=2 * MIB, folder=small_disk, direct="off")
    data = noise(PAGE)
    extent = await stored(tier, data)
    tier.close()
    tier._files.clear()
    remount(small_disk, "ro")

    with pytest.raises(OSError, match="Read-only file system"):
        open_tier(capacity_bytes=2 * MIB, folder=small_disk)

    remount(small_disk, "rw")
    assert await content(open_tier(capacity_bytes=2 * MIB, folder=small_disk), extent, PAGE) == data


# Durability


async def test_bytes_are_flushed_after_they_are_written_and_only_then(tier: SsdTier, calls: FaultyCalls) -> None:
    calls.made.clear()

    await asyncio.gather(*(stored(tier, noise(64 * KIB)) for _ in range(4)))
    assert calls.names() == ["pwritev"] * 4
    await asyncio.to_thread(tier.sync)

    assert calls.names() == ["pwritev"] * 4 + ["fdatasync"]
    assert len({call.fd for call in calls.made}) == 1


async def test_only_files_written_since_the_last_flush_are_flushed(open_tier: OpenTier, calls: FaultyCalls) -> None:
    tier = open_tier(files=3)
    calls.made.clear()
    extents = [tier.reserve(PAGE) for _ in range(3)]

    tier.sync()
    assert calls.names() == []
    await tier.write(extents[1], 0, noise(PAGE))
    await content(tier, extents[0], PAGE)
    tier.sync()
    tier.sync()

    written = [call.fd for call in calls.made if call.name == "pwritev"]
    assert [call.fd for call in calls.made if call.name == "fdatasync"] == written


async def test_a_file_whose_flush_failed_is_flushed_again(open_tier: OpenTier, calls: FaultyCalls) -> None:
    tier = open_tier(files=2)
    for _ in range(2):
        await stored(tier, noise(PAGE))
    calls.made.clear()
    calls.failing["fdatasync"] = errno.EIO

    with pytest.raises(StorageFailed, match=r"could not flush .*ssd-000.kv: Input/output error"):
        tier.sync()
    await tier.write(Extent(0, 0, PAGE), 0, noise(PAGE))
    assert tier.refusing_because == ""  # The other file is in order.

    calls.failing.clear()
    calls.made.clear()
    tier.sync()
    assert calls.names() == ["fdatasync"] * 2


async def test_a_failed_flush_is_a_reason_to_refuse_until_one_succeeds(tier: SsdTier, calls: FaultyCalls) -> None:
    extent = await stored(tier, noise(PAGE))
    calls.failing["fdatasync"] = errno.EIO
    with pytest.raises(StorageFailed):
        tier.sync()
    await tier.write(extent, 0, noise(PAGE))
    assert "could not flush" in tier.refusing_because

    calls.failing.clear()
    tier.sync()
    assert tier.refusing_because == ""


async def test_a_write_that_failed_half_way_is_flushed_too(tier: SsdTier, calls: FaultyCalls) -> None:
    calls.failing["pwritev"] = errno.EIO
    with pytest.raises(StorageFailed):
        await tier.write(tier.reserve(PAGE), 0, noise(PAGE))
    calls.made.clear()
    tier.sync()
    assert calls.names() == ["fdatasync"]


async def test_a_write_during_a_flush_waits_for_the_next_one(tier: SsdTier, calls: FaultyCalls) -> None:
    await stored(tier, noise(PAGE))
    with calls.held("fdatasync") as waiting:
        flush = asyncio.ensure_future(asyncio.to_thread(tier.sync))
        await asyncio.to_thread(waiting.acquire)
        await stored(tier, noise(PAGE))
    await flush
    calls.made.clear()

    tier.sync()

    assert calls.names() == ["fdatasync"]


async def test_a_flush_ends_only_when_one_that_runs_has_ended(tier: SsdTier, calls: FaultyCalls) -> None:
    await stored(tier, noise(PAGE))
    with calls.held("fdatasync") as waiting:
        first = asyncio.ensure_future(asyncio.to_thread(tier.sync))
        await asyncio.to_thread(waiting.acquire)
        second = threading.Thread(target=tier.sync)
        second.start()
        second.join(0.05)
        assert second.is_alive()
    await first
    second.join(10)
    assert not second.is_alive()


async def test_space_released_after_a_cancelled_write_is_not_written_any_more(
    tier: SsdTier, calls: FaultyCalls
) -> None:
    extent = tier.reserve(PAGE)
    with calls.held("pwritev") as waiting:
        writing = asyncio.ensure_future(tier.write(extent, 0, noise(PAGE)))
        await asyncio.to_thread(waiting.acquire)
        writing.cancel()
        await asyncio.sleep(0)
        assert not writing.done()
    with pytest.raises(asyncio.CancelledError):
        await writing
    tier.release(extent)

    data = noise(PAGE)
    again = await stored(tier, data)
    assert again == extent
    assert await content(tier, again, PAGE) == data


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
