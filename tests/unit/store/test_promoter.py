"""Promotion and loads: one promotion per block at a time, and first what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.index.records import Records
from kvservice.store.leases import Client
from kvservice_api.errors import IndexFull, TierFull
from kvservice_api.image import block_geometry
from kvservice_api.layout import Layout, Shard
from tests.clock import HandClock
from tests.file_faults import FaultyCalls, HeldReads
from tests.stores import (
    CALLER,
    KIB,
    LAYOUT,
    LIMITS,
    MIB,
    PATIENT,
    WHOLE,
    OpenStore,
    caller_of,
    layers_of,
    on_ssd,
    some_chain,
    some_images,
    until,
)

BLOCK = 12 * KIB
HEADER = 4 * KIB


@pytest.fixture
async def opened(open_store: Callable[..., Any], calls: FaultyCalls) -> OpenStore:
    store: OpenStore = await open_store(calls=calls)
    return store


def reads(calls: FaultyCalls) -> int:
    return calls.names().count("preadv")


async def test_a_load_from_ssd_brings_its_blocks_up(opened: OpenStore, client: Client) -> None:
    chain = some_chain(4, tail_tokens=5)
    images = await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    assert await opened.load(lease) == layers_of(images)
    await until(lambda: all(opened.residency(key) == {TierName.DRAM, TierName.SSD} for key in chain.keys))
    assert opened.counters.promoted_blocks == 5
    await opened.settle()


async def test_blocks_that_end_one_after_another_share_a_commit(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(LIMITS, reads_in_flight=1, read_bytes=4 * KIB)  # One piece at a time.
    opened: OpenStore = await open_store(limits=limits, clock=HandClock())
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(12)
    images = await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    placed, place = list[int](), opened.block_lifecycle.place

    async def noted(rows: Sequence[int], *more: Any, **others: Any) -> None:
        placed.append(len(rows))
        await place(rows, *more, **others)

    monkeypatch.setattr(opened.block_lifecycle, "place", noted)
    with opened.commits_held(TierName.DRAM):
        assert await opened.load(lease) == layers_of(images), "no load waits for a commit"
        await until(lambda: bool(placed))
    await until(lambda: opened.counters.promoted_blocks == 12)
    assert placed == [12]
    await opened.settle()


async def test_background_work_can_be_stopped_while_a_promoted_block_waits_for_others_to_share_a_commit(
    open_store: Callable[..., Any], calls: FaultyCalls
) -> None:
    """The end of a cancelled task must not start another one: the stop would cancel that too, and so on."""
    limits = replace(LIMITS, reads_in_flight=1, read_bytes=4 * KIB)  # One piece, which is one layer, at a time.
    opened: OpenStore = await open_store(limits=limits, clock=HandClock(), calls=calls)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    await on_ssd(opened, client, chain)
    promoter = opened.promoter
    assert promoter is not None
    second = opened.blocks.extent(opened.blocks.row_of(chain.keys[1], WHOLE), TierName.SSD)
    assert second is not None
    with calls.held("preadv", HEADER + second.offset_bytes + 4 * KIB):  # The second layer of the second block.
        await opened.store.moves.prefetch(CALLER, chain.keys, within_s=0, wait=False)
        await until(lambda: len(promoter._over) == 1)
        stopping = asyncio.create_task(opened.tasks.stop())
        await asyncio.sleep(0)  # It cancels all work.
    try:
        await asyncio.wait_for(stopping, 10)
    finally:
        promoter._over.clear()  # If the stop does not end, that of the fixture would not end either.


async def test_a_record_that_cannot_be_deleted_yet_keeps_no_other_block_out_of_dram(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = some_chain(6)
    images = await on_ssd(opened, client, chain)
    first, delete, stuck = chain.keys[2], opened.index.delete, asyncio.get_running_loop().create_future()
    await opened.store.moves.prefetch(CALLER, [first], within_s=0, wait=True)

    def delete_later(tier: TierName, names: Sequence[bytes]) -> asyncio.Future[None]:
        return stuck if first in {name[:32] for name in names} else delete(tier, names)

    monkeypatch.setattr(opened.index, "delete", delete_later)
    evicting = asyncio.create_task(opened.store.moves.evict(CALLER, [first], TierName.DRAM))
    await until(lambda: opened.residency(first) == {TierName.SSD})
    lease = opened.lookup(client, chain.keys)
    assert lease is not None

    assert await opened.load(lease) == layers_of(images)

    await until(lambda: opened.counters.promoted_blocks == 1 + 5)
    assert opened.residency(first) == {TierName.SSD}
    stuck.set_result(None)
    await until(lambda: opened.counters.promoted_blocks == 1 + 6)
    await evicting
    await opened.settle()


async def test_a_load_takes_the_free_space_and_evicts_for_its_other_blocks(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER)
    client, chain, other = opened.store.leases.attach(CALLER, "test"), some_chain(3), some_chain(3, seed=2)
    images = await on_ssd(opened, client, chain)
    await opened.save(client, other, some_images(other, seed=2), on_ssd=True)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None

    assert await opened.load(lease) == layers_of(images)

    await until(lambda: opened.counters.promoted_blocks == 3)
    assert opened.counters.read_through_bytes == 0, "all of them went to DRAM"
    await opened.settle()


async def test_the_first_read_of_a_load_begins_before_the_load_continues(
    opened: OpenStore, client: Client, calls: FaultyCalls
) -> None:
    """What the load does next on the event loop, such as its answer to the client, does not delay it."""
    chain = some_chain(3)
    await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    promoter = opened.promoter
    assert promoter is not None
    with calls.held("preadv") as waiting:
        async with promoter.promoting(lease.rows.tolist()):
            assert waiting.acquire(timeout=10), "no turn of the event loop is needed"


async def test_many_who_want_a_block_at_one_time_cause_one_read(
    opened: OpenStore, client: Client, calls: FaultyCalls
) -> None:
    chain = some_chain(3)
    images = await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    before = reads(calls)
    answers = await asyncio.gather(
        *(opened.load(lease) for _ in range(5)), opened.store.moves.prefetch(CALLER, chain.keys, within_s=0, wait=True)
    )
    assert answers[:5] == [layers_of(images)] * 5
    assert reads(calls) - before == 1, "of all blocks, which follow one another with their trailers"
    assert opened.counters.promoted_blocks == 3


async def test_a_block_that_is_discarded_during_its_promotion_is_still_loaded_completely(
    opened: OpenStore, client: Client, calls: FaultyCalls
) -> None:
    chain = some_chain(2)
    images = await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    with calls.held("preadv") as waiting:
        loading = asyncio.create_task(opened.load(lease))
        await asyncio.to_thread(waiting.acquire)
        discarding = asyncio.create_task(opened.store.operators.discard(CALLER, chain.keys))
        await until(lambda: opened.hits(chain.keys) == 0)
    assert await loading == layers_of(images)
    await discarding
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await opened.settle()
    assert opened.dram.used_bytes == 0


async def test_a_landing_that_ended_while_its_joiner_waited_for_room_is_not_read(
    opened: OpenStore, client: Client, calls: FaultyCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its image was released: the second load reads the block from its tier."""
    chain, more = some_chain(1, seed=1), some_chain(1, seed=2)
    images = await on_ssd(opened, client, chain) + await on_ssd(opened, client, more)
    leases = [opened.lookup(client, keys) for keys in ((*chain.keys, *more.keys), chain.keys)]
    assert leases[0] is not None and leases[1] is not None
    promotion = opened.promoter
    assert promotion is not None
    first, second = leases[0].rows.tolist()
    waits_for_room, gate = asyncio.Event(), asyncio.Event()
    reserve = opened.evictor.reserve

    async def slowly(tier: TierName, size_bytes: int, *space_for: Any, **waits: Any) -> Any:
        if first in promotion._pending:  # The first block is being promoted; the second waits for space.
            waits_for_room.set()
            await gate.wait()
        return await reserve(tier, size_bytes, *space_for, **waits)

    def refuse(tier: TierName, keys: list[bytes], records: Records) -> asyncio.Future[None]:
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(IndexFull("no space for a record of the copy in DRAM"))
        return failed

    monkeypatch.setattr(opened.evictor, "reserve_at_once", lambda *_: [])
    monkeypatch.setattr(opened.evictor, "reserve", slowly)
    monkeypatch.setattr(opened.index, "put", refuse)
    with calls.held("preadv"):
        async with promotion.promoting([first]) as pending:
            [landing] = pending.values()
        joining = asyncio.create_task(opened.load(leases[0]))
        await waits_for_room.wait()
    await landing.done.wait()
    await until(lambda: opened.dram.used_bytes == 0)
    overwritten = opened.dram.reserve(BLOCK)
    opened.dram.view(overwritten)[:] = b"\xff" * BLOCK
    gate.set()
    assert await joining == layers_of(images)
    await until(lambda: second not in promotion._pending)
    opened.dram.release(overwritten)


async def test_what_dram_has_no_room_for_is_read_where_it_lies(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, limits=PATIENT)
    client = opened.store.leases.attach(CALLER, "test")
    chain, other = some_chain(3, seed=1), some_chain(3, seed=2)
    images = await on_ssd(opened, client, chain)
    await opened.save(client, other, some_images(other))
    assert opened.lookup(client, other.keys) is not None, "and what is in DRAM may not leave"
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    assert await asyncio.wait_for(opened.load(lease), 30) == layers_of(images)
    assert opened.counters.read_through_bytes > 0
    assert opened.hits(other.keys) == 3


async def test_a_layer_that_is_there_does_not_wait_for_the_next_one(open_store: Callable[..., Any]) -> None:
    """A piece is a whole layer here, so the second one can be delayed."""
    layout = Layout(
        model_id="deep", dtype="float32", layers=2, kv_heads=2, k_head_dim=4096, v_head_dim=4096, block_tokens=16
    )
    size = block_geometry(layout, Shard.whole(layout), 16).image_bytes
    calls = HeldReads()
    opened: OpenStore = await open_store(calls=calls, dram_bytes=4 * size, ssd_bytes=8 * size)
    await opened.store.layouts.open(CALLER, layout)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(1, layout=layout)
    images = await on_ssd(opened, client, chain, layout=layout)
    lease = opened.lookup(client, chain.keys, shard=Shard.whole(layout), layout=layout)
    assert lease is not None
    [extent] = opened.extents(TierName.SSD).values()
    calls.held_from = HEADER + extent.offset_bytes + size // 2 - 64 * KIB
    frames = opened.frames(lease, range(1), range(2))
    received = b""
    while len(received) < len(images[0]) // 2:
        layer, payload = await asyncio.wait_for(anext(frames), 30)
        assert layer == 0
        received += payload
    calls.gate.set()
    async for _, payload in frames:
        received += payload
    assert received == b"".join(layers_of(images, shard=Shard.whole(layout)))


async def test_the_first_layer_of_all_blocks_is_read_before_more_of_any(
    open_store: Callable[..., Any], calls: FaultyCalls
) -> None:
    """In pieces that are no larger than it: small slices do not wait for a whole MiB of each block."""
    layout = Layout(
        model_id="thin", dtype="float32", layers=8, kv_heads=2, k_head_dim=512, v_head_dim=512, block_tokens=16
    )
    geometry = block_geometry(layout, Shard.whole(layout), 16)
    slice_bytes = geometry.slice_bytes(0)
    opened: OpenStore = await open_store(
        calls=calls, dram_bytes=16 * MIB, ssd_bytes=16 * MIB, limits=replace(LIMITS, reads_in_flight=1)
    )
    await opened.store.layouts.open(CALLER, layout)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(3, layout=layout)
    images = await on_ssd(opened, client, chain, layout=layout)
    lease = opened.lookup(client, chain.keys, shard=Shard.whole(layout), layout=layout)
    assert lease is not None
    calls.made.clear()

    assert await opened.load(lease) == layers_of(images, shard=Shard.whole(layout))

    sizes = [call.size for call in calls.made if call.name == "preadv"]
    early = list(takewhile(lambda size: size < 2 * slice_bytes, sizes))  # The next pieces are twice as large.
    assert slice_bytes == 128 * KIB
    assert sum(early) == len(chain) * (slice_bytes + 4 * KIB), "and the trailers, and no gaps between"


async def test_blocks_that_a_load_joins_are_read_before_the_others_of_a_guess(
    open_store: Callable[..., Any], calls: FaultyCalls
) -> None:
    limits = replace(LIMITS, reads_in_flight=1, read_bytes=4 * KIB)  # One piece at a time.
    opened: OpenStore = await open_store(calls=calls, limits=limits)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(12)
    images = await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    promotion = opened.promoter
    assert promotion is not None
    last = int(lease.rows[-1])
    with calls.held("preadv") as waiting:
        guess = asyncio.create_task(promotion.promote(lease.rows.tolist(), within_s=600, wait=True))
        await asyncio.to_thread(waiting.acquire)  # The first block is being read.
        async with promotion.promoting([last]) as joined:
            calls.made.clear()
            assert list(joined) == [last]
    await guess
    order = [call.offset for call in calls.made if call.name == "preadv"]
    extent = opened.blocks.extent(last, TierName.SSD)
    assert extent is not None
    assert order.index(HEADER + extent.offset_bytes) == 1, "right after the piece that ran with its trailer"
    assert await opened.load(lease) == layers_of(images)


async def test_blocks_that_a_load_joins_are_urgent_while_it_waits_for_space_for_others(
    open_store: Callable[..., Any], calls: FaultyCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(LIMITS, reads_in_flight=1, read_bytes=4 * KIB)  # One piece at a time.
    opened: OpenStore = await open_store(calls=calls, limits=limits)
    client, chain, other = opened.store.leases.attach(CALLER, "test"), some_chain(12), some_chain(1, seed=2)
    await on_ssd(opened, client, chain)
    await on_ssd(opened, client, other)
    lease, other_lease = opened.lookup(client, chain.keys), opened.lookup(client, other.keys)
    promotion = opened.promoter
    assert lease is not None and other_lease is not None and promotion is not None
    last, waits, read = int(lease.rows[-1]), asyncio.Event(), asyncio.Event()

    async def no_space(*_: object, **__: object) -> None:
        waits.set()
        await read.wait()
        raise TierFull("no space")

    with calls.held("preadv") as waiting:
        guess = asyncio.create_task(promotion.promote(lease.rows.tolist(), within_s=600, wait=True))
        await asyncio.to_thread(waiting.acquire)  # The first block is being read.
        monkeypatch.setattr(promotion._evictor, "reserve_at_once", lambda *_: [])
        monkeypatch.setattr(promotion._evictor, "reserve", no_space)
        load = asyncio.create_task(promotion.promote([*other_lease.rows.tolist(), last], within_s=0, wait=True))
        await waits.wait()
        calls.made.clear()
    await guess
    read.set()
    await load
    order = [call.offset for call in calls.made if call.name == "preadv"]
    extent = opened.blocks.extent(last, TierName.SSD)
    assert extent is not None
    assert order.index(HEADER + extent.offset_bytes) == 1, "right after the piece that ran with its trailer"


async def test_a_load_does_not_wait_for_writes_that_the_disk_takes_slowly(
    opened: OpenStore, client: Client, calls: FaultyCalls
) -> None:
    chain, written = some_chain(2, seed=1), some_chain(8, seed=2)
    images = await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    with calls.held("pwritev") as waiting:
        await opened.save(client, written, some_images(written))
        await asyncio.to_thread(waiting.acquire)
        assert await asyncio.wait_for(opened.load(lease), 30) == layers_of(images)
        assert opened.counters.written_behind_blocks == len(chain)
    await until(lambda: opened.counters.written_behind_blocks == len(chain) + len(written))


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16, 32])
async def test_a_load_that_is_cancelled_at_any_point_releases_its_blocks(
    opened: OpenStore, client: Client, turns: int
) -> None:
    chain = some_chain(4)
    await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    loading = asyncio.create_task(opened.load(lease))
    for _ in range(turns):
        await asyncio.sleep(0)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await until(lambda: not opened.blocks.holds.any())
    await asyncio.wait_for(opened.store.drain.quiet(), 30)  # No load is open.
    assert await opened.store.operators.discard(CALLER, chain.keys) == (4, 0)
    await until(lambda: opened.dram.used_bytes == 0)
    assert opened.unsettled() == ""


async def test_shards_of_several_ranks_come_back_as_one(opened: OpenStore, client: Client) -> None:
    """The heads of a layer are one run of keys and one of values in each rank's slice."""
    chain, whole = some_chain(2), Shard.whole(LAYOUT)
    images = some_images(chain)
    shards = (Shard(0, 2, 0, 1), Shard(0, 1, 1, 2), Shard(1, 2, 1, 2))
    for shard in shards:
        parts = [part_of(image, whole, shard) for image in images]
        await opened.save(client, chain, parts, shard=shard, on_ssd=True)
    await opened.store.moves.evict(CALLER, chain.keys[1:], TierName.DRAM)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    assert await opened.load(lease) == layers_of(images)
    for shard in shards:
        lease = opened.lookup(client, chain.keys, shard=shard)
        assert lease is not None
        parts = [part_of(image, whole, shard) for image in images]
        assert await opened.load(lease) == layers_of(parts, shard=shard)


def part_of(image: bytes, whole: Shard, part: Shard) -> bytes:
    """The bytes of a block for the rank with `part`. Keys and values have the same size in the tests' layout."""
    array = np.frombuffer(image, np.uint8).reshape(whole.layers, 2, whole.heads, -1)
    return array[part.layer_begin : part.layer_end, :, part.head_begin : part.head_end].tobytes()
