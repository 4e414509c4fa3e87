"""Saves of clients that disconnect, and several saves of one block at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.store.leases import Client
from kvservice.store.store import StoreLimits
from kvservice.store.transfers.upload import Upload
from kvservice_api.errors import IncompleteSave, Overloaded
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Shard
from tests.clock import HandClock
from tests.stores import (
    CALLER,
    LAYOUT,
    WHOLE,
    OpenStore,
    checksums_of,
    frames_of,
    layers_of,
    some_chain,
    some_images,
    until,
)
from tests.unit.store.test_upload import BLOCK, HEADER, loaded, nothing_left


async def half_saved(opened: OpenStore, client: Client, chain: BlockChain) -> Upload:
    upload = opened.begin_save(client, chain)
    await upload.__aenter__()
    for each in frames_of(LAYOUT, WHOLE, chain, some_images(chain))[:2]:
        upload.write(each)
    return upload


async def test_a_client_that_goes_in_the_middle_leaves_nothing_at_once(opened: OpenStore, client: Client) -> None:
    chain = some_chain(3)
    upload = await half_saved(opened, client, chain)
    assert opened.dram.used_bytes == 3 * BLOCK

    opened.store.leases.detach(CALLER, client)
    assert opened.dram.used_bytes == 0
    with pytest.raises(IncompleteSave):
        await upload.commit(checksums_of(WHOLE, some_images(chain)), on_ssd=False)
    await upload.__aexit__(None, None, None)
    await nothing_left(opened)


async def test_a_client_that_disconnects_during_its_commit_does_not_delay_other_saves(
    opened: OpenStore, client: Client
) -> None:
    """The save is complete: its commit continues, and another save of the same block meanwhile finds it stored."""
    chain, images = some_chain(2), some_images(some_chain(2))
    other = opened.store.leases.attach(CALLER, "other")
    with opened.commits_held(TierName.DRAM):
        first = asyncio.create_task(opened.save(client, chain, images))
        await until(lambda: opened.blocks.row_end > 0)
        opened.store.leases.detach(CALLER, client)
        second = asyncio.create_task(opened.save(other, chain, images))
        for _ in range(10):
            await asyncio.sleep(0)
    assert (await first).stored == [0, 1]
    assert (await second).already_stored == [0, 1]
    await nothing_left(opened, 2 * BLOCK)


async def test_a_client_that_disconnects_while_it_waits_for_another_save_or_for_space_is_released_at_once(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=3 * BLOCK + HEADER)
    owner, waiting = (opened.store.leases.attach(CALLER, name) for name in ("owner", "waiting"))
    chain = some_chain(2)
    upload = await half_saved(opened, owner, chain)
    save = asyncio.create_task(opened.save(waiting, chain, some_images(chain)))
    await until(lambda: opened.claims.waiting_for(chain.keys[0]) == 2)
    assert not save.done()

    opened.store.leases.detach(CALLER, waiting)
    with pytest.raises(IncompleteSave, match="disconnected"):
        await asyncio.wait_for(save, 30)
    await upload.__aexit__(None, None, None)
    await nothing_left(opened)


async def test_a_save_whose_client_goes_when_another_one_stores_its_blocks_ends_as_incomplete(
    opened: OpenStore, client: Client
) -> None:
    chain, images = some_chain(2), some_images(some_chain(2))
    other = opened.store.leases.attach(CALLER, "other")
    upload = await half_saved(opened, other, chain)
    waiting = asyncio.create_task(opened.save(client, chain, images))
    await until(lambda: len(opened.uploads.open) == 2)

    def detach(row: int) -> None:
        opened.blocks.listeners.remove(detach)
        opened.store.leases.detach(CALLER, client)

    opened.blocks.listeners.append(detach)
    for each in frames_of(LAYOUT, WHOLE, chain, images)[2:]:
        upload.write(each)
    assert (await upload.commit(checksums_of(WHOLE, images), on_ssd=False)).stored == [0, 1]
    await upload.__aexit__(None, None, None)
    with pytest.raises(IncompleteSave):
        await waiting
    await nothing_left(opened, 2 * BLOCK)


@pytest.mark.parametrize("turns", range(12))
async def test_a_save_that_is_cancelled_anywhere_leaves_nothing_half_done(
    opened: OpenStore, client: Client, turns: int
) -> None:
    chain, images = some_chain(3), some_images(some_chain(3))
    saving = asyncio.create_task(opened.save(client, chain, images))
    for _ in range(turns):
        await asyncio.sleep(0)
    saving.cancel()
    await asyncio.gather(saving, return_exceptions=True)
    await opened.settle()
    assert not opened.claims.object_count
    assert opened.hits(chain.keys) in (0, 3)
    assert not (await opened.save(client, chain, images)).refused


async def test_of_two_clients_that_save_the_same_one_stores_it_and_the_other_finds_it_stored(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(4)
    mine, others = some_images(chain, seed=1), some_images(chain, seed=2)
    outcomes = await asyncio.gather(
        opened.save(client, chain, mine), opened.save(opened.store.leases.attach(CALLER, "other"), chain, others)
    )
    assert [outcome.stored for outcome in outcomes] == [[0, 1, 2, 3], []]
    assert outcomes[1].already_stored == [0, 1, 2, 3]
    assert await loaded(opened, client, chain) == layers_of(mine)
    await nothing_left(opened, 4 * BLOCK)


async def test_who_waits_takes_over_where_the_first_one_gives_up(opened: OpenStore, client: Client) -> None:
    chain = some_chain(2)
    first = await half_saved(opened, client, chain)
    waiting = [asyncio.create_task(opened.save(client, chain, some_images(chain, seed=seed))) for seed in (1, 2)]
    await until(lambda: opened.claims.waiting_for(chain.keys[0]) == 3)
    await first.__aexit__(None, None, None)
    outcomes = await asyncio.gather(*waiting)
    assert [len(outcome.stored) for outcome in outcomes] == [2, 0]
    assert outcomes[1].already_stored == [0, 1]
    assert await loaded(opened, client, chain) == layers_of(some_images(chain, seed=1))


async def test_waiting_for_another_save_ends_in_time_and_costs_only_what_it_stores(
    open_store: Callable[..., Any],
) -> None:
    clock = HandClock()
    opened: OpenStore = await open_store(clock=clock, limits=StoreLimits(upload_wait_s=10))
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(3)
    slow = await half_saved(opened, client, chain[:2])
    saving = asyncio.create_task(opened.save(client, chain, some_images(chain)))
    await until(lambda: opened.claims.waiting_for(chain.keys[0]) == 2 and len(opened.uploading()) == 3)
    clock.advance(seconds=9.9)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not saving.done()
    clock.advance(seconds=0.2)
    outcome = await asyncio.wait_for(saving, 30)
    assert outcome.stored == [2]
    assert [type(error) for error in outcome.refused.values()] == [Overloaded, Overloaded]
    await slow.__aexit__(None, None, None)


async def test_saves_that_wait_for_one_another_form_no_circle(opened: OpenStore, client: Client) -> None:
    """A save has A and waits for B, whose save is abandoned: another save of both must not get B before it."""
    chain = some_chain(2)
    a, b = chain[:1], chain[1:]
    gives_up = await half_saved(opened, client, b)
    # The first has A and waits for B; the second waits for both.
    both = [asyncio.create_task(opened.save(client, chain, some_images(chain, seed=seed))) for seed in (1, 2)]
    await until(lambda: opened.claims.waiting_for(a.keys[0]) == 2 and opened.claims.waiting_for(b.keys[0]) == 3)
    third = asyncio.create_task(opened.save(client, b, some_images(b, seed=3)))
    await gives_up.__aexit__(None, None, None)
    fourth = asyncio.create_task(opened.save(client, a, some_images(a, seed=4)))
    outcomes = await asyncio.wait_for(asyncio.gather(*both, third, fourth), 30)
    assert [outcome.stored for outcome in outcomes] == [[0, 1], [], [], []]
    assert not any(outcome.refused for outcome in outcomes)


async def test_shards_of_one_block_are_uploaded_side_by_side(opened: OpenStore, client: Client) -> None:
    chain = some_chain(2)
    halves = (Shard(0, 2, 0, 1), Shard(0, 2, 1, 2))
    uploads = [opened.begin_save(client, chain, shard=half) for half in halves]
    for half, upload in zip(halves, uploads, strict=True):
        await asyncio.wait_for(upload.__aenter__(), 30)
        images = some_images(chain, shard=half)
        for each in frames_of(LAYOUT, half, chain, images):
            upload.write(each)
    for half, upload in zip(halves, uploads, strict=True):
        await upload.commit(checksums_of(half, some_images(chain, shard=half)), on_ssd=False)
        await upload.__aexit__(None, None, None)
    assert opened.hits(chain.keys) == 2
