"""Loads that end early: nothing of them goes on once they have let go of their blocks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.policy import LruPolicy
from kvservice.store import pieces
from kvservice.store.leases import Client, Lease
from kvservice.tiers.files import FileCalls
from kvservice_api.errors import ChecksumMismatch
from kvservice_api.keys import BlockChain
from tests.stores import KIB, OpenStore, some_chain, some_images, until

HEADER = 4 * KIB


class ReadPastDram(LruPolicy):
    """Brings nothing up: loads read from SSD."""

    def wants_in_dram(self, *_: object) -> bool:
        return False


class HeldRead(FileCalls):
    """Reads at one place wait for the gate; those at another bring a flipped bit."""

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
    store: OpenStore = await open_store(calls=calls, policy=ReadPastDram())
    return store


async def on_ssd(opened: OpenStore, client: Client) -> tuple[BlockChain, Lease]:
    """Two blocks that lie only there, leased."""
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    await opened.settle()
    await opened.store.evict(chain.keys, TierName.DRAM)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    return chain, lease


def trailer_at(opened: OpenStore, row: int) -> int:
    """Where in the file the row's trailer is read."""
    extent = opened.store.blocks.extent(row, TierName.SSD)
    assert extent is not None
    return HEADER + extent.offset_bytes + pieces.trailer_start(opened.store.residency.geometry(row))


async def test_a_load_that_fails_holds_its_blocks_until_the_last_of_its_reads_has_ended(
    opened: OpenStore, client: Client, calls: HeldRead
) -> None:
    """Else a late read is held against whatever block has the row by then."""
    chain, lease = await on_ssd(opened, client)
    damaged, slow = lease.rows.tolist()
    calls.held_at, calls.damaged_at = trailer_at(opened, slow), trailer_at(opened, damaged)
    loading = asyncio.create_task(opened.load(lease))
    await until(lambda: opened.store.counters.quarantined_blocks == 1)

    opened.store.leases.release(client.client_id, lease.lease_id)
    await opened.store.discard(chain.keys[1:])
    other = some_chain(2, seed=9)
    assert not (await opened.save(client, other, some_images(other, seed=9))).refused
    assert slow not in [opened.store.blocks.row_of(key, lease.shard) for key in other.keys]
    assert not loading.done()

    calls.gate.set()
    with pytest.raises(ChecksumMismatch):
        await loading
    await opened.settle()
    assert opened.hits(other.keys) == 2 and opened.store.counters.quarantined_blocks == 1
    assert not opened.store.blocks.holds.any()


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
        for _ in range(20):
            await asyncio.sleep(0)
        assert opened.store.blocks.holds[[first, slow]].tolist() == [1, 1]
    calls.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await until(lambda: not opened.store.blocks.holds.any())


async def test_a_load_that_is_left_between_layers_holds_its_blocks_until_the_next_layers_reads_have_ended(
    opened: OpenStore, client: Client, calls: HeldRead
) -> None:
    _, lease = await on_ssd(opened, client)
    extent = opened.store.blocks.extent(int(lease.rows[1]), TierName.SSD)
    assert extent is not None
    calls.held_at = HEADER + extent.offset_bytes + 4 * KIB  # Its second layer.
    frames = opened.frames(lease, range(2), range(2))
    await anext(frames)
    await asyncio.to_thread(calls.reached.wait)
    leaving = asyncio.ensure_future(frames.aclose())
    for _ in range(20):
        await asyncio.sleep(0)
    assert opened.store.blocks.holds[lease.rows].tolist() == [1, 1] and not leaving.done()
    calls.gate.set()
    await leaving
    assert not opened.store.blocks.holds.any()


async def test_a_row_that_has_another_block_by_now_is_not_taken_out_of_service(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain))
    row = int(opened.store.blocks.rows_of_keys(chain.keys)[0])
    before = int(opened.store.blocks.generation[row]) - 1
    await opened.store.residency.quarantine(row, before, TierName.DRAM, "the trailer")
    assert opened.hits(chain.keys) == 1 and opened.store.counters.quarantined_blocks == 0
