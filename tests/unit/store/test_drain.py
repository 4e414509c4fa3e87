"""Drain: new saves are refused, running ones end, and blocks that are only in DRAM are written to SSD."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.store.leases import Client
from kvservice.store.operations.drain import DrainProgress
from kvservice_api.errors import Draining
from tests.stores import (
    CALLER,
    KIB,
    LAYOUT,
    WHOLE,
    OpenStore,
    caller_of,
    checksums_of,
    frames_of,
    some_chain,
    some_images,
)

BLOCK = 12 * KIB


async def drained(opened: OpenStore) -> DrainProgress:
    opened.drain.begin(CALLER)
    async with asyncio.timeout(60):
        return [progress async for progress in opened.drain.progress(CALLER)][-1]


async def test_a_drain_lets_saves_end_and_writes_what_they_brought(opened: OpenStore, client: Client) -> None:
    chain = some_chain(3)
    images = some_images(chain)
    drain = opened.drain
    async with opened.begin_save(client, chain) as upload:
        drain.begin(CALLER)
        first = await anext(drain.progress(CALLER))
        assert (first.uploads, first.done) == (3, False)
        with pytest.raises(Draining):
            opened.begin_save(client, some_chain(1, seed=5))
        for frame in frames_of(LAYOUT, WHOLE, chain, images):
            upload.write(frame)
        assert len((await upload.commit(checksums_of(WHOLE, images), on_ssd=False, then_write=False)).stored) == 3
    last = await drained(opened)
    assert (last.done, last.only_in_dram, last.unwritten, last.uploads) == (True, 0, 0, 0)
    assert opened.residency(chain.keys[2]) == {TierName.DRAM, TierName.SSD}


async def test_a_drained_store_still_serves_loads(opened: OpenStore, client: Client) -> None:
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain))
    await drained(opened)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    assert len(await opened.load(lease)) == 2


async def test_when_it_is_undone_saves_are_accepted_again_and_watchers_receive_the_state(
    opened: OpenStore, client: Client
) -> None:
    drain, chain = opened.drain, some_chain(1)
    async with opened.begin_save(client, chain):
        drain.begin(CALLER)
        watching = asyncio.create_task(_all(drain))
        await asyncio.sleep(0)
        drain.undo(CALLER)
        messages = await watching
        assert not messages[-1].done
        assert not opened.drain.is_draining
    assert not (await opened.save(client, chain, some_images(chain))).refused
    assert (await drained(opened)).done, "and it can be drained again"


async def test_a_drain_that_follows_an_undone_one_at_once_writes_everything(opened: OpenStore, client: Client) -> None:
    drain, chain = opened.drain, some_chain(2)
    images = some_images(chain)
    async with opened.begin_save(client, chain) as upload:
        drain.begin(CALLER)
        await asyncio.sleep(0)  # The drain's task begins, and waits for the upload.
        for frame in frames_of(LAYOUT, WHOLE, chain, images):
            upload.write(frame)
        await upload.commit(checksums_of(WHOLE, images), on_ssd=False, then_write=False)
        drain.undo(CALLER)
        drain.begin(CALLER)
    last = (await _all(drain))[-1]
    assert (last.done, last.only_in_dram) == (True, 0)


async def test_reads_in_place_are_loads_that_run(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(share=True)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    await opened.save(client, chain, some_images(chain))
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    async with aclosing(opened.locate(client, lease)) as steps:
        await anext(steps)
        assert (await drained(opened)).loads == 1
    assert (await drained(opened)).loads == 0


async def _all(drain: Any) -> list[DrainProgress]:
    return [progress async for progress in drain.progress(CALLER)]


async def test_what_the_policy_wants_nowhere_but_in_dram_is_counted(opened: OpenStore, client: Client) -> None:
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    await opened.store.moves.evict(CALLER, chain.keys[:1], TierName.SSD)
    last = await drained(opened)
    assert (last.done, last.only_in_dram, last.only_in_dram_bytes, last.unwritten) == (True, 1, BLOCK, 0)


async def test_without_an_ssd_tier_it_is_done_at_once(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(ssd_bytes=0)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    await opened.save(client, chain, some_images(chain))
    last = await drained(opened)
    assert (last.done, last.only_in_dram) == (True, 2)


async def test_what_had_failed_for_want_of_space_is_tried_again_at_once(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(ssd_bytes=4 * BLOCK + 4 * KIB)
    client = opened.store.leases.attach(CALLER, "test")
    first, second = some_chain(4, seed=1), some_chain(2, seed=2)
    await opened.save(client, first, some_images(first), on_ssd=True)
    lease = opened.lookup(client, first.keys)
    assert lease is not None
    await opened.save(client, second, some_images(second))
    await opened.settle()
    assert opened.residency(second.keys[0]) == {TierName.DRAM}, "all of SSD is leased"
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await drained(opened)
    assert opened.residency(second.keys[0]) == {TierName.DRAM, TierName.SSD}


async def test_a_daemon_that_stops_cannot_be_undrained(opened: OpenStore) -> None:
    opened.drain.begin_stop()
    await opened.drain.quiet()
    with pytest.raises(Draining, match="stopping"):
        opened.drain.undo(CALLER)
    assert opened.drain.is_draining
