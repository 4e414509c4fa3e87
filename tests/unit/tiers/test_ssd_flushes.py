"""When the SSD tier flushes its files, and what a failed flush or a cancelled write leaves."""

from __future__ import annotations

import asyncio
import errno
import threading

import pytest

from kvservice.blocks import Extent
from kvservice.tiers.ssd import SsdTier
from kvservice_api.errors import StorageFailed
from tests.contracts.tier import KIB, PAGE, content, noise, stored
from tests.file_faults import FaultyCalls
from tests.ssd_tiers import OpenTier


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
    calls.failing.clear()
    calls.made.clear()
    tier.sync()
    assert calls.names() == ["fdatasync"] * 2


async def test_a_file_that_cannot_be_flushed_keeps_no_other_one_from_it(
    open_tier: OpenTier, calls: FaultyCalls
) -> None:
    tier = open_tier(files=2)
    extents = [await stored(tier, noise(PAGE)) for _ in range(2)]
    assert [extent.segment for extent in extents] == [0, 1]
    calls.failing_once["fdatasync"] = errno.EIO

    with pytest.raises(StorageFailed, match=r"ssd-000.kv"):
        tier.sync()

    assert [tier.flush_failures(extent) for extent in extents] == [1, 0]
    calls.made.clear()
    tier.sync()
    assert calls.names() == ["fdatasync"], "the other one was flushed"


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
