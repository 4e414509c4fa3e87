"""Parts that the SSD tier reads together, and drives that do not wait for each other."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvservice.blocks import Extent
from kvservice.tiers.base import PartRead, PartSums
from kvservice.tiers.ssd import SsdTier
from kvservice_api.errors import KVError, StorageFailed
from kvservice_api.image import checksum
from tests.contracts.tier import PAGE, memory
from tests.file_faults import FaultyCalls
from tests.ssd_tiers import OpenTier, path_of


def part(extent: Extent, offset_bytes: int, size_bytes: int) -> PartRead:
    return PartRead(extent, offset_bytes, memory(size_bytes), np.array([[0, size_bytes]]))


async def read_together(tier: SsdTier, parts: Sequence[PartRead]) -> list[bytes | KVError]:
    """The bytes of each part, whose checksums are theirs, or why it could not be read."""
    found = list[PartSums]()
    await tier.read_together(parts[0].extent.segment, lambda: parts, found.extend)
    return [bytes_of(part, sums) for part, sums in zip(parts, found, strict=True)]


def bytes_of(part: PartRead, sums: PartSums) -> bytes | KVError:
    if isinstance(sums, KVError):
        return sums
    assert sums.tolist() == [checksum(part.into)]
    return bytes(part.into)


async def filled(tier: SsdTier, count: int) -> tuple[list[Extent], list[bytes]]:
    """Extents of two pages each, and their bytes."""
    extents = [tier.reserve(2 * PAGE) for _ in range(count)]
    images = [os.urandom(2 * PAGE) for _ in extents]
    for extent, image in zip(extents, images, strict=True):
        data = memory(len(image))
        data[:] = image
        await tier.write(extent, 0, data)
    return extents, images


FAR = 12  # Extents with more than 64 KiB between the first and the last.


@pytest.mark.parametrize("most_bytes", [None, PAGE])
async def test_parts_with_small_gaps_are_one_read_in_whichever_order_they_are_wanted(
    tier: SsdTier, calls: FaultyCalls, most_bytes: int | None
) -> None:
    extents, images = await filled(tier, FAR)
    calls.made.clear()
    calls.most_bytes = most_bytes

    found = await read_together(
        tier,
        [
            part(extents[1], 0, PAGE),
            part(extents[0], PAGE, PAGE),
            part(extents[-1], 0, PAGE),
            part(extents[2], 0, PAGE),
        ],
    )

    assert found == [images[1][:PAGE], images[0][PAGE:], images[-1][:PAGE], images[2][:PAGE]]
    if most_bytes is None:
        assert [call.size for call in calls.made] == [4 * PAGE, PAGE], "with the page between, and what is far alone"


class BadPage(FaultyCalls):
    """Reads of the page at that offset of a file fail."""

    offset = -1

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= self.offset < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "bad sector")
        return super().preadv(fd, buffers, offset)


async def test_a_part_that_cannot_be_read_is_an_error_in_its_place(tmp_path: Path) -> None:
    calls = BadPage()
    tier = SsdTier.open([path_of(tmp_path)], store_id=bytes(16), capacity_bytes=64 * PAGE, io_threads=1, calls=calls)
    extents, images = await filled(tier, FAR)
    wanted = [extents[0], extents[1], extents[-1]]
    for bad in (1, 2):  # Read together with another one, and alone.
        calls.offset = PAGE + wanted[bad].offset_bytes
        found = await read_together(tier, [part(extent, 0, PAGE) for extent in wanted])

        assert isinstance(error := found.pop(bad), StorageFailed)
        assert f"at {wanted[bad].offset_bytes} of" in error.message
        assert found == [images[0][:PAGE], (images[-1] if bad == 1 else images[1])[:PAGE]]
    tier.close()


async def test_what_is_read_is_decided_when_a_thread_is_free_for_it(tier: SsdTier, calls: FaultyCalls) -> None:
    extents, images = await filled(tier, 1)
    wanted, found = list[PartRead](), list[PartSums]()
    with calls.held("preadv") as waiting:
        others = [asyncio.ensure_future(tier.read(extents[0], 0, memory(PAGE))) for _ in range(2)]
        for _ in others:
            await asyncio.to_thread(waiting.acquire)  # All threads of the tier are busy.
        reading = asyncio.ensure_future(tier.read_together(0, lambda: wanted, found.extend))
        await asyncio.sleep(0)
        wanted.append(part(extents[0], PAGE, PAGE))
    await reading
    assert bytes_of(wanted[0], found[0]) == images[0][PAGE:]
    await asyncio.gather(*others)


async def test_there_may_be_nothing_to_read_any_more(tier: SsdTier, calls: FaultyCalls) -> None:
    calls.made.clear()
    found = list[PartSums]()

    await tier.read_together(0, list, found.extend)

    assert found == calls.made == []


class SlowDrive(FaultyCalls):
    """Reads of the first file that is read wait for the gate, once there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: threading.Event | None = None
        self.slow_fd = -1
        self.waits = threading.Event()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.gate is not None:
            if self.slow_fd < 0:
                self.slow_fd = fd
            if fd == self.slow_fd:
                self.waits.set()
                self.gate.wait()
        return super().preadv(fd, buffers, offset)


class TestSeveralDrives:
    @pytest.fixture
    def calls(self) -> SlowDrive:
        return SlowDrive()

    async def test_a_slow_drive_keeps_no_other_one_waiting(self, open_tier: OpenTier, calls: SlowDrive) -> None:
        tier = open_tier(files=2, io_threads=1)
        extents, images = await filled(tier, 2)
        assert {extent.segment for extent in extents} == {0, 1}, "blocks are spread over the drives"
        calls.gate = threading.Event()
        slow = asyncio.ensure_future(tier.read(extents[0], 0, memory(PAGE)))
        await asyncio.to_thread(calls.waits.wait, 30)

        found = await asyncio.wait_for(tier.read(extents[1], 0, memory(PAGE), bytes), 30)

        assert found == images[1][:PAGE]
        assert not slow.done()
        calls.gate.set()
        await slow
