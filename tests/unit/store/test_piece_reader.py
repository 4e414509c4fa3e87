"""Promotions whose reads fail: each ends after any failure, so that no load waits for it any longer."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.store.leases import Lease
from kvservice_api import spans
from kvservice_api.errors import ChecksumMismatch, StorageFailed
from kvservice_api.layout import Layout, Shard
from tests.file_faults import FaultyCalls
from tests.stores import CALLER, KIB, LIMITS, MIB, OpenStore, layers_of, some_chain, some_images, until

DEEP = Layout(model_id="deep", dtype="float32", layers=4, kv_heads=2, k_head_dim=512, v_head_dim=512, block_tokens=16)
WHOLE = Shard.whole(DEEP)
ONE_AT_A_TIME = replace(LIMITS, reads_in_flight=1, read_bytes=64 * KIB)  # And each piece is one layer.
TRACE = {"traceparent": f"00-{1:032x}-{2:016x}-01"}


@pytest.fixture
async def opened(open_store: Callable[..., Any], calls: FaultyCalls) -> OpenStore:
    store: OpenStore = await open_store(calls=calls, dram_bytes=8 * MIB, ssd_bytes=8 * MIB, limits=ONE_AT_A_TIME)
    await store.store.layouts.open(CALLER, DEEP)
    return store


async def leased_on_ssd(opened: OpenStore) -> tuple[Lease, list[bytes]]:
    """A lease of blocks that are only on SSD, and their layers."""
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2, layout=DEEP)
    images = some_images(chain, shard=WHOLE, layout=DEEP)
    assert not (await opened.save(client, chain, images, shard=WHOLE, layout=DEEP, on_ssd=True)).refused
    await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)
    lease = opened.lookup(client, chain.keys, shard=WHOLE, layout=DEEP)
    assert lease is not None
    return lease, layers_of(images, shard=WHOLE)


@pytest.mark.parametrize("is_traced", [False, True])
async def test_a_promotion_whose_first_read_fails_ends_and_its_block_can_be_loaded_later(
    opened: OpenStore, calls: FaultyCalls, is_traced: bool
) -> None:
    """Its later pieces are not read. A span of a traced load counts them all the same."""
    lease, layers = await leased_on_ssd(opened)
    calls.failing["preadv"] = errno.EIO
    with spans.within(spans.of_headers(TRACE) if is_traced else None), pytest.raises(StorageFailed):
        await opened.load(lease)
    promoter = opened.promoter
    assert promoter is not None
    await until(lambda: not promoter.pending_count, 10)
    assert not opened.dram.used_bytes
    calls.failing.clear()
    assert await asyncio.wait_for(opened.load(lease), 10) == layers
    await opened.settle()


async def test_a_tier_that_refuses_a_read_before_it_takes_the_pieces_fails_them(
    opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tier of another kind may raise anything. Pieces that stayed in the order would be tried for ever."""
    lease, layers = await leased_on_ssd(opened)

    async def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(opened.ssd, "read_together", refuse)
        with pytest.raises(StorageFailed, match="the device is gone"):
            await asyncio.wait_for(opened.load(lease), 10)
        promoter = opened.promoter
        assert promoter is not None
        await until(lambda: not promoter.pending_count, 10)
    assert await asyncio.wait_for(opened.load(lease), 10) == layers
    await opened.settle()


async def test_a_quarantine_that_cannot_be_recorded_delays_no_other_read(
    opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record in a tier that hangs cannot be deleted. The drive of the damaged block is not that tier's."""
    lease, layers = await leased_on_ssd(opened)
    damaged, sound = lease.rows.tolist()
    delete, stuck = opened.index.delete, asyncio.get_running_loop().create_future()
    monkeypatch.setattr(opened.index, "delete", lambda *_: stuck)
    opened.blocks.trailer_checksum[damaged] = 1
    with pytest.raises(ChecksumMismatch):
        await opened.load(lease, range(1))

    assert await asyncio.wait_for(opened.load(lease, range(1, 2)), 10) == [layer[len(layer) // 2 :] for layer in layers]

    assert opened.hits([opened.blocks.key_of(damaged)], shard=WHOLE, layout=DEEP) == 0
    assert opened.hits([opened.blocks.key_of(sound)], shard=WHOLE, layout=DEEP) == 1
    monkeypatch.setattr(opened.index, "delete", delete)
    stuck.set_exception(StorageFailed("the tier hangs no longer"))
    await opened.settle()
