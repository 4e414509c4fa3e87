"""The SSD tier with calls that fail or move less, on a full disk, and on one that is read-only."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice.tiers.ssd import SsdTier
from kvservice_api.errors import StorageFailed
from tests.contracts.tier import KIB, MIB, PAGE, content, memory, noise, stored
from tests.file_faults import FaultyCalls
from tests.ssd_tiers import Direct, OpenTier, path_of


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


async def test_a_drive_that_failed_is_tried_again_although_it_is_the_fuller_one(
    open_tier: OpenTier, calls: FaultyCalls
) -> None:
    tier = open_tier(files=2)
    failed = tier.reserve(64 * KIB)
    calls.failing["pwritev"] = errno.EIO
    with pytest.raises(StorageFailed):
        await tier.write(failed, 0, noise(PAGE))
    calls.failing.clear()

    for _ in range(64):
        extent = tier.reserve(PAGE)
        await tier.write(extent, 0, noise(PAGE))
        tier.release(extent)
    assert not [file.refusing_because for file in tier._files.values() if file.refusing_because]


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
