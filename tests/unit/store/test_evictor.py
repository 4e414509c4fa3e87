"""The evictor: which blocks are evicted to make space, and which are not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.store.leases import Client
from kvservice.store.miss_reasons import SpaceFor
from kvservice.store.mover.evictor import Watermarks
from kvservice.store.store import StoreLimits
from kvservice_api.errors import TierFull
from tests.clock import HandClock
from tests.stores import CALLER, KIB, MIB, PATIENT, OpenStore, caller_of, some_chain, some_images, until

BLOCK = 12 * KIB  # Of the tests' layout.
HEADER = 4 * KIB  # Of the arena, and of each SSD file.


async def saved(opened: OpenStore, client: Client, blocks: int, *, seed: int = 0, on_ssd: bool = True) -> list[bytes]:
    chain = some_chain(blocks, seed=seed)
    outcome = await opened.save(client, chain, some_images(chain, seed=seed), on_ssd=on_ssd)
    assert not outcome.refused
    return list(chain.keys)


def in_dram(opened: OpenStore, keys: list[bytes]) -> int:
    return sum(TierName.DRAM in opened.residency(key) for key in keys)


async def test_the_least_recently_used_leave_first_and_a_suffix_before_its_prefix(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=10 * BLOCK + HEADER)
    client = opened.store.leases.attach(CALLER, "test")
    old, newer = await saved(opened, client, 5, seed=1), await saved(opened, client, 5, seed=2)
    opened.hits(old)

    await saved(opened, client, 3, seed=3)
    assert [in_dram(opened, [key]) for key in newer] == [1, 1, 0, 0, 0]
    assert in_dram(opened, old) == 5
    assert opened.hits([*newer]) == 5, "what left DRAM is on SSD"


async def test_what_is_on_ssd_leaves_dram_before_what_would_be_lost(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER)
    client = opened.store.leases.attach(CALLER, "test")
    only_dram = await saved(opened, client, 2, seed=1)
    await opened.store.moves.evict(CALLER, only_dram, TierName.SSD)  # LRU does not write them there again.
    await saved(opened, client, 2, seed=2)

    await saved(opened, client, 2, seed=3)
    assert in_dram(opened, only_dram) == 2
    assert opened.counters.lost_unwritten_blocks == 0


async def test_without_an_ssd_tier_the_oldest_are_lost(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0)
    client = opened.store.leases.attach(CALLER, "test")
    old = await saved(opened, client, 3, seed=1, on_ssd=False)
    new = await saved(opened, client, 3, seed=2, on_ssd=False)
    assert (opened.hits(old), opened.hits(new)) == (1, 3)
    assert opened.counters.lost_unwritten_blocks == 2


async def test_free_space_is_reserved_at_once_as_far_as_it_goes_and_nothing_leaves_for_it(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 2)

    extents = opened.evictor.reserve_at_once(TierName.DRAM, [BLOCK] * 3)

    assert len(extents) == 2
    assert in_dram(opened, keys) == 2
    for extent in extents:
        opened.dram.release(extent)


async def test_nothing_is_reserved_at_once_while_another_waits_for_more_than_is_free(
    open_store: Callable[..., Any],
) -> None:
    """Otherwise small blocks would take the space that becomes free for a large one."""
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER)
    client = opened.store.leases.attach(CALLER, "test")
    await saved(opened, client, 2)
    async with opened.evictor._locks[TierName.DRAM]:  # As while another eviction runs.
        waiting = asyncio.create_task(opened.evictor.reserve(TierName.DRAM, 3 * BLOCK, SpaceFor.SAVE))
        await asyncio.sleep(0)
        assert opened.evictor.reserve_at_once(TierName.DRAM, [BLOCK]) == []
    opened.dram.release(await waiting)


async def test_where_everything_is_leased_a_save_is_refused_at_once_and_nothing_leaves(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, limits=PATIENT)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 4)
    lease = opened.lookup(client, keys)
    chain = some_chain(2, seed=9)

    outcome = await asyncio.wait_for(opened.save(client, chain, some_images(chain)), 30)
    assert [type(error) for error in outcome.refused.values()] == [TierFull, TierFull]
    assert in_dram(opened, keys) == 4

    assert lease is not None
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    assert not (await opened.save(client, chain, some_images(chain))).refused


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
async def test_a_block_larger_than_the_tier_evicts_nothing(open_store: Callable[..., Any], tier: TierName) -> None:
    opened: OpenStore = await open_store(dram_bytes=8 * BLOCK + HEADER, ssd_bytes=16 * BLOCK, ssd_files=2)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 4)
    capacity = opened.block_lifecycle.tiers[tier].capacity_bytes
    largest = capacity if tier == TierName.DRAM else capacity // 2  # An extent is never in two files.
    with pytest.raises(TierFull):
        await opened.evictor.reserve(tier, largest + 1, SpaceFor.SAVE)
    assert in_dram(opened, keys) == opened.hits(keys) == 4
    assert opened.counters.evicted_ssd_blocks == opened.counters.evicted_dram_blocks == 0


class StalledCleaner:
    """A write-behind that makes progress when a test says so; with `is_failing`, its writes run, and fail."""

    def __init__(self, is_failing: bool = False) -> None:
        self.steps = asyncio.Condition()
        self.is_failing = is_failing

    def is_progressing(self) -> bool:
        return not self.is_failing

    def is_writing(self) -> bool:
        return True

    async def wait_for_one(self) -> None:
        async with self.steps:
            await self.steps.wait()

    async def step(self) -> None:
        async with self.steps:
            self.steps.notify_all()


async def test_who_waits_is_served_before_who_comes_later(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=64 * KIB + HEADER, ssd_bytes=0)
    room, cleaner = opened.evictor, StalledCleaner()
    room._cleaner = cleaner
    taken = [opened.dram.reserve(16 * KIB) for _ in range(4)]

    large = asyncio.create_task(room.reserve(TierName.DRAM, 32 * KIB, SpaceFor.SAVE))
    await asyncio.sleep(0)
    small = asyncio.create_task(room.reserve(TierName.DRAM, 16 * KIB, SpaceFor.SAVE))
    await asyncio.sleep(0)
    opened.dram.release(taken[0])
    await cleaner.step()
    await asyncio.sleep(0)
    assert not large.done() and not small.done(), "the small one would fit, and has to wait for its turn"

    opened.dram.release(taken[1])
    await cleaner.step()
    assert (await large).size_bytes == 32 * KIB
    opened.dram.release(taken[2])
    await cleaner.step()
    assert (await small).size_bytes == 16 * KIB


async def test_while_writes_fail_a_block_leaves_once_its_write_has_ended(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 4, on_ssd=False)
    evictor, cleaner = opened.evictor, StalledCleaner(is_failing=True)
    evictor._cleaner = cleaner
    rows = opened.blocks.rows_of_keys(keys)
    opened.block_lifecycle.hold(rows)

    waiting = asyncio.create_task(evictor.reserve(TierName.DRAM, BLOCK, SpaceFor.SAVE))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done(), "each block is being written: none may leave yet"
    opened.block_lifecycle.unhold(rows)
    await cleaner.step()

    opened.dram.release(await waiting)
    assert opened.hits(keys) < 4


async def test_while_writes_fail_and_no_block_is_held_space_is_refused_at_once(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0)
    client = opened.store.leases.attach(CALLER, "test")
    lease = opened.lookup(client, await saved(opened, client, 4, on_ssd=False))
    opened.evictor._cleaner = StalledCleaner(is_failing=True)

    with pytest.raises(TierFull):
        await asyncio.wait_for(opened.evictor.reserve(TierName.DRAM, BLOCK, SpaceFor.SAVE), 1)
    assert lease is not None


async def test_waiting_for_room_ends_in_time(open_store: Callable[..., Any]) -> None:
    clock = HandClock()
    opened: OpenStore = await open_store(
        dram_bytes=64 * KIB + HEADER, ssd_bytes=0, clock=clock, limits=StoreLimits(reserve_wait_s=10)
    )
    room = opened.evictor
    room._cleaner = StalledCleaner()
    opened.dram.reserve(64 * KIB)
    waiting = [asyncio.create_task(room.reserve(TierName.DRAM, 4 * KIB, SpaceFor.SAVE)) for _ in range(3)]
    await asyncio.sleep(0)
    clock.advance(seconds=9.9)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(each.done() for each in waiting)
    clock.advance(seconds=0.2)
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [TierFull] * 3
    assert not any(room._waiting.values())


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancelled_wait_for_room_takes_nothing(open_store: Callable[..., Any], turns: int) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 4)
    waiting = asyncio.create_task(opened.evictor.reserve(TierName.DRAM, BLOCK, SpaceFor.SAVE))
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting.cancel()
    [answer] = await asyncio.gather(waiting, return_exceptions=True)
    if not isinstance(answer, BaseException):
        opened.dram.release(answer)
    await opened.settle()

    assert opened.dram.used_bytes == in_dram(opened, keys) * BLOCK, "nothing is set aside for the cancelled wait"
    opened.dram.release(await opened.evictor.reserve(TierName.DRAM, BLOCK, SpaceFor.SAVE))
    assert len(opened.evictor.reserve_at_once(TierName.DRAM, [BLOCK])) == 1, "no caller waits any more"


async def test_the_mover_keeps_room_free_ahead_of_need_and_loses_nothing_for_it(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=1 * MIB, watermarks=Watermarks(0.2, 0.4))
    client = opened.store.leases.attach(CALLER, "test")
    keys = []
    for seed in range(10):
        keys.append(await saved(opened, client, 10, seed=seed))
        await until(lambda: opened.dram.used_bytes <= 0.8 * opened.dram.capacity_bytes)
    assert all(opened.hits(each) == 10 for each in keys)
    assert opened.counters.lost_unwritten_blocks == 0
    assert opened.dram.used_bytes > 0.4 * opened.dram.capacity_bytes, "and no more than asked for"


async def test_blocks_that_only_dram_has_do_not_leave_for_a_watermark(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=10 * BLOCK + HEADER, ssd_bytes=0, watermarks=Watermarks(0.5, 0.9))
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 10, on_ssd=False)
    for _ in range(50):
        await asyncio.sleep(0)
    assert opened.hits(keys) == 10


async def test_neither_tier_is_ever_over_its_capacity(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(
        dram_bytes=9 * BLOCK + HEADER, ssd_bytes=20 * BLOCK, watermarks=Watermarks(0.1, 0.3)
    )
    client = opened.store.leases.attach(CALLER, "test")
    most = dict.fromkeys((TierName.DRAM, TierName.SSD), 0)

    async def watch() -> None:
        while True:
            for tier, space in opened.block_lifecycle.tiers.items():
                assert space.used_bytes <= space.capacity_bytes
                most[tier] = max(most[tier], space.used_bytes)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    for seed in range(12):
        chains = [some_chain(4, seed=seed * 2 + at) for at in range(2)]
        await asyncio.gather(*(opened.save(client, chain, some_images(chain)) for chain in chains))
    assert not watching.done()
    watching.cancel()
    assert all(most.values())
    await opened.settle()


async def test_all_that_find_the_index_full_at_the_same_time_go_by_one_eviction(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=1000 * BLOCK + HEADER, ssd_bytes=0)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 900, on_ssd=False)

    made = await asyncio.gather(*(opened.evictor.make_room_in_index(TierName.DRAM, 1) for _ in range(8)))
    assert made == [True] * 8
    assert in_dram(opened, keys) == 900 - 256

    assert await opened.evictor.make_room_in_index(TierName.DRAM, 1), "a later call evicts more"
    assert in_dram(opened, keys) == 900 - 2 * 256
