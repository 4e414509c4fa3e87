"""No unverified byte leaves the store, and what cannot be read costs only its own block."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.store import image_check
from kvservice.store.leases import Client
from kvservice_api.errors import ChecksumMismatch, StorageFailed
from kvservice_api.image import block_geometry
from kvservice_api.layout import Shard
from tests.file_faults import FaultyCalls
from tests.stores import (
    CALLER,
    KIB,
    LAYOUT,
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


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 8]))


def damage(opened: OpenStore, tier: TierName, key: bytes, at: int) -> None:
    row = int(opened.blocks.rows_of_keys([key])[0])
    extent = opened.blocks.extent(row, tier)
    assert extent is not None
    [path] = opened.files.folder.glob("ssd-*.kv") if tier == TierName.SSD else opened.files.shared_memory.rglob("arena")
    flip(path, HEADER + extent.offset_bytes + at)


GEOMETRY = block_geometry(LAYOUT, Shard.whole(LAYOUT), 16)
WAYS = ("load from dram", "promote", "read through", "write behind", "scrub dram", "scrub ssd")
SLICE = GEOMETRY.slice_bytes(0)
PLACES = (
    0,
    SLICE - 1,
    SLICE + 7,
    GEOMETRY.trailer_offset,
    GEOMETRY.image_bytes - 1,
)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("how", WAYS)
async def test_a_flipped_bit_is_found_before_any_byte_of_its_slice_leaves_and_the_block_is_a_miss(
    open_store: Callable[..., Any], calls: FaultyCalls, how: str, at: int
) -> None:
    dram_bytes = BLOCK + HEADER if how == "read through" else 64 * BLOCK
    opened: OpenStore = await open_store(calls=calls, dram_bytes=dram_bytes)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(1)
    [key] = chain.keys
    if how == "write behind":
        with calls.held("pwritev"):
            other = some_chain(8, seed=5)  # They come before it in the queue.
            await opened.save(client, other, some_images(other, seed=5))
            await opened.save(client, chain, some_images(chain))
            damage(opened, TierName.DRAM, key, at)
        await until(lambda: opened.hits([key]) == 0)
        assert opened.hits(other.keys) == 8
    elif how.startswith("scrub"):
        await opened.save(client, chain, some_images(chain), on_ssd=True)
        tier = TierName(how.removeprefix("scrub "))
        damage(opened, tier, key, at)
        progress = [step async for step in opened.scrub.run(CALLER, [tier], 1 << 40)]
        assert progress[-1].damaged == 1
    else:
        tier = TierName.DRAM if how == "load from dram" else TierName.SSD
        if tier == TierName.SSD:
            await on_ssd(opened, client, chain)
        else:
            await opened.save(client, chain, some_images(chain), on_ssd=True)
        if how == "read through":
            opened.dram.reserve(BLOCK)  # There is no space to promote it.
        damage(opened, tier, key, at)
        lease = opened.lookup(client, [key])
        assert lease is not None
        received: list[tuple[int, bytes]] = []

        async def load() -> None:
            async for each in opened.frames(lease, range(1), range(2)):
                received.append(each)  # noqa: PERF401  (What came before the error counts.)

        with pytest.raises(ChecksumMismatch):
            await load()
        sound = layers_of(some_images(chain))
        assert all(payload == sound[layer] for layer, payload in received), "what left is right"
        opened.leases.begin_release(caller_of(client), lease.lease_id)
    assert opened.hits([key]) == 0, "it reads as a miss"
    assert opened.counters.quarantined_blocks == 1
    await until(lambda: key not in {name[:32] for name in opened.records(TierName.DRAM)})
    assert not (await opened.save(client, chain, some_images(chain), on_ssd=how != "read through")).already_stored


async def test_a_disk_that_cannot_be_read_fails_the_load_and_keeps_the_block(
    opened: OpenStore, client: Client, calls: FaultyCalls
) -> None:
    chain = some_chain(2)
    images = await on_ssd(opened, client, chain)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    calls.failing["preadv"] = 5
    with pytest.raises(StorageFailed):
        await opened.load(lease)
    await until(lambda: opened.dram.used_bytes == 0)
    calls.failing.clear()  # Not earlier, because the second block may not have been read yet, and would stay in DRAM.
    assert await opened.load(lease) == layers_of(images)
    assert opened.counters.quarantined_blocks == 0


async def test_blocks_beside_one_that_cannot_be_read_are_promoted_and_the_error_names_that_one(
    opened: OpenStore, client: Client, calls: FaultyCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are read together."""
    chain = some_chain(6)
    await on_ssd(opened, client, chain)
    row = opened.blocks.row_of(chain.keys[2], Shard.whole(LAYOUT))
    bad = HEADER + opened.extents(TierName.SSD)[row].offset_bytes
    preadv = calls.preadv

    def bad_sector(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "bad sector")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(calls, "preadv", bad_sector)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    with pytest.raises(StorageFailed, match="bad sector") as failed:
        await asyncio.wait_for(opened.load(lease), 30)
    assert failed.value.details["key"] == chain.keys[2].hex()
    await opened.settle()
    assert [TierName.DRAM in opened.residency(key) for key in chain.keys] == [True, True, False, True, True, True]


async def test_what_else_an_io_thread_raises_ends_the_promotions_that_it_reads(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = some_chain(1)
    await on_ssd(opened, client, chain)

    def no_memory(*given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(image_check, "read_trailer", no_memory)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    with pytest.raises(StorageFailed, match="MemoryError"):
        await asyncio.wait_for(opened.load(lease), 30)
    await opened.settle()
    assert opened.residency(chain.keys[0]) == {TierName.SSD}
