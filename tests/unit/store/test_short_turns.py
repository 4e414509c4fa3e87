"""Requests for many blocks take many turns of the event loop, with a few blocks in each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.blocks import TierName
from kvservice.store.hints.exchange import HintLimits
from kvservice.store.hints.queue_mirror import HintSubject, QueueLimits
from kvservice.store.leases import Client, Lease
from kvservice.store.miss_reasons import SpaceFor
from kvservice.store.transfers import leased_bytes
from kvservice.store.types import Nearness
from kvservice_api.keys import BlockChain
from tests.stores import CALLER, MIB, PATIENT, OpenStore, caller_of, layers_of, some_chain, some_images

BLOCKS = 200
A_TURN = 64  # At most: two parts may share a turn.


class Turns:
    """Counts in each turn of the event loop how often something happens."""

    def __init__(self) -> None:
        self.counts = Counter[int]()
        self._turn = 0

    def note(self, count: int = 1) -> None:
        self.counts[self._turn] += count

    async def count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self._turn += 1


@contextmanager
def turns_of_listeners(opened: OpenStore) -> Iterator[Turns]:
    """How often the listeners of the block table are called: they take most of the time of a change."""
    turns = Turns()
    counting = asyncio.create_task(turns.count())

    def listen(row: int) -> None:
        turns.note()

    opened.blocks.listeners.append(listen)
    try:
        yield turns
    finally:
        opened.blocks.listeners.remove(listen)
        counting.cancel()


@pytest.fixture
async def full(open_store: Callable[..., Any]) -> OpenStore:
    """A store with `BLOCKS` blocks in both tiers."""
    opened: OpenStore = await open_store(dram_bytes=4 * MIB, ssd_bytes=8 * MIB, limits=PATIENT)
    client = opened.store.leases.attach(CALLER, "test")
    assert (await saved(opened, client)) == BLOCKS
    await opened.settle()
    return opened


async def saved(opened: OpenStore, client: Client) -> int:
    chain = some_chain(BLOCKS)
    return len((await opened.save(client, chain, some_images(chain))).stored)


async def test_a_save_of_many_blocks_makes_their_rows_in_short_turns(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trailers of 256 blocks of 128 layers take six milliseconds."""
    opened: OpenStore = await open_store(dram_bytes=4 * MIB)
    add, turns = opened.blocks.add, Turns()

    def counted(*args: Any, **kwargs: Any) -> int:
        turns.note()
        return add(*args, **kwargs)

    monkeypatch.setattr(opened.blocks, "add", counted)
    counting = asyncio.create_task(turns.count())
    assert await saved(opened, opened.store.leases.attach(CALLER, "test")) == BLOCKS
    counting.cancel()
    assert turns.counts.total() == BLOCKS and max(turns.counts.values()) <= A_TURN


async def test_a_save_that_is_cancelled_while_its_rows_are_made_leaves_nothing(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * MIB)
    add, made = opened.blocks.add, list[int]()

    def cancelling(*args: Any, **kwargs: Any) -> int:
        made.append(add(*args, **kwargs))
        if len(made) == 100:
            saving.cancel()
        return made[-1]

    monkeypatch.setattr(opened.blocks, "add", cancelling)
    saving = asyncio.create_task(saved(opened, opened.store.leases.attach(CALLER, "test")))
    with pytest.raises(asyncio.CancelledError):
        await saving
    await opened.settle()
    assert len(made) < BLOCKS and not opened.blocks.live_count and not opened.dram.used_bytes
    assert sorted(opened.blocks._free) == sorted(made), "each row is free once"
    assert not opened.records(TierName.DRAM)


async def test_listeners_are_called_for_new_blocks_only_when_lookups_find_them(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * MIB, ssd_bytes=0)
    with turns_of_listeners(opened) as turns:
        assert await saved(opened, opened.store.leases.attach(CALLER, "test")) == BLOCKS
    assert turns.counts.total() == BLOCKS, "one call for each"
    assert max(turns.counts.values()) <= A_TURN


async def test_listeners_are_called_for_the_copies_of_many_blocks_in_short_turns(
    open_store: Callable[..., Any],
) -> None:
    """Blocks share a commit, so the copies of hundreds are recorded at the same time."""
    opened: OpenStore = await open_store(dram_bytes=4 * MIB, ssd_bytes=8 * MIB)
    with opened.commits_held(TierName.SSD):
        assert await saved(opened, opened.store.leases.attach(CALLER, "test")) == BLOCKS
    with turns_of_listeners(opened) as turns:
        await opened.settle()
    assert max(turns.counts.values()) <= A_TURN
    assert len(opened.extents(TierName.SSD)) == BLOCKS


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
async def test_many_blocks_are_evicted_on_request_in_short_turns(full: OpenStore, tier: TierName) -> None:
    with turns_of_listeners(full) as turns:
        outcome = await full.store.moves.evict(CALLER, some_chain(BLOCKS).keys, tier)
    assert outcome.evicted == BLOCKS
    assert turns.counts.total() >= BLOCKS and max(turns.counts.values()) <= A_TURN


async def test_many_blocks_are_evicted_for_the_space_of_one_in_short_turns(full: OpenStore) -> None:
    with turns_of_listeners(full) as turns:
        extent = await full.evictor.reserve(TierName.DRAM, 3 * MIB, SpaceFor.SAVE)
    full.dram.release(extent)
    assert turns.counts.total() >= BLOCKS / 2 and max(turns.counts.values()) <= A_TURN


async def test_the_copies_of_many_pinned_blocks_are_queued_in_short_turns(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: OpenStore = await open_store(dram_bytes=16 * MIB, ssd_bytes=32 * MIB, map_bytes=4 * MIB, limits=PATIENT)
    client, keys = opened.store.leases.attach(CALLER, "test"), list[bytes]()
    for seed in range(2):
        chain = some_chain(BLOCKS, seed=seed)
        keys += chain.keys
        await opened.save(client, chain, some_images(chain, seed=seed))
    await opened.settle()
    assert (await opened.store.moves.evict(CALLER, keys, TierName.SSD)).evicted == 2 * BLOCKS
    assert opened.write_behind is not None
    add, queued = opened.write_behind.add, list[int]()

    def counted(rows: Sequence[int], *, ask: bool = True) -> None:
        queued.append(len(rows))
        add(rows, ask=ask)

    monkeypatch.setattr(opened.write_behind, "add", counted)
    assert (await opened.store.pins.pin(CALLER, keys, 60_000)).pinned == 2 * BLOCKS
    assert sum(queued) == 2 * BLOCKS and max(queued) <= 256
    await opened.settle()
    assert len(opened.extents(TierName.SSD)) == 2 * BLOCKS, "also what had been evicted from there"


async def test_queued_requests_of_many_blocks_are_evaluated_in_short_turns(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = HintLimits(QueueLimits(64, 64 * BLOCKS), 0.5, 1 << 40)
    opened: OpenStore = await open_store(dram_bytes=8 * MIB, limits=replace(PATIENT, hints=limits))
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(BLOCKS)
    await saved(opened, client)
    rows_of_keys, turns = opened.blocks.rows_of_keys, Turns()

    def counted(keys: Sequence[bytes]) -> NDArray[np.int64]:
        turns.note(len(keys))
        return rows_of_keys(keys)

    monkeypatch.setattr(opened.blocks, "rows_of_keys", counted)
    counting = asyncio.create_task(turns.count())
    found = set[str]()
    with opened.store.hints.open(caller_of(client)) as stream:
        for number in range(64):
            stream.put(str(number), HintSubject(b"", "", chain.packed_keys), None, 0, "")
        while len(found) < 64:
            changed = await stream.changed(1000)
            assert changed is not None
            found |= {each.request_id for each in changed if each.nearness is Nearness.IN_DRAM}
    counting.cancel()
    assert turns.counts.total() >= 64 * BLOCKS and max(turns.counts.values()) <= 2 * 512 + 2 * BLOCKS


@pytest.mark.parametrize("everything", [False, True])
async def test_many_blocks_are_discarded_in_short_turns(full: OpenStore, everything: bool) -> None:
    operators = full.store.operators
    with turns_of_listeners(full) as turns:
        if everything:
            assert await operators.discard_layout(CALLER, None) == BLOCKS
        else:
            assert await operators.discard(CALLER, [*some_chain(BLOCKS).keys, bytes(32)]) == (BLOCKS, 1)
    assert turns.counts.total() >= BLOCKS and max(turns.counts.values()) <= A_TURN
    await full.settle()


MANY = 500  # One lookup finds them without a wait.


async def leased(open_store: Callable[..., Any]) -> tuple[OpenStore, Lease, BlockChain, list[bytes]]:
    """A store, and a lease of `MANY` blocks in it, with their keys and their contents."""
    opened: OpenStore = await open_store(dram_bytes=16 * MIB, map_bytes=8 * MIB, ssd_bytes=0, limits=PATIENT)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(MANY)
    images = some_images(chain)
    for at in range(0, MANY, BLOCKS):
        await opened.save(client, chain[at : at + BLOCKS], images[at : at + BLOCKS])
    lease = opened.lookup(client, chain.keys)
    assert lease is not None and len(lease.rows) == MANY
    return opened, lease, chain, images


async def test_what_a_load_of_many_blocks_needs_is_made_and_freed_in_short_turns(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lease, _, images = await leased(open_store)
    made, freed = Turns(), Turns()

    class CountedSource(leased_bytes._Source):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.note()

        def __del__(self) -> None:
            freed.note()

    monkeypatch.setattr(leased_bytes, "_Source", CountedSource)
    counting = [asyncio.create_task(turns.count()) for turns in (made, freed)]
    assert await opened.load(lease) == layers_of(images)
    for each in counting:
        each.cancel()
    assert made.counts.total() == freed.counts.total() == MANY
    assert max(made.counts.values()) <= 256, "two parts at most"
    assert max(freed.counts.values()) <= 256


async def test_a_load_whose_blocks_are_discarded_between_two_of_its_turns_has_every_byte(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load holds all of them from its first turn on."""
    opened, lease, chain, images = await leased(open_store)
    discards = list[asyncio.Task[tuple[int, int]]]()
    add_sources = leased_bytes.LeasedBytes._add_sources

    def discarding(self: Any, *args: Any) -> None:
        add_sources(self, *args)
        if not discards:
            discards.append(asyncio.create_task(opened.store.operators.discard(CALLER, chain.keys)))

    monkeypatch.setattr(leased_bytes.LeasedBytes, "_add_sources", discarding)
    assert await opened.load(lease) == layers_of(images)
    assert await discards[0] == (MANY, 0)
    await opened.leases.release(caller_of(lease.client), lease.lease_id)
    await opened.settle()
    assert not opened.dram.used_bytes


async def test_blocks_that_leave_between_two_turns_of_their_pin_are_not_pinned(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lease, chain, _ = await leased(open_store)
    await opened.leases.release(caller_of(lease.client), lease.lease_id)
    rows_of_keys = opened.blocks.rows_of_keys
    evicted = list[asyncio.Task[None]]()

    def evicting(keys: Sequence[bytes]) -> NDArray[np.int64]:
        rows = rows_of_keys(keys)
        if not evicted:  # The task runs before the next turn of the pin.
            evicted.append(asyncio.create_task(opened.block_lifecycle.evict(rows[:100].tolist(), TierName.DRAM)))
        return rows

    monkeypatch.setattr(opened.blocks, "rows_of_keys", evicting)
    assert (await opened.store.pins.pin(CALLER, chain.keys, 60_000)).pinned == MANY - 100
    assert int(np.count_nonzero(opened.blocks.pinned(opened.files.clock.wall_ms()))) == MANY - 100
    await opened.settle()


async def test_many_pins_and_times_of_use_are_written_in_short_turns(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _, chain, _ = await leased(open_store)
    put, written = opened.index.put_again, list[int]()

    def counted(tier: TierName, names: Sequence[bytes], *args: Any) -> asyncio.Future[None]:
        written.append(len(names))
        return put(tier, names, *args)

    monkeypatch.setattr(opened.index, "put_again", counted)
    await opened.store.pins.pin(CALLER, chain.keys, 60_000)
    assert sum(written) == MANY and max(written) <= 128
    written.clear()
    opened.hits(chain.keys)
    await opened.block_lifecycle.flush_recency()
    assert sum(written) == MANY and max(written) <= 256
