"""Places of leased blocks: right, held while a client reads there, and verified on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvservice.blocks import Extent, TierName
from kvservice.store.leases import Client, Lease
from kvservice.store.transfers.in_place_reads import Located, NotInPlace
from kvservice_api.errors import ChecksumMismatch, LeaseExpired, NotShared, Overloaded, StorageFailed
from kvservice_api.image import block_geometry
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from tests.clock import FakeClock
from tests.file_faults import FaultyCalls
from tests.stores import (
    CALLER,
    KIB,
    LAYOUT,
    LIMITS,
    MIB,
    WHOLE,
    OpenStore,
    caller_of,
    layer_of,
    some_chain,
    some_images,
    until,
)

GEOMETRY = block_geometry(LAYOUT, WHOLE, LAYOUT.block_tokens)
DRAM, SSD = TierName.DRAM, TierName.SSD
HEADER = 4 * KIB  # Of an SSD file.


@pytest.fixture
async def opened(open_store: Callable[..., Any]) -> OpenStore:
    store: OpenStore = await open_store(share=True)
    return store


async def saved(opened: OpenStore, client: Client, blocks: int = 3) -> tuple[BlockChain, list[bytes], Lease]:
    """Blocks in both tiers, leased."""
    chain = some_chain(blocks)
    images = some_images(chain)
    await opened.save(client, chain, images, on_ssd=True)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    return chain, images, lease


def bytes_at(opened: OpenStore, located: Located, block: int, layer: int) -> bytes:
    begin, end = GEOMETRY.slice_range(layer)
    extent = Extent(0, int(located.offsets[block]), GEOMETRY.image_bytes)
    return bytes(opened.dram.view(extent)[begin:end])


def run(opened: OpenStore, lease: Lease, *, verify: bool = False) -> Any:
    return opened.locate(lease.client, lease, verify=verify)


async def test_places_in_dram_are_returned_at_once_and_stay_until_the_reader_ends(
    opened: OpenStore, client: Client
) -> None:
    chain, images, lease = await saved(opened, client)
    steps = run(opened, lease)
    located = await anext(steps)
    assert isinstance(located, Located)
    assert await anext(steps) == LAYOUT.layers
    assert [bytes_at(opened, located, block, 1) for block in range(3)] == [layer_of(image, 1) for image in images]
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    assert (await opened.store.moves.evict(CALLER, chain.keys, DRAM)).held == 3
    await steps.aclose()
    assert (await opened.store.moves.evict(CALLER, chain.keys, DRAM)).held == 0
    generations = opened.dram.generations(located.offsets)
    assert generations == [generation + 1 for generation in located.generations]


async def test_blocks_on_ssd_are_promoted_layer_by_layer(opened: OpenStore, client: Client) -> None:
    chain, images, lease = await saved(opened, client)
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await opened.store.moves.evict(CALLER, chain.keys[1:], DRAM)
    leased = opened.lookup(client, chain.keys)
    assert leased is not None
    steps = run(opened, leased)
    located = await anext(steps)
    assert await anext(steps) == 0, "the places are known before the first layer is there"
    ready = 0
    while ready < LAYOUT.layers:
        before, ready = ready, await anext(steps)
        assert ready > before, "layers that came together are reported together"
        layer = ready - 1
        found = [bytes_at(opened, located, block, layer) for block in range(3)]
        assert found == [layer_of(image, layer) for image in images]
    await steps.aclose()
    await until(lambda: all(opened.blocks.is_resident(int(row), DRAM) for row in leased.rows))
    places = [opened.blocks.extent(int(row), DRAM) for row in leased.rows]
    assert [each.offset_bytes for each in places if each is not None] == located.offsets.tolist()
    assert opened.blocks.verified[leased.rows].all(), "the first by its upload, the others during their promotion"


async def test_the_number_of_layers_is_repeated_also_while_the_disk_reads_for_other_promotions(
    open_store: Callable[..., Any],
) -> None:
    """So that a client does not take a slow disk for a daemon that hangs."""
    calls = FaultyCalls()
    opened = await open_store(share=True, clock=SlowClock(), calls=calls)
    client = opened.store.leases.attach(CALLER, "test")
    chain, other = some_chain(1), some_chain(2, seed=1)
    for each in (chain, other):
        await opened.save(client, each, some_images(each), on_ssd=True)
        await opened.store.moves.evict(CALLER, each.keys, DRAM)
    leased = opened.lookup(client, chain.keys)
    assert leased is not None
    extent = opened.blocks.extent(int(leased.rows[0]), SSD)
    with calls.held("preadv", HEADER + extent.offset_bytes) as waiting:
        steps = run(opened, leased)
        assert isinstance(await anext(steps), Located)
        assert await anext(steps) == 0
        waits = asyncio.ensure_future(anext(steps))
        await asyncio.to_thread(waiting.acquire)
        await opened.store.moves.prefetch(CALLER, other.keys, within_s=0.0, wait=True)
        assert await asyncio.wait_for(waits, 30) == 0
    while await anext(steps) < LAYOUT.layers:
        pass
    await steps.aclose()


async def test_layers_count_from_the_first_wanted_one_also_if_an_earlier_piece_is_read_after_it(
    open_store: Callable[..., Any],
) -> None:
    """As for a rank of a pipeline, whose layers begin in the middle of the stored ones."""
    layout = Layout("large", "float32", layers=4, kv_heads=2, k_head_dim=512, v_head_dim=512, block_tokens=16)
    calls = FaultyCalls()
    opened = await open_store(
        share=True, dram_bytes=4 * MIB, ssd_bytes=8 * MIB, limits=replace(LIMITS, read_bytes=64 * KIB), calls=calls
    )
    await opened.store.layouts.open(CALLER, layout)
    client, chain, whole = opened.store.leases.attach(CALLER, "test"), some_chain(1, layout=layout), Shard.whole(layout)
    images = some_images(chain, shard=whole, layout=layout)
    await opened.save(client, chain, images, shard=whole, layout=layout, on_ssd=True)
    await opened.store.moves.evict(CALLER, chain.keys, DRAM)
    lease = opened.lookup(client, chain.keys, shard=replace(whole, layer_begin=2), layout=layout)
    assert lease is not None
    extent = opened.blocks.extent(int(lease.rows[0]), SSD)
    second_piece = block_geometry(layout, whole, layout.block_tokens).slice_range(1)[0]
    with calls.held("preadv", HEADER + extent.offset_bytes + second_piece):
        steps = run(opened, lease)
        assert isinstance(await anext(steps), Located)
        seen = [await anext(steps)]
        while 0 <= seen[-1] < lease.shard.layers:
            seen.append(await asyncio.wait_for(anext(steps), 30))
        assert seen == sorted(seen) and seen[0] == 0, seen
    await steps.aclose()


class SlowClock(FakeClock):
    """A quarter of a second passes before each look at it."""

    def monotonic_s(self) -> float:
        self.advance(seconds=0.25)
        return super().monotonic_s()


async def test_a_promoted_block_without_a_record_stays_while_it_is_read(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, images, lease = await saved(opened, client)
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await opened.store.moves.evict(CALLER, chain.keys, DRAM)
    leased, promotion = opened.lookup(client, chain.keys), opened.promoter
    assert leased is not None and promotion is not None
    put = opened.index.put

    def refuse_dram(tier: TierName, *arguments: Any) -> Any:
        if tier is DRAM:
            raise StorageFailed("the index is broken")
        return put(tier, *arguments)

    monkeypatch.setattr(opened.index, "put", refuse_dram)
    steps = run(opened, leased)
    located = await anext(steps)
    while await anext(steps) < LAYOUT.layers:
        pass
    await until(lambda: not promotion._pending)
    for _ in range(10):  # What follows the promotion's end.
        await asyncio.sleep(0)
    assert opened.dram.generations(located.offsets) == located.generations
    assert [bytes_at(opened, located, block, 0) for block in range(3)] == [layer_of(image, 0) for image in images]
    await steps.aclose()
    await until(lambda: opened.dram.used_bytes == 0)
    assert [each - 1 for each in opened.dram.generations(located.offsets)] == located.generations


async def test_the_end_of_the_client_ends_the_call(opened: OpenStore, client: Client) -> None:
    _, _, lease = await saved(opened, client)
    steps = run(opened, lease)
    assert isinstance(await anext(steps), Located)
    await anext(steps)
    waiting = asyncio.ensure_future(anext(steps))
    await asyncio.sleep(0)
    opened.store.leases.detach(CALLER, client)
    with pytest.raises(LeaseExpired, match="Attach"):
        await waiting
    await asyncio.wait_for(opened.store.drain.quiet(), 30)  # No load is open.


async def test_what_does_not_lie_in_one_piece_in_dram_is_not_in_place(open_store: Callable[..., Any]) -> None:
    opened = await open_store(share=True, dram_bytes=32 * KIB)
    client = opened.store.leases.attach(CALLER, "test")
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    await opened.store.moves.evict(CALLER, chain.keys, DRAM)
    other = some_chain(2, seed=1)
    await opened.save(client, other, some_images(other), on_ssd=True)
    held = opened.lookup(client, other.keys)
    lease = opened.lookup(client, chain.keys)
    assert held is not None and lease is not None
    found = await anext(run(opened, lease))
    assert isinstance(found, NotInPlace) and "no space" in found.why

    halves = some_chain(1, seed=2)
    for shard in (Shard(0, 1, 0, 2), Shard(1, 2, 0, 2)):
        opened.leases.begin_release(caller_of(client), held.lease_id)
        await opened.save(client, halves, some_images(halves, shard=shard), shard=shard)
    lease = opened.lookup(client, halves.keys)
    assert lease is not None
    found = await anext(run(opened, lease))
    assert isinstance(found, NotInPlace) and "several shards" in found.why
    await asyncio.wait_for(opened.store.drain.quiet(), 30)  # No load is open.


async def test_verified_is_what_this_daemon_has_seen(opened: OpenStore, client: Client) -> None:
    chain, _, lease = await saved(opened, client)
    blocks = opened.blocks
    assert blocks.verified[lease.rows].all(), "an upload's checksums matched"
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await opened.store.moves.evict(CALLER, chain.keys, DRAM)
    assert not blocks.verified[lease.rows].any()
    await opened.store.moves.prefetch(CALLER, chain.keys, within_s=0, wait=True)
    assert blocks.verified[lease.rows].all(), "a promotion verifies"


async def test_after_a_restart_blocks_are_verified_for_who_views_them_and_damage_is_a_miss(
    opened: OpenStore, client: Client
) -> None:
    chain, _, _ = await saved(opened, client)
    files = opened.files
    await opened.close()
    again = files.open()
    try:
        client = again.store.leases.attach(CALLER, "again")
        lease = again.lookup(client, chain.keys)
        assert lease is not None
        verified = again.blocks.verified
        assert not verified[lease.rows].any()
        steps = run(again, lease)
        await anext(steps)
        await steps.aclose()
        assert not verified[lease.rows].any(), "who copies verifies the copies"
        extent = again.blocks.extent(int(lease.rows[1]), DRAM)
        assert extent is not None
        again.dram.view(extent)[100] ^= 1
        with pytest.raises(ChecksumMismatch):
            await anext(run(again, lease, verify=True))
        assert again.hits(chain.keys) == 1
        assert again.counters.quarantined_blocks == 1
        assert verified[lease.rows].tolist() == [True, False, False]
    finally:
        await again.close()


async def test_an_arena_that_is_not_shared_has_no_places(open_store: Callable[..., Any]) -> None:
    opened = await open_store()
    client = opened.store.leases.attach(CALLER, "test")
    _, _, lease = await saved(opened, client)
    with pytest.raises(NotShared):
        await anext(run(opened, lease))


async def test_open_calls_are_bounded(open_store: Callable[..., Any]) -> None:
    opened = await open_store(share=True, limits=replace(LIMITS, loads_max=1))
    _, _, lease = await saved(opened, opened.store.leases.attach(CALLER, "test"))
    first = run(opened, lease)
    await anext(first)
    with pytest.raises(Overloaded):
        await anext(run(opened, lease))
    await first.aclose()
    last = run(opened, lease)
    await anext(last)
    await last.aclose()
