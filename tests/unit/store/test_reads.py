"""Blocks stay in place until the load has released them, and each byte is verified last before it is sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.index.records import Records
from kvservice.store import image_check
from kvservice.store.leases import Client, Lease
from kvservice.tiers.files import FileCalls
from kvservice_api.errors import ChecksumMismatch, IndexFull
from kvservice_api.image import block_geometry
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from tests.file_faults import FaultyCalls
from tests.stores import CALLER, KIB, LIMITS, MIB, OpenStore, caller_of, layers_of, some_chain, some_images, until

BLOCK = 12 * KIB
HEADER = 4 * KIB


class HeldRead(FileCalls):
    """Reads at one place wait for the gate; reads at another return a flipped bit."""

    def __init__(self) -> None:
        self.held_at = self.damaged_at = -1
        self.reached, self.gate = threading.Event(), threading.Event()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().preadv(fd, buffers, offset)
        if offset == self.held_at:
            self.reached.set()
            self.gate.wait()
        if offset == self.damaged_at:
            self.reached.wait()  # Fails while the other one is being read.
            buffers[0][-1] ^= 1
        return count


@pytest.fixture
async def calls() -> AsyncIterator[HeldRead]:
    calls = HeldRead()
    yield calls
    calls.gate.set()


@pytest.fixture
async def opened(open_store: Callable[..., Any], calls: HeldRead) -> OpenStore:
    """A store whose loads read from SSD past DRAM, as if DRAM had no space."""
    store: OpenStore = await open_store(calls=calls)
    store.reads.shared.promoter = None
    return store


async def turns(count: int = 20) -> None:
    """Run the event loop until every task that can run has run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def on_ssd(opened: OpenStore, client: Client) -> tuple[BlockChain, Lease]:
    """Two leased blocks that are only on SSD."""
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    await opened.settle()
    await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    return chain, lease


def trailer_at(opened: OpenStore, row: int) -> int:
    """The offset in the file at which the row's trailer is read."""
    extent = opened.blocks.extent(row, TierName.SSD)
    assert extent is not None
    return HEADER + extent.offset_bytes + image_check.trailer_start(opened.block_lifecycle.geometry(row))


async def test_a_load_that_fails_holds_its_blocks_until_the_last_of_its_reads_has_ended(
    opened: OpenStore, client: Client, calls: HeldRead
) -> None:
    """Otherwise a late read would be counted against another block, which has the row by then."""
    chain, lease = await on_ssd(opened, client)
    damaged, slow = lease.rows.tolist()
    calls.held_at, calls.damaged_at = trailer_at(opened, slow), trailer_at(opened, damaged)
    loading = asyncio.create_task(opened.load(lease))
    await until(lambda: opened.counters.quarantined_blocks == 1)

    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await opened.store.operators.discard(CALLER, chain.keys[1:])
    other = some_chain(2, seed=9)
    assert not (await opened.save(client, other, some_images(other, seed=9))).refused
    assert slow not in [opened.blocks.row_of(key, lease.shard) for key in other.keys]
    assert not loading.done()

    calls.gate.set()
    with pytest.raises(ChecksumMismatch):
        await loading
    await opened.settle()
    assert opened.hits(other.keys) == 2 and opened.counters.quarantined_blocks == 1
    assert not opened.blocks.holds.any()


async def test_a_load_that_is_cancelled_holds_its_blocks_until_the_last_of_its_reads_has_ended(
    opened: OpenStore, client: Client, calls: HeldRead
) -> None:
    _, lease = await on_ssd(opened, client)
    first, slow = lease.rows.tolist()
    calls.held_at = trailer_at(opened, slow)
    loading = asyncio.create_task(opened.load(lease))
    await asyncio.to_thread(calls.reached.wait)
    for _ in range(3):  # Cancelling it more than once makes no difference.
        loading.cancel()
        await turns()
        assert opened.blocks.holds[[first, slow]].tolist() == [1, 1]
    calls.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await until(lambda: not opened.blocks.holds.any())


async def test_a_load_that_is_left_between_layers_holds_its_blocks_until_the_next_layers_reads_have_ended(
    opened: OpenStore, client: Client, calls: HeldRead
) -> None:
    _, lease = await on_ssd(opened, client)
    extent = opened.blocks.extent(int(lease.rows[1]), TierName.SSD)
    assert extent is not None
    calls.held_at = HEADER + extent.offset_bytes + 4 * KIB  # Its second layer.
    frames = opened.frames(lease, range(2), range(2))
    await anext(frames)
    await asyncio.to_thread(calls.reached.wait)
    leaving = asyncio.ensure_future(frames.aclose())
    await turns()
    assert opened.blocks.holds[lease.rows].tolist() == [1, 1] and not leaving.done()
    calls.gate.set()
    await leaving
    assert not opened.blocks.holds.any()


async def test_a_row_that_has_another_block_by_now_is_not_taken_out_of_service(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain))
    row = int(opened.blocks.rows_of_keys(chain.keys)[0])
    before = int(opened.blocks.generation[row]) - 1
    await opened.block_lifecycle.quarantine(row, before, TierName.DRAM, "the trailer")
    assert opened.hits(chain.keys) == 1 and opened.counters.quarantined_blocks == 0


# Loads of blocks whose promotion runs


async def leased_on_ssd(opened: OpenStore, client: Client) -> tuple[BlockChain, Lease]:
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)
    assert opened.dram.used_bytes == 0
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    return chain, lease


@pytest.fixture
async def promoting(open_store: Callable[..., Any]) -> OpenStore:
    """A store that promotes blocks, and whose reads can be delayed."""
    opened: OpenStore = await open_store(calls=FaultyCalls())
    return opened


async def first_frame_of_a_landing(
    opened: OpenStore, lease: Lease, then: Callable[[], Any] = lambda: None
) -> tuple[Any, list[bytes]]:
    """A load that has read one frame of a block whose promotion has ended. `then` runs before it could read on."""
    assert isinstance(opened.files.calls, FaultyCalls) and opened.promoter is not None
    frames = opened.frames(lease, range(1), range(2))
    with opened.files.calls.held("preadv") as waiting:
        first = asyncio.ensure_future(anext(frames))
        await asyncio.to_thread(waiting.acquire)
        [landing] = opened.promoter._pending.values()
        then()
        await turns()
    received = [(await first)[1]]
    await landing.done.wait()
    return frames, received


async def test_a_block_whose_record_is_refused_once_it_is_up_keeps_its_space_until_its_last_reader_has_left(
    promoting: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = promoting.store.leases.attach(CALLER, "test")
    chain, lease = await leased_on_ssd(promoting, client)
    delete, withdrawn = promoting.index.delete, asyncio.Event()

    def refuse(tier: TierName, names: Sequence[bytes], records: Records, check: object) -> asyncio.Future[None]:
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(IndexFull("no space for a record of the copy in DRAM"))
        return failed

    def watched(tier: TierName, names: Sequence[bytes]) -> asyncio.Future[None]:
        commit = asyncio.ensure_future(delete(tier, names))
        commit.add_done_callback(lambda _: withdrawn.set())
        return commit

    monkeypatch.setattr(promoting.index, "put", refuse)
    monkeypatch.setattr(promoting.index, "delete", watched)
    frames, received = await first_frame_of_a_landing(promoting, lease)
    await withdrawn.wait()
    await turns()
    assert promoting.dram.used_bytes == BLOCK

    received += [payload async for _, payload in frames]
    assert received == layers_of(some_images(chain))
    await until(lambda: promoting.dram.used_bytes == 0)


async def test_a_block_that_is_discarded_during_its_promotion_keeps_its_space_until_its_last_reader_has_left(
    promoting: OpenStore,
) -> None:
    client = promoting.store.leases.attach(CALLER, "test")
    chain, lease = await leased_on_ssd(promoting, client)

    def discard() -> None:
        promoting.tasks.start(promoting.store.operators.discard(CALLER, chain.keys), "discard")

    frames, received = await first_frame_of_a_landing(promoting, lease, discard)
    assert promoting.hits(chain.keys) == 0
    await turns()
    assert promoting.dram.used_bytes == BLOCK

    received += [payload async for _, payload in frames]
    assert received == layers_of(some_images(chain))
    await until(lambda: promoting.dram.used_bytes == 0)


class DamagingRead(FileCalls):
    """A read at one place waits for the gate, and then returns a flipped bit in its first byte."""

    def __init__(self) -> None:
        self.damaged_at = -1
        self.gate = threading.Event()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == self.damaged_at:
            self.gate.wait()
        count = super().preadv(fd, buffers, offset)
        if offset == self.damaged_at:
            buffers[0][0] ^= 1
        return count


async def test_a_small_slice_is_verified_again_where_a_later_read_has_written_its_last_page(
    open_store: Callable[..., Any],
) -> None:
    """Pieces of a promotion share a page there: bytes that were right when read may be wrong when they are sent."""
    layout = Layout(
        model_id="unaligned", dtype="float32", layers=44, kv_heads=2, k_head_dim=120, v_head_dim=120, block_tokens=16
    )
    whole = Shard.whole(layout)
    geometry = block_geometry(layout, whole, 16)
    first, second, *_ = image_check.cut(geometry, MIB, 64 << 10)
    shared_layer = first.layer_end - 1
    assert geometry.slice_range(shared_layer)[0] < second.start < geometry.slice_range(shared_layer)[1]

    calls = DamagingRead()
    limits = replace(LIMITS, reads_in_flight=1)  # The first piece is verified before the second one is read.
    opened: OpenStore = await open_store(calls=calls, limits=limits, dram_bytes=8 * MIB, ssd_bytes=8 * MIB)
    await opened.store.layouts.open(CALLER, layout)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(1, layout=layout)
    images = some_images(chain, shard=whole, layout=layout)
    await opened.save(client, chain, images, shard=whole, layout=layout, on_ssd=True)
    await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)
    [extent] = opened.extents(TierName.SSD).values()
    calls.damaged_at = HEADER + extent.offset_bytes + second.start
    lease = opened.lookup(client, chain.keys, shard=whole, layout=layout)
    assert lease is not None

    frames = opened.frames(lease, range(1), range(layout.layers))
    try:
        received = [await anext(frames)]  # The first piece has been read and verified.
    finally:
        calls.gate.set()
    await until(lambda: TierName.DRAM in opened.residency(chain.keys[0], whole))

    async def read_on() -> None:
        async for frame in frames:
            received.append(frame)  # noqa: PERF401  (What came before the error counts.)

    with pytest.raises(ChecksumMismatch):
        await read_on()
    assert [layer for layer, _ in received] == list(range(shared_layer))
    assert [payload for _, payload in received] == layers_of(images, shard=whole)[:shared_layer]
    assert opened.hits(chain.keys, shard=whole, layout=layout) == 0
