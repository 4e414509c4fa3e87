"""Bytes before the record, and the record deleted before reuse: the order that makes a crash harmless."""

from __future__ import annotations

import asyncio
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import OBJECT_KEY, OBJECT_KEY_BYTES, TierName
from kvservice.index.records import Records, new_records
from kvservice.store import block_lifecycle
from kvservice.store.leases import Client
from kvservice_api.errors import IndexFull, StorageFailed
from kvservice_api.keys import KEY_BYTES
from tests.clock import HandClock, passes
from tests.stores import CALLER, WHOLE, OpenStore, caller_of, some_chain, some_images, until


async def turns(count: int = 20) -> None:
    """Run the event loop until every task that can run has run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def stored(opened: OpenStore, client: Client, blocks: int = 1, *, on_ssd: bool = True) -> tuple[bytes, ...]:
    chain = some_chain(blocks)
    outcome = await opened.save(client, chain, some_images(chain), on_ssd=on_ssd)
    assert not outcome.refused
    return chain.keys


async def test_a_block_is_visible_once_its_record_is_committed_and_not_before(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(2)
    with opened.commits_held(TierName.DRAM):
        saving = asyncio.create_task(opened.save(client, chain, some_images(chain)))
        await until(lambda: opened.dram.used_bytes > 0)
        await turns()
        assert opened.hits(chain.keys) == 0
        assert not saving.done()
        assert opened.blocks.live_count == 0, "nor does an operator see it"
    await saving
    assert opened.hits(chain.keys) == 2


@pytest.fixture
def at_link(monkeypatch: pytest.MonkeyPatch, opened: OpenStore) -> dict[int, Callable[[], object]]:
    """Blocks become visible one by one. What is called after so many of them."""
    calls: dict[int, Callable[[], object]] = {}
    link = opened.block_lifecycle._link

    def called(rows: Sequence[int]) -> None:
        link(rows)
        calls.pop(opened.blocks.live_count, lambda: None)()

    monkeypatch.setattr(block_lifecycle, "_NOTED_A_TURN", 1)
    monkeypatch.setattr(opened.block_lifecycle, "_link", called)
    return calls


async def test_a_save_that_is_cancelled_while_its_blocks_become_visible_ends_with_all_of_them(
    opened: OpenStore, client: Client, at_link: dict[int, Callable[[], object]]
) -> None:
    chain, hits = some_chain(20), list[int]()
    saving = asyncio.create_task(opened.save(client, chain, some_images(chain)))

    def cancel() -> None:
        hits.append(opened.hits(chain.keys))
        saving.cancel()

    at_link[3] = cancel
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert hits == [3], "in order"
    assert opened.hits(chain.keys) == 20, "the index has their records"
    await opened.settle()


async def test_a_block_that_is_discarded_while_others_of_its_save_become_visible_leaves_no_mark_on_its_row(
    opened: OpenStore, client: Client, at_link: dict[int, Callable[[], object]]
) -> None:
    """The row's next block would be taken as verified."""
    chain, begun, is_begun = some_chain(60), list[tuple[int, asyncio.Task[Any]]](), asyncio.Event()
    saving = asyncio.create_task(opened.save(client, chain, some_images(chain)))

    def discard() -> None:
        row = int(opened.blocks.rows_of_keys(chain.keys[:1])[0])
        begun.append((row, asyncio.create_task(opened.store.operators.discard(CALLER, chain.keys[:1]))))
        is_begun.set()

    at_link[1] = discard
    await is_begun.wait()
    ((row, discarding),) = begun
    while not discarding.done() and not saving.done():
        time.sleep(0.002)  # noqa: ASYNC251  # The commit runs on another thread, while the save gets a turn.
        await asyncio.sleep(0)
    assert discarding.done() and not saving.done(), "otherwise this tests nothing"
    assert (await saving).stored == list(range(60))
    await opened.settle()
    assert not opened.blocks.live[row] and not opened.blocks.verified[row]


async def test_a_copy_on_ssd_counts_once_its_record_is_committed_and_not_before(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(1)
    with opened.commits_held(TierName.SSD):
        saving = asyncio.create_task(opened.save(client, chain, some_images(chain), on_ssd=True))
        await until(lambda: opened.residency(chain.keys[0]) == {TierName.DRAM})
        assert opened.ssd is not None
        await until(lambda: opened.ssd is not None and opened.ssd.used_bytes > 0)
        await turns()
        assert opened.residency(chain.keys[0]) == {TierName.DRAM}
        assert not saving.done(), "a save to SSD is acknowledged when the block is there"
    await saving
    assert opened.residency(chain.keys[0]) == {TierName.DRAM, TierName.SSD}


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
async def test_the_space_of_an_evicted_copy_is_free_once_its_record_is_gone_and_not_before(
    opened: OpenStore, client: Client, tier: TierName
) -> None:
    keys = await stored(opened, client)
    space = opened.block_lifecycle.tiers[tier]
    used = space.used_bytes
    with opened.commits_held(tier):
        evicting = asyncio.create_task(opened.store.moves.evict(CALLER, keys, tier))
        await until(lambda: tier not in opened.residency(keys[0]))
        await turns()
        assert space.used_bytes == used and not evicting.done()
    await evicting
    assert space.used_bytes == 0
    assert opened.records(tier) == {}


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
async def test_the_space_of_a_discarded_block_is_free_once_its_records_are_gone_and_not_before(
    opened: OpenStore, client: Client, tier: TierName
) -> None:
    keys = await stored(opened, client)
    used = opened.dram.used_bytes
    with opened.commits_held(tier):
        discarding = asyncio.create_task(opened.store.operators.discard(CALLER, keys))
        await until(lambda: opened.hits(keys) == 0)
        await turns()
        assert opened.dram.used_bytes == used and not discarding.done()
    await discarding
    assert opened.unsettled() == "" and opened.dram.used_bytes == 0


async def test_a_block_saved_again_waits_until_the_record_of_the_old_one_is_gone(
    opened: OpenStore, client: Client
) -> None:
    """Otherwise the removal of the old record would remove the new one too."""
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain))
    with opened.commits_held(TierName.DRAM):
        discarding = asyncio.create_task(opened.store.operators.discard(CALLER, chain.keys))
        await until(lambda: opened.hits(chain.keys) == 0)
        saving = asyncio.create_task(opened.save(client, chain, some_images(chain, seed=2)))
        await turns()
        assert not opened.uploading()
    await asyncio.gather(discarding, saving)
    await opened.settle()
    assert opened.hits(chain.keys) == 1
    assert set(opened.records(TierName.DRAM)) == {chain.keys[0] + WHOLE.encode()}


async def test_removals_of_one_object_follow_one_another(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a save that waited for the last of them would lose its record to an earlier removal."""
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    delete, gate, asked = opened.index.delete, asyncio.Event(), []

    def late(tier: TierName, names: Sequence[bytes]) -> asyncio.Future[None]:
        asked.append(tier)

        async def work() -> None:
            await gate.wait()
            await delete(tier, names)

        return asyncio.ensure_future(work())

    monkeypatch.setattr(opened.index, "delete", late)
    evicting = asyncio.create_task(opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM))
    await until(lambda: asked == [TierName.DRAM])
    discarding = asyncio.create_task(opened.store.operators.discard(CALLER, chain.keys))
    await until(lambda: opened.hits(chain.keys) == 0)
    saving = asyncio.create_task(opened.save(client, chain, some_images(chain, seed=2)))
    await turns()
    assert asked == [TierName.DRAM], "the second removal waits for the first"

    gate.set()
    await asyncio.gather(evicting, discarding, saving)
    assert len(asked) == 3
    await opened.settle()
    assert set(opened.records(TierName.DRAM)) == {chain.keys[0] + WHOLE.encode()}


async def test_where_an_old_record_cannot_be_removed_a_new_save_is_refused_in_time(
    open_store: Callable[..., Any],
) -> None:
    clock = HandClock()
    opened: OpenStore = await open_store(clock=clock)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(1)
    await opened.save(client, chain, some_images(chain))
    with opened.commits_held(TierName.DRAM):
        discarding = asyncio.create_task(opened.store.operators.discard(CALLER, chain.keys))
        await until(lambda: opened.hits(chain.keys) == 0)
        saving = asyncio.create_task(opened.save(client, chain, some_images(chain)))
        await turns()
        assert not saving.done()
        await until(lambda: passes(clock) and saving.done())
        assert isinstance((await saving).refused[0], StorageFailed)
    await discarding


async def test_one_block_evicted_twice_at_one_time_leaves_once(opened: OpenStore, client: Client) -> None:
    keys = await stored(opened, client)
    discarding = asyncio.ensure_future(opened.store.operators.discard(CALLER, keys))
    outcomes = await asyncio.gather(
        *(
            opened.store.moves.evict(CALLER, keys, tier)
            for tier in [TierName.DRAM, TierName.SSD, TierName.DRAM, TierName.SSD]
        )
    )
    await discarding
    assert opened.hits(keys) == 0
    assert sum(outcome.evicted for outcome in outcomes) <= 2
    await until(lambda: opened.unsettled() == "")


@pytest.mark.parametrize("turns_before", range(6))
async def test_an_eviction_whose_caller_is_cancelled_continues_and_leaks_nothing(
    opened: OpenStore, client: Client, turns_before: int
) -> None:
    keys = await stored(opened, client, 3)
    await opened.store.moves.evict(CALLER, keys[2:], TierName.SSD)  # The last one has its only copy in DRAM.
    evicting = asyncio.create_task(opened.store.moves.evict(CALLER, keys, TierName.DRAM))
    await turns(turns_before)
    evicting.cancel()
    await asyncio.gather(evicting, return_exceptions=True)
    await opened.settle()
    assert opened.hits(keys) == (3 if turns_before == 0 else 2)


async def test_a_save_that_is_cancelled_while_its_record_is_committed_leaves_nothing(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(2)
    with opened.commits_held(TierName.DRAM):
        saving = asyncio.create_task(opened.save(client, chain, some_images(chain)))
        await until(lambda: opened.dram.used_bytes > 0)
        await turns()
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
        assert opened.dram.used_bytes > 0, (
            "the record may still be committed: its space is not reused before it is deleted"
        )
    await until(lambda: opened.dram.used_bytes == 0)
    assert opened.hits(chain.keys) == 0 and opened.records(TierName.DRAM) == {}
    assert not (await opened.save(client, chain, some_images(chain))).refused


async def test_a_full_index_from_which_no_block_may_leave_refuses_saves_and_nothing_else(
    opened: OpenStore, client: Client
) -> None:
    keys = await stored(opened, client)
    lease = opened.lookup(client, keys)
    names = await filled_index(opened)
    chain, used = some_chain(20, seed=1), opened.dram.used_bytes

    outcome = await opened.save(client, chain, some_images(chain))
    assert {type(error) for error in outcome.refused.values()} == {IndexFull} and len(outcome.refused) == 20
    await until(lambda: opened.dram.used_bytes == used)

    assert lease is not None and len(await opened.load(lease)) == 2
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    assert (await opened.store.moves.evict(CALLER, keys, TierName.DRAM)).evicted == 1
    assert await opened.store.operators.discard(CALLER, keys) == (1, 0)
    await opened.index.delete(TierName.DRAM, names)
    assert not (await opened.save(client, chain, some_images(chain))).refused


async def filled_index(opened: OpenStore) -> list[bytes]:
    """Fills the DRAM tier's index completely. Returns the keys of its records."""
    names: list[bytes] = []
    for count in (100, 1):
        refusals = 0
        while refusals < 20:
            some = [os.urandom(40) for _ in range(count)]
            records = new_records(count)
            for column in ("layout_id", "token_count", "size_bytes"):
                records[column] = 1
            try:
                await opened.index.put(TierName.DRAM, some, records)
                names += some
                refusals = 0  # Commits free pages, so it is full only after many refusals in a row.
            except IndexFull:
                refusals += 1
    return names


@pytest.mark.parametrize("error", [StorageFailed("the disk is gone"), RuntimeError("an unexpected error")])
async def test_a_removal_that_fails_is_reported_and_tried_again_until_it_succeeds(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(block_lifecycle, "_RETRY_S", 0.001)
    keys = await stored(opened, client, on_ssd=False)
    delete, failures = opened.index.delete, 3

    def failing(tier: TierName, names: Sequence[bytes]) -> asyncio.Future[None]:
        nonlocal failures
        failures -= 1
        if failures < 0:
            return delete(tier, names)
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(error)
        return failed

    monkeypatch.setattr(opened.index, "delete", failing)
    with pytest.raises(StorageFailed, match=str(error)):
        await opened.store.operators.discard(CALLER, keys)
    assert opened.hits(keys) == 0, "it is invisible at once"
    await until(lambda: opened.unsettled() == "")
    assert failures < 0 and opened.counters.storage_errors == 3


async def test_use_times_that_could_not_be_written_are_written_the_next_time(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = await stored(opened, client)
    await opened.block_lifecycle.flush_recency()
    opened.hits(keys)

    def failing(tier: TierName, names: Sequence[bytes], records: Records) -> asyncio.Future[None]:
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(StorageFailed("the disk is gone"))
        return failed

    with monkeypatch.context() as patched:
        patched.setattr(opened.index, "put_again", failing)
        with pytest.raises(StorageFailed):
            await opened.block_lifecycle.flush_recency()
    await opened.block_lifecycle.flush_recency()
    for tier in (TierName.DRAM, TierName.SSD):
        assert opened.index.load(tier).records["hits"].tolist() == [1]
        assert opened.index.load(tier).records["access_seq"].tolist() == [opened.blocks.next_access_seq - 1]


async def test_use_times_of_very_many_blocks_are_written_in_small_steps(opened: OpenStore) -> None:
    """Python objects for all of them at once would block the event loop for long; the test measures their memory."""
    count = 200_000
    names = np.zeros((count, OBJECT_KEY_BYTES), np.uint8)
    names[:, :4] = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 4)
    names[:, KEY_BYTES:] = np.frombuffer(WHOLE.encode(), np.uint8)
    rows = opened.blocks.add_many(names.view(OBJECT_KEY)[:, 0], {})
    opened.blocks.touch(rows, 1)
    tracemalloc.start()
    try:
        await opened.block_lifecycle.flush_recency()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 16 * count, "the row numbers as an array, and masks of all rows"
    assert not opened.blocks.used_since_flush.any()
