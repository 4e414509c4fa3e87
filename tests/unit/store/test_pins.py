"""Pins: the copies that they keep, their duration, and their limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.index.records import Records
from kvservice.store.leases import Client
from kvservice.store.mover import evictor
from kvservice.store.mover.evictor import Watermarks
from kvservice.store.operations import pins
from kvservice.store.operations.pins import PinOutcome
from kvservice.store.store import StoreLimits
from kvservice_api.errors import InvalidRequest, PinsFull, StorageFailed, TierFull
from tests.stores import CALLER, KIB, LAYOUT, LIMITS, OpenStore, StoreFiles, some_chain, some_images, until

BLOCK = 12 * KIB  # Of the tests' layout.
HEADER = 4 * KIB  # Of the arena, and of each SSD file.
ALL = StoreLimits(reserve_wait_s=10.0, upload_wait_s=2.0, pin_fraction_max=1.0)
HOUR_MS = 3_600_000


async def saved(opened: OpenStore, client: Client, blocks: int, *, seed: int = 0, on_ssd: bool = True) -> list[bytes]:
    chain = some_chain(blocks, seed=seed)
    outcome = await opened.save(client, chain, some_images(chain, seed=seed), on_ssd=on_ssd)
    assert not outcome.refused
    return list(chain.keys)


def records_pinned(opened: OpenStore, tier: TierName) -> dict[bytes, int]:
    """Block key -> the pin in its record."""
    found = opened.index.load(tier)
    return {key[:32]: int(at) for key, at in zip(found.keys, found.records["pinned_until_ms"], strict=True)}


# Eviction


async def test_a_pinned_block_leaves_dram_for_its_copy_on_ssd_and_never_ssd(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=8 * BLOCK + HEADER, limits=ALL)
    client = opened.store.leases.attach(CALLER, "test")
    pinned = await saved(opened, client, 2)
    assert (await opened.store.pins.pin(CALLER, pinned, HOUR_MS)).pinned == 2
    for seed in range(1, 8):
        await saved(opened, client, 3, seed=seed)
    assert [opened.residency(key) for key in pinned] == [{TierName.SSD}, {TierName.SSD}]
    assert opened.counters.evicted_ssd_blocks > 8
    assert opened.hits(pinned) == 2


async def test_a_pinned_block_that_only_dram_holds_stays_there(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=6 * BLOCK + HEADER, ssd_bytes=0, limits=ALL)
    client = opened.store.leases.attach(CALLER, "test")
    pinned = await saved(opened, client, 2, on_ssd=False)
    await opened.store.pins.pin(CALLER, pinned, HOUR_MS)
    for seed in range(1, 6):
        await saved(opened, client, 3, seed=seed, on_ssd=False)
    assert opened.hits(pinned) == 2

    opened.files.clock.advance(seconds=3601)
    await saved(opened, client, 6, seed=9, on_ssd=False)
    assert opened.hits(pinned) == 0, "the pin is over"


async def test_where_everything_is_pinned_saves_are_refused(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0, limits=ALL)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 4, on_ssd=False)
    await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    chain = some_chain(1, seed=5)
    outcome = await opened.save(client, chain, some_images(chain))
    assert isinstance(outcome.refused[0], TierFull)

    await opened.store.pins.unpin(CALLER, keys[3:])
    assert not (await opened.save(client, chain, some_images(chain))).refused
    assert opened.hits(keys) == 3


async def test_a_block_that_is_pinned_once_it_was_chosen_to_leave_stays(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0, limits=ALL)
    client = opened.store.leases.attach(CALLER, "test")
    first, second, third, _ = [(await saved(opened, client, 1, seed=seed, on_ssd=False))[0] for seed in range(4)]
    await saved(opened, client, 1, seed=4, on_ssd=False)
    assert opened.hits([first]) == 0, "all four are ranked now"
    await opened.store.pins.pin(CALLER, [second], HOUR_MS)
    await saved(opened, client, 1, seed=5, on_ssd=False)
    assert (opened.hits([second]), opened.hits([third])) == (1, 0)


@pytest.mark.parametrize("ssd_bytes", [0, 8 * BLOCK + HEADER])
async def test_many_pinned_blocks_do_not_hide_the_others_from_eviction(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ssd_bytes: int
) -> None:
    monkeypatch.setattr(evictor, "_VICTIMS_AHEAD", 2)
    opened: OpenStore = await open_store(dram_bytes=8 * BLOCK + HEADER, ssd_bytes=ssd_bytes, limits=ALL)
    client = opened.store.leases.attach(CALLER, "test")
    pinned = await saved(opened, client, 4, seed=1, on_ssd=bool(ssd_bytes))
    await saved(opened, client, 4, seed=2, on_ssd=bool(ssd_bytes))
    await opened.store.pins.pin(CALLER, pinned, HOUR_MS)
    await saved(opened, client, 3, seed=3, on_ssd=bool(ssd_bytes))
    assert opened.hits(pinned) == 4


async def test_watermarks_do_not_evict_pinned_blocks(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(
        dram_bytes=10 * BLOCK + HEADER, ssd_bytes=10 * BLOCK + HEADER, limits=ALL, watermarks=Watermarks(0.5, 0.6)
    )
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 3)
    await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    for seed in range(1, 6):
        await saved(opened, client, 3, seed=seed)
    await until(lambda: opened.counters.evicted_ssd_blocks > 3)
    assert opened.hits(keys) == 3


@pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
async def test_an_eviction_on_request_leaves_what_a_pin_keeps(
    opened: OpenStore, client: Client, tier: TierName
) -> None:
    keys = await saved(opened, client, 2)
    await opened.store.pins.pin(CALLER, keys[:1], HOUR_MS)
    other = TierName.SSD if tier == TierName.DRAM else TierName.DRAM
    await opened.store.moves.evict(CALLER, keys, other)
    outcome = await opened.store.moves.evict(CALLER, keys, tier)
    assert outcome.held == (tier == TierName.SSD or opened.residency(keys[0]) == {TierName.DRAM})
    assert opened.residency(keys[0]) >= {TierName.SSD}, "the copy on SSD is the one that a pin keeps"
    assert opened.residency(keys[1]) == set()


async def test_an_explicit_discard_drops_a_pinned_block(opened: OpenStore, client: Client) -> None:
    keys = await saved(opened, client, 1)
    await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    assert await opened.store.operators.discard(CALLER, keys) == (1, 0)
    await opened.settle()
    assert opened.hits(keys) == 0
    again = await saved(opened, client, 1)
    assert again == keys and not opened.blocks.pinned(0).any(), "a block that is saved again is not pinned"


async def test_a_pin_has_a_block_written_to_ssd_that_the_policy_had_dropped_there(
    opened: OpenStore, client: Client
) -> None:
    keys = await saved(opened, client, 1)
    await opened.store.moves.evict(CALLER, keys, TierName.SSD)
    await opened.settle()
    assert opened.residency(keys[0]) == {TierName.DRAM}
    await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    await opened.settle()
    assert opened.residency(keys[0]) == {TierName.DRAM, TierName.SSD}


# Time


async def test_a_pin_is_in_the_index_when_it_is_answered_and_survives_a_kill(
    store_files: Callable[..., StoreFiles],
) -> None:
    files = store_files(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0, limits=ALL)
    opened = files.open()
    keys = await _first_saved(opened)
    await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    await opened.kill()

    opened = files.open()
    client = opened.store.leases.attach(CALLER, "test")
    for seed in (7, 8, 9):
        await saved(opened, client, 2, seed=seed, on_ssd=False)
    assert opened.hits(keys) == 2
    await opened.close()

    files.clock.advance(seconds=3601)
    opened = files.open()
    await saved(opened, opened.store.leases.attach(CALLER, "test"), 4, seed=10, on_ssd=False)
    assert opened.hits(keys) == 0, "its time has passed, though no call noticed it yet"
    await opened.close()


async def _first_saved(opened: OpenStore) -> list[bytes]:
    await opened.store.layouts.open(CALLER, LAYOUT)
    client = opened.store.leases.attach(CALLER, "test")
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain))
    return list(chain.keys)


async def test_a_clock_that_was_set_back_prolongs_no_pin_beyond_the_longest(
    store_files: Callable[..., StoreFiles],
) -> None:
    files = store_files()
    opened = files.open()
    keys = await _first_saved(opened)
    await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    await opened.close()
    files.clock._wall_offset_ms -= 10 * 365 * 86_400_000
    opened = files.open()
    latest_ms = files.clock.wall_ms() + files.limits.pin_ttl_max_s * 1000
    row = int(opened.blocks.rows_of_keys(keys)[0])
    assert 0 < opened.blocks.pinned_until_ms[row] <= latest_ms
    await opened.close()


async def test_a_later_pin_replaces_an_earlier_one(opened: OpenStore, client: Client) -> None:
    keys = await saved(opened, client, 1)
    for ttl_ms in (HOUR_MS, 1000):
        outcome = await opened.store.pins.pin(CALLER, keys, ttl_ms)
        assert outcome.until_ms == opened.files.clock.wall_ms() + ttl_ms
        for tier in (TierName.DRAM, TierName.SSD):
            assert records_pinned(opened, tier) == {keys[0]: outcome.until_ms}
    opened.files.clock.advance(seconds=1)
    assert await opened.store.pins.unpin(CALLER, keys) == (0, 1, 0), "at its end it is over"


@pytest.mark.parametrize("ttl_ms", [0, 30 * 86_400_000 + 1])
async def test_a_time_of_nothing_or_beyond_the_longest_is_refused(
    opened: OpenStore, client: Client, ttl_ms: int
) -> None:
    keys = await saved(opened, client, 1)
    with pytest.raises(InvalidRequest, match="at most 2592000 s"):
        await opened.store.pins.pin(CALLER, keys, ttl_ms)
    assert records_pinned(opened, TierName.SSD) == {keys[0]: 0}


async def test_what_is_not_there_is_counted(opened: OpenStore, client: Client) -> None:
    keys = await saved(opened, client, 2)
    absent = list(some_chain(3, seed=5).keys)
    outcome = await opened.store.pins.pin(CALLER, [*keys, *absent, keys[0]], HOUR_MS)
    assert (outcome.pinned, outcome.missing) == (2, 3)
    assert await opened.store.pins.unpin(CALLER, [keys[0], *absent]) == (1, 0, 3)
    assert await opened.store.pins.unpin(CALLER, keys) == (1, 1, 0)


# Limits


async def test_pins_take_a_share_of_ssd_at_most_all_or_none_of_a_request(open_store: Callable[..., Any]) -> None:
    limits = StoreLimits(pin_fraction_max=0.5)
    opened: OpenStore = await open_store(ssd_bytes=8 * BLOCK + HEADER, limits=limits)
    client = opened.store.leases.attach(CALLER, "test")
    keys = await saved(opened, client, 6)
    with pytest.raises(PinsFull, match="ssd"):
        await opened.store.pins.pin(CALLER, keys[:5], HOUR_MS)
    assert set(records_pinned(opened, TierName.SSD).values()) == {0}

    outcome = await opened.store.pins.pin(CALLER, keys[:4], HOUR_MS)
    assert (outcome.pinned_bytes, outcome.pinned_bytes_max) == (4 * BLOCK, 4 * BLOCK)
    assert (await opened.store.pins.pin(CALLER, keys[:4], HOUR_MS)).pinned_bytes == 4 * BLOCK, "none counts twice"
    with pytest.raises(PinsFull):
        await opened.store.pins.pin(CALLER, keys[4:5], HOUR_MS)
    opened.files.clock.advance(seconds=3600)
    assert (await opened.store.pins.pin(CALLER, keys[4:5], HOUR_MS)).pinned_bytes == BLOCK


async def test_pins_take_a_share_of_dram_at_most_where_there_is_no_ssd(open_store: Callable[..., Any]) -> None:
    limits = StoreLimits(pin_fraction_max=0.5)
    opened: OpenStore = await open_store(dram_bytes=8 * BLOCK + HEADER, ssd_bytes=0, limits=limits)
    keys = await saved(opened, opened.store.leases.attach(CALLER, "test"), 6, on_ssd=False)
    with pytest.raises(PinsFull, match="dram"):
        await opened.store.pins.pin(CALLER, keys[:5], HOUR_MS)
    assert (await opened.store.pins.pin(CALLER, keys[:4], HOUR_MS)).pinned == 4


@pytest.mark.parametrize("in_thread", [False, True])
async def test_two_pins_at_one_time_do_not_both_take_the_last_space(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, in_thread: bool
) -> None:
    monkeypatch.setattr(pins, "_ROWS_BEFORE_A_THREAD", 0 if in_thread else 1000)
    opened: OpenStore = await open_store(ssd_bytes=8 * BLOCK + HEADER, limits=StoreLimits(pin_fraction_max=0.5))
    keys = await saved(opened, opened.store.leases.attach(CALLER, "test"), 6)
    both = [opened.store.pins.pin(CALLER, part, HOUR_MS) for part in (keys[:3], keys[3:])]
    outcomes = await asyncio.gather(*both, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [PinOutcome, PinsFull]
    assert np.count_nonzero(opened.blocks.pinned(opened.files.clock.wall_ms())) == 3


async def test_a_block_that_goes_while_the_bound_is_computed_is_missing(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "_ROWS_BEFORE_A_THREAD", 0)
    keys = await saved(opened, client, 2)
    pinning = asyncio.create_task(opened.store.pins.pin(CALLER, keys, HOUR_MS))
    await asyncio.sleep(0)
    assert not pinning.done()
    await opened.store.operators.discard(CALLER, keys[1:])
    outcome = await pinning
    assert (outcome.pinned, outcome.missing) == (1, 1)


# Concurrent changes


@pytest.mark.parametrize("first_pinned", [False, True])
async def test_a_pin_that_changes_while_a_copy_is_recorded_is_in_that_record_too(
    opened: OpenStore, client: Client, first_pinned: bool
) -> None:
    keys = await saved(opened, client, 1)
    if first_pinned:
        await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    await opened.store.moves.evict(CALLER, keys, TierName.DRAM)
    with opened.commits_held(TierName.DRAM):
        promoting = asyncio.create_task(opened.store.moves.prefetch(CALLER, keys, within_s=0, wait=True))
        await until(lambda: bool(opened.block_lifecycle._placing))  # The commit of the record, with the old pin, runs.
        change: Any = (
            opened.store.pins.unpin(CALLER, keys) if first_pinned else opened.store.pins.pin(CALLER, keys, HOUR_MS)
        )
        changing: asyncio.Task[Any] = asyncio.create_task(change)
        await until(lambda: bool(opened.blocks.pinned(0).any()) != first_pinned)
        assert not changing.done(), "the pending record has the old pin: a daemon that died now would restart with it"
    await changing
    expected = 0 if first_pinned else opened.files.clock.wall_ms() + HOUR_MS
    for tier in (TierName.DRAM, TierName.SSD):
        assert records_pinned(opened, tier) == {keys[0]: expected}
    await promoting


async def test_a_block_discarded_while_it_is_pinned_leaves_no_record(opened: OpenStore, client: Client) -> None:
    keys = await saved(opened, client, 1)
    with opened.commits_held(TierName.SSD):
        pinning = asyncio.create_task(opened.store.pins.pin(CALLER, keys, HOUR_MS))
        await asyncio.sleep(0)
        discarding = asyncio.create_task(opened.store.operators.discard(CALLER, keys))
        await until(lambda: opened.blocks.live_count == 0)
    await asyncio.gather(pinning, discarding)
    await opened.settle()
    assert opened.records(TierName.SSD) == opened.records(TierName.DRAM) == {}


async def test_a_block_discarded_while_its_pin_waits_for_a_copys_record_leaves_none(
    opened: OpenStore, client: Client
) -> None:
    keys = await saved(opened, client, 1)
    await opened.store.moves.evict(CALLER, keys, TierName.DRAM)
    with opened.commits_held(TierName.DRAM):
        promoting = asyncio.create_task(opened.store.moves.prefetch(CALLER, keys, within_s=0, wait=True))
        await until(lambda: bool(opened.block_lifecycle._placing))
        pinning = asyncio.create_task(opened.store.pins.pin(CALLER, keys, HOUR_MS))
        await until(lambda: bool(opened.blocks.pinned(0).any()))
        discarding = asyncio.create_task(opened.store.operators.discard(CALLER, keys))
        # The removal runs: a record that is written after it would stay for ever.
        await until(lambda: opened.blocks.live_count == 0 and bool(opened.block_lifecycle._leaving))
    await asyncio.gather(promoting, pinning, discarding)
    await opened.settle()
    assert opened.records(TierName.SSD) == opened.records(TierName.DRAM) == {}


async def test_a_pin_that_the_index_refuses_changes_nothing_and_the_next_flush_puts_the_records_right(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = await saved(opened, client, 2)
    before = await opened.store.pins.pin(CALLER, keys[:1], 1000)
    await opened.block_lifecycle.flush_recency()
    put, puts = opened.index.put_again, []

    def failing(tier: TierName, names: list[bytes], records: Records) -> asyncio.Future[None]:
        if tier == TierName.DRAM:
            puts.append(put(tier, names, records))  # One tier has it, the other not.
            return puts[-1]
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(StorageFailed("the disk is gone"))
        return failed

    with monkeypatch.context() as patched:
        patched.setattr(opened.index, "put_again", failing)
        with pytest.raises(StorageFailed):
            await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    await asyncio.gather(*puts)
    rows = opened.blocks.rows_of_keys(keys)
    assert opened.blocks.pinned_until_ms[rows].tolist() == [before.until_ms, 0]
    await opened.block_lifecycle.flush_recency()
    for tier in (TierName.DRAM, TierName.SSD):
        assert records_pinned(opened, tier) == {keys[0]: before.until_ms, keys[1]: 0}


async def test_thousands_of_keys_are_pinned_by_one_request(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(
        dram_bytes=700 * BLOCK, ssd_bytes=800 * BLOCK, map_bytes=4 << 20, limits=LIMITS
    )
    client = opened.store.leases.attach(CALLER, "test")
    keys = [*await saved(opened, client, 250, seed=1), *await saved(opened, client, 100, seed=2)]
    outcome = await opened.store.pins.pin(CALLER, keys, HOUR_MS)
    assert outcome.pinned == 350
    assert set(records_pinned(opened, TierName.SSD).values()) == {outcome.until_ms}
    assert np.count_nonzero(opened.blocks.pinned(opened.files.clock.wall_ms())) == 350
