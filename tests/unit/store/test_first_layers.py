"""A first layer that comes from SSD is sent as its blocks come, because its client waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from kvservice.blocks import TierName
from kvservice.store.leases import Client, Lease
from kvservice.store.types import Span
from kvservice_api.errors import ChecksumMismatch
from kvservice_api.image import PAGE_BYTES, block_geometry
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from tests.file_faults import HeldReads
from tests.stores import (
    CALLER,
    KIB,
    LIMITS,
    MIB,
    OpenStore,
    Sent,
    caller_of,
    layers_of,
    on_ssd,
    some_chain,
    some_images,
    until,
)

WIDE = Layout(model_id="wide", dtype="float32", layers=2, kv_heads=2, k_head_dim=4096, v_head_dim=4096, block_tokens=16)
WHOLE = Shard.whole(WIDE)
HALVES = (Shard(0, 2, 0, 1), Shard(0, 2, 1, 2))
SLICE = MIB
FRAME = 768 * KIB


class Cold(NamedTuple):
    """Two blocks that are on SSD only, and a lease of them. Reads of the second one's slices wait for the gate."""

    opened: OpenStore
    calls: HeldReads
    client: Client
    chain: BlockChain
    layers: list[bytes]
    lease: Lease


@pytest.fixture
async def calls() -> AsyncIterator[HeldReads]:
    calls = HeldReads()
    yield calls
    calls.gate.set()


@pytest.fixture(params=["promoted", "past DRAM"])
async def cold(open_store: Callable[..., Any], calls: HeldReads, request: pytest.FixtureRequest) -> Cold:
    size = block_geometry(WIDE, WHOLE, 16).image_bytes
    limits = replace(LIMITS, frame_bytes=FRAME)
    opened: OpenStore = await open_store(calls=calls, dram_bytes=8 * size, ssd_bytes=8 * size, limits=limits)
    if request.param == "past DRAM":  # As if DRAM had no space.
        opened.reads.shared.promoter = None
    await opened.store.layouts.open(CALLER, WIDE)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2, layout=WIDE)
    images = await on_ssd(opened, client, chain, layout=WIDE)
    lease = opened.lookup(client, chain.keys, shard=WHOLE, layout=WIDE)
    assert lease is not None
    first, second = [opened.extents(TierName.SSD)[row].offset_bytes for row in lease.rows.tolist()]
    assert first < second
    calls.held_from = PAGE_BYTES + second  # After the file's header.
    return Cold(opened, calls, client, chain, layers_of(images, shard=WHOLE), lease)


async def test_a_part_of_the_first_layer_is_sent_while_later_blocks_of_it_are_read(cold: Cold) -> None:
    """A slice is a part here."""
    sent = Sent()
    send = await cold.opened.store.loads.to_send(caller_of(cold.client), cold.lease.lease_id, None, Span(), Span())
    load = asyncio.ensure_future(send(sent))
    await until(lambda: bool(sent.parts))
    assert [(part.layer, part.first_block) for part in sent.parts] == [(0, 0)]
    cold.calls.gate.set()
    await load
    assert b"".join(bytes(run) for part in sent.parts for run in part.runs) == b"".join(cold.layers)


async def test_a_frame_of_the_first_layer_is_sent_while_later_blocks_of_it_are_read(cold: Cold) -> None:
    async with aclosing(cold.opened.frames(cold.lease, range(2), range(2))) as frames:
        assert await anext(frames) == (0, cold.layers[0][:FRAME])
        later = asyncio.ensure_future(anext(frames))
        done, _ = await asyncio.wait([later], timeout=0.1)
        assert not done, "its end is in the second block"
        cold.calls.gate.set()
        assert await later == (0, cold.layers[0][FRAME : 2 * FRAME])
        rest = [frame async for frame in frames]
    assert rest == [
        (0, cold.layers[0][2 * FRAME :]),
        (1, cold.layers[1][:FRAME]),
        (1, cold.layers[1][FRAME : 2 * FRAME]),
        (1, cold.layers[1][2 * FRAME :]),
    ]


async def test_damage_in_a_later_block_of_the_first_layer_ends_the_load_after_the_frames_before_it(cold: Cold) -> None:
    _, damaged = cold.lease.rows.tolist()
    offset = PAGE_BYTES + cold.opened.extents(TierName.SSD)[damaged].offset_bytes
    [path] = cold.opened.files.folder.glob("ssd-*.kv")
    async with aclosing(cold.opened.frames(cold.lease, range(2), range(2))) as frames:
        assert await anext(frames) == (0, cold.layers[0][:FRAME])
        with path.open("r+b") as file:  # The read of it waits still.
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 8]))
        cold.calls.gate.set()
        with pytest.raises(ChecksumMismatch) as raised:
            await anext(frames)
    assert raised.value.details["block"] == "1"
    assert cold.opened.hits(cold.chain.keys, shard=WHOLE, layout=WIDE) == 1


@pytest.mark.parametrize("path", ["parts", "frames"])
async def test_a_load_that_is_left_while_a_block_of_the_first_layer_is_read_holds_its_blocks_until_then(
    cold: Cold, path: str
) -> None:
    if path == "parts":
        sent = Sent()
        send = await cold.opened.store.loads.to_send(caller_of(cold.client), cold.lease.lease_id, None, Span(), Span())
        load: asyncio.Future[Any] = asyncio.ensure_future(send(sent))
        await until(lambda: bool(sent.parts))
    else:
        frames = cold.opened.frames(cold.lease, range(2), range(2))
        await anext(frames)
        load = asyncio.ensure_future(anext(frames))
        await asyncio.sleep(0)
    load.cancel()
    await asyncio.sleep(0.05)
    if cold.opened.reads.shared.promoter is None:  # Else the promotion holds them itself.
        assert not load.done() and cold.opened.blocks.holds[cold.lease.rows].tolist() == [1, 1]
    cold.calls.gate.set()
    await asyncio.wait([load])
    assert load.cancelled() and reads_of_slices() == 0
    await until(lambda: not cold.opened.blocks.holds.any())


@pytest.fixture
async def three(open_store: Callable[..., Any], calls: HeldReads) -> Cold:
    """Three blocks that are on SSD only. Reads of the second and the third one's slices wait for the gate."""
    size = block_geometry(WIDE, WHOLE, 16).image_bytes
    limits = replace(LIMITS, frame_bytes=FRAME)
    opened: OpenStore = await open_store(calls=calls, dram_bytes=8 * size, ssd_bytes=8 * size, limits=limits)
    opened.reads.shared.promoter = None
    await opened.store.layouts.open(CALLER, WIDE)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(3, layout=WIDE)
    images = await on_ssd(opened, client, chain, layout=WIDE)
    lease = opened.lookup(client, chain.keys, shard=WHOLE, layout=WIDE)
    assert lease is not None
    calls.held_from = PAGE_BYTES + opened.extents(TierName.SSD)[int(lease.rows[1])].offset_bytes
    return Cold(opened, calls, client, chain, layers_of(images, shard=WHOLE), lease)


@pytest.mark.parametrize("how", ["closed between frames", "cancelled in frames", "cancelled in parts"])
async def test_a_load_that_is_left_while_several_blocks_are_read_holds_its_blocks_until_all_were(
    three: Cold, how: str
) -> None:
    opened, lease = three.opened, three.lease
    frames = opened.frames(lease, range(3), range(2))
    if how == "cancelled in parts":
        sent = Sent()
        send = await opened.store.loads.to_send(caller_of(three.client), lease.lease_id, None, Span(), Span())
        leaving: asyncio.Future[Any] = asyncio.ensure_future(send(sent))
        await until(lambda: bool(sent.parts))
        leaving.cancel()
    else:
        await anext(frames)
        leaving = asyncio.ensure_future(frames.aclose() if how == "closed between frames" else anext(frames))
        await asyncio.sleep(0)
        if how == "cancelled in frames":
            leaving.cancel()
    await asyncio.sleep(0.05)
    assert not leaving.done() and opened.blocks.holds[lease.rows].all()
    three.calls.gate.set()
    await asyncio.wait([leaving])
    assert reads_of_slices() == 0 and not opened.blocks.holds.any()


async def test_a_load_that_ends_while_a_block_comes_that_it_has_twice_leaves_no_read_behind(cold: Cold) -> None:
    keys = [cold.chain.keys[1], cold.chain.keys[1]]
    lease = cold.opened.lookup(cold.client, keys, shard=WHOLE, layout=WIDE)
    assert lease is not None and len(lease.rows) == 2
    send = await cold.opened.store.loads.to_send(caller_of(cold.client), lease.lease_id, None, Span(), Span())
    load = asyncio.ensure_future(send(Sent()))
    await until(lambda: reads_of_slices() > 0)
    load.cancel()
    cold.calls.gate.set()
    await asyncio.wait([load])
    assert reads_of_slices() == 0


def reads_of_slices() -> int:
    """Running tasks of loads that wait for a slice."""
    return sum("_fetch_slice" in repr(task.get_coro()) for task in asyncio.all_tasks())


async def test_a_first_layer_of_two_shards_is_cut_as_one(open_store: Callable[..., Any]) -> None:
    size = block_geometry(WIDE, WHOLE, 16).image_bytes
    limits = replace(LIMITS, frame_bytes=FRAME)
    opened: OpenStore = await open_store(dram_bytes=8 * size, ssd_bytes=8 * size, limits=limits)
    await opened.store.layouts.open(CALLER, WIDE)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2, layout=WIDE)
    for shard in HALVES:
        images = some_images(chain, shard=shard, layout=WIDE)
        assert not (await opened.save(client, chain, images, shard=shard, layout=WIDE, on_ssd=True)).refused
    lease = opened.lookup(client, chain.keys, shard=WHOLE, layout=WIDE)
    assert lease is not None
    expected = [frame async for frame in opened.frames(lease, range(2), range(2))]  # From DRAM.
    await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)
    assert [frame async for frame in opened.frames(lease, range(2), range(2))] == expected
    sizes = [FRAME, FRAME, 2 * SLICE - 2 * FRAME]
    assert [(layer, len(data)) for layer, data in expected] == [(layer, size) for layer in range(2) for size in sizes]
