"""The contract of every tier. Subclass it, provide `tier`, inherit the specification."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import os
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.blocks import Extent
from kvservice.tiers.base import Tier
from kvservice.tiers.extents import extent_size
from kvservice_api.errors import TierFull

KIB, MIB = 2**10, 2**20
PAGE = 4096


def memory(size_bytes: int) -> memoryview:
    """Zeros that begin on a page, as O_DIRECT needs them."""
    return memoryview(mmap.mmap(-1, size_bytes))


def noise(size_bytes: int) -> memoryview:
    """Random bytes that begin on a page."""
    data = memory(size_bytes)
    data[:] = os.urandom(size_bytes)
    return data


async def stored(tier: Tier, data: memoryview) -> Extent:
    extent = tier.reserve(len(data))
    await tier.write(extent, 0, data)
    await tier.seal(extent)
    return extent


async def content(tier: Tier, extent: Extent, size_bytes: int) -> bytes:
    data = memory(size_bytes)
    await tier.read(extent, 0, data)
    return bytes(data)


def fill(tier: Tier, size_bytes: int) -> list[Extent]:
    """As many extents of this size as there is space for."""
    extents: list[Extent] = []
    with contextlib.suppress(TierFull):
        while True:
            extents.append(tier.reserve(size_bytes))
    return extents


def columns(extents: list[Extent]) -> tuple[NDArray[np.uint16], NDArray[np.uint64], NDArray[np.uint64]]:
    """In the form of index records."""
    table = np.array(extents, np.uint64).reshape(-1, 3)
    return table[:, 0].astype(np.uint16), table[:, 1], table[:, 2]


class TierContract:
    """`tier` is empty and has 4 to 64 MiB."""

    async def test_what_was_written_is_read_back(self, tier: Tier) -> None:
        data = noise(256 * KIB)

        extent = await stored(tier, data)

        assert await content(tier, extent, len(data)) == data

    async def test_parts_may_be_written_in_any_order_and_read_alone(self, tier: Tier) -> None:
        data = noise(5 * 64 * KIB)
        extent = tier.reserve(len(data))

        for part in (3, 0, 4, 2, 1):
            await tier.write(extent, part * 64 * KIB, data[part * 64 * KIB : (part + 1) * 64 * KIB])

        assert await content(tier, extent, len(data)) == data
        middle = memory(64 * KIB)
        await tier.read(extent, 2 * 64 * KIB, middle)
        assert middle == data[2 * 64 * KIB : 3 * 64 * KIB]

    async def test_extents_do_not_touch_each_other(self, tier: Tier) -> None:
        blocks = [noise(size) for size in (PAGE, 3 * PAGE, 100 * KIB, 132 * KIB, 400 * KIB, PAGE)]

        extents = await asyncio.gather(*(stored(tier, data) for data in blocks))

        for extent, data in zip(extents, blocks, strict=True):
            assert await content(tier, extent, len(data)) == data

    async def test_many_reads_and_writes_at_a_time_all_end_right(self, tier: Tier) -> None:
        kept = [(await stored(tier, data), data) for data in (noise(32 * KIB) for _ in range(16))]

        async def write(data: memoryview) -> bool:
            return await content(tier, await stored(tier, data), len(data)) == data

        async def read(extent: Extent, data: memoryview) -> bool:
            return await content(tier, extent, len(data)) == data

        fresh = [noise(32 * KIB) for _ in range(16)]
        assert all(await asyncio.gather(*(write(data) for data in fresh), *(read(*pair) for pair in kept * 4)))

    async def test_the_first_look_at_the_data_is_taken_off_the_event_loop(self, tier: Tier) -> None:
        seen: list[tuple[int, bytes]] = []
        data = noise(PAGE)

        await tier.write(tier.reserve(PAGE), 0, data, lambda view: seen.append((threading.get_ident(), bytes(view))))

        assert [found for _, found in seen] == [data]
        assert seen[0][0] != threading.get_ident()

    async def test_nothing_is_written_where_the_first_look_raises(self, tier: Tier) -> None:
        data = noise(PAGE)
        extent = await stored(tier, data)

        def refuse(view: memoryview) -> None:
            raise LookupError("not these bytes")

        with pytest.raises(LookupError, match="not these bytes"):
            await tier.write(extent, 0, noise(PAGE), refuse)

        assert await content(tier, extent, PAGE) == data
        assert tier.refusing_because == ""

    async def test_a_read_answers_what_its_caller_made_of_the_bytes(self, tier: Tier) -> None:
        data = noise(2 * PAGE)
        extent = await stored(tier, data)

        answer = await tier.read(extent, PAGE, memory(PAGE), lambda view: (threading.get_ident(), bytes(view)))

        assert answer is not None
        assert answer[0] != threading.get_ident()
        assert answer[1] == data[PAGE:]

    async def test_an_error_of_the_callers_reaches_the_caller(self, tier: Tier) -> None:
        extent = await stored(tier, noise(PAGE))

        def refuse(view: memoryview) -> None:
            raise LookupError("damaged")

        with pytest.raises(LookupError, match="damaged"):
            await tier.read(extent, 0, memory(PAGE), refuse)

    async def test_a_cancelled_call_has_ended_when_its_caller_gets_the_cancellation(self, tier: Tier) -> None:
        extent = await stored(tier, noise(PAGE))
        begun, go_on = threading.Event(), threading.Event()
        ended: list[str] = []

        def slowly(view: memoryview) -> None:
            begun.set()
            assert go_on.wait(60)
            ended.append("thread")

        async def call() -> None:
            try:
                await tier.write(extent, 0, noise(PAGE), slowly)
            finally:
                ended.append("caller")

        caller = asyncio.ensure_future(call())
        assert await asyncio.to_thread(begun.wait, 10)
        caller.cancel()
        await asyncio.sleep(0)
        caller.cancel()  # A second cancellation changes nothing.
        await asyncio.sleep(0)
        assert not ended
        go_on.set()

        with pytest.raises(asyncio.CancelledError):
            await caller
        assert ended == ["thread", "caller"]

    async def test_a_full_tier_refuses_and_keeps_what_it_has(self, tier: Tier) -> None:
        data = noise(PAGE)
        kept = await stored(tier, data)

        with pytest.raises(TierFull):
            tier.reserve(tier.capacity_bytes)

        assert await content(tier, kept, PAGE) == data

    async def test_a_tier_reserves_at_most_its_capacity_and_all_of_it_again_after_releases(self, tier: Tier) -> None:
        extents = fill(tier, 100 * KIB)

        assert tier.used_bytes == sum(extent.size_bytes for extent in extents) <= tier.capacity_bytes
        for extent in extents[1::2] + extents[::2]:
            tier.release(extent)
        assert tier.used_bytes == 0

    async def test_released_space_is_reserved_again_as_one_run(self, tier: Tier) -> None:
        quarter = tier.capacity_bytes // 4
        for size in (quarter, PAGE, quarter):
            extents = fill(tier, size)
            assert extents
            for extent in extents:
                tier.release(extent)

    async def test_an_extent_is_released_once(self, tier: Tier) -> None:
        first, second, third = (tier.reserve(64 * KIB) for _ in range(3))
        for extent in (first, second, third):
            tier.release(extent)
        tier.reserve(PAGE)  # So that the bytes in use alone do not show it.

        with pytest.raises(AssertionError):
            tier.release(second)

    async def test_an_extent_lies_on_pages_and_has_the_size_it_says(self, tier: Tier) -> None:
        for size in (1, PAGE, PAGE + 1, 130 * KIB, MIB + 1):
            extent = tier.reserve(size)
            assert extent.offset_bytes % PAGE == 0
            assert extent.size_bytes == extent_size(size)

    async def test_extents_of_an_earlier_start_are_not_reserved_again(self, tier: Tier) -> None:
        extents = [tier.reserve(64 * KIB) for _ in range(8)]
        kept = extents[::2]
        for extent in extents:
            tier.release(extent)

        tier.adopt(*columns(kept))

        assert tier.used_bytes == sum(extent.size_bytes for extent in kept)
        fresh = fill(tier, PAGE)
        places = sorted((extent.segment, extent.offset_bytes, extent.size_bytes) for extent in kept + fresh)
        for one, following in itertools.pairwise(places):
            assert one[0] < following[0] or one[1] + one[2] <= following[1]
        for extent in kept + fresh:
            tier.release(extent)
        assert tier.used_bytes == 0

    async def test_overlapping_extents_are_not_adopted(self, tier: Tier) -> None:
        extents = [Extent(0, 0, 2 * PAGE), Extent(0, PAGE, 2 * PAGE)]

        with pytest.raises(ValueError, match="overlap"):
            tier.adopt(*columns(extents))

        assert tier.used_bytes == 0

    async def test_a_tier_knows_which_extents_can_be_its_own(self, tier: Tier) -> None:
        own = tier.reserve(PAGE)
        tier.release(own)
        tail = tier.capacity_bytes  # Offsets in all files together: at the end of each file, and beyond it.
        candidates = [
            (own, True),
            (Extent(7, 0, PAGE), False),
            (Extent(0, tail, PAGE), False),
            (Extent(0, 0, tail + PAGE), False),
            (Extent(0, 1, PAGE), False),
            (Extent(0, 0, PAGE + 1), False),
            (Extent(0, 0, 0), False),
            (Extent(0, 2**64 - PAGE, 2 * PAGE), False),
            (Extent(0, PAGE, 2**64 - PAGE), False),
        ]

        held = tier.holds(*columns([extent for extent, _ in candidates]))

        assert held.tolist() == [expected for _, expected in candidates]

    async def test_an_empty_index_adopts_nothing(self, tier: Tier) -> None:
        tier.adopt(*columns([]))
        assert tier.used_bytes == 0
        assert tier.holds(*columns([])).tolist() == []
