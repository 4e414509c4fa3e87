"""Write-behind: if the SSD or its index fails, DRAM continues as a tier of its own."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.index.environment import Confirm, all_durable
from kvservice.index.records import Records
from kvservice.store import block_lifecycle
from kvservice.store.miss_reasons import Reason
from kvservice.store.mover import write_behind
from kvservice_api.errors import IndexFull, KVError, StorageFailed
from tests.clock import HandClock, passes
from tests.file_faults import FaultyCalls
from tests.stores import CALLER, LAYOUT, MIB, PATIENT, OpenStore, StoreFiles, some_chain, some_images, until


class RefusingIndex:
    """Wraps a store's index, and refuses records of blocks on SSD while `error` is set."""

    def __init__(self, opened: OpenStore) -> None:
        self._put = opened.index.put
        self.error: Exception | None = None
        self.refused = 0

    def put(
        self, tier: TierName, keys: Sequence[bytes], records: Records, confirm: Confirm = all_durable
    ) -> asyncio.Future[None]:
        if tier == TierName.SSD and self.error is not None:
            self.refused += 1
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(self.error)
            return failed
        return self._put(tier, keys, records, confirm)


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[OpenStore]:
    files = StoreFiles(tmp_path / "store", dram_bytes=256 * 1024, limits=PATIENT)
    files.folder.mkdir()
    opened = files.open()
    await opened.store.layouts.open(CALLER, LAYOUT)
    yield opened
    await opened.close()
    files.remove()


@pytest.fixture
def index(opened: OpenStore, monkeypatch: pytest.MonkeyPatch) -> RefusingIndex:
    refusing = RefusingIndex(opened)
    monkeypatch.setattr(opened.index, "put", refusing.put)
    monkeypatch.setattr(write_behind, "_PAUSE_AFTER_FAILURE_S", 0.01)
    return refusing


@pytest.mark.parametrize("error", [IndexFull("the map is full"), StorageFailed("the disk is gone")])
async def test_an_index_that_refuses_costs_ssd_copies_and_no_save(
    opened: OpenStore, index: RefusingIndex, error: KVError
) -> None:
    client = opened.store.leases.attach(CALLER, "test")
    index.error = error

    for seed in range(6):  # Three times DRAM's capacity.
        chain = some_chain(8, seed=seed)
        outcome = await opened.save(client, chain, some_images(chain, seed=seed))
        assert not outcome.refused
        assert opened.hits(chain.keys) == 8, "the newest conversation is there"
        await until(lambda: not opened.write_behind or not opened.write_behind.is_progressing())

    assert index.refused
    assert opened.counters.lost_unwritten_blocks
    assert opened.residency(chain.keys[0]) == {TierName.DRAM}


async def test_once_the_index_takes_records_again_blocks_reach_the_ssd(opened: OpenStore, index: RefusingIndex) -> None:
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(4)
    index.error = StorageFailed("the disk is gone")
    await opened.save(client, chain, some_images(chain))
    await until(lambda: index.refused > 0)
    assert opened.residency(chain.keys[0]) == {TierName.DRAM}

    index.error = None

    await until(lambda: all(opened.residency(key) == {TierName.DRAM, TierName.SSD} for key in chain.keys))
    await opened.settle()


async def test_while_commits_fail_blocks_are_not_all_written_again_and_again(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HandClock()
    opened: OpenStore = await open_store(clock=clock, dram_bytes=256 * 1024, limits=PATIENT)
    index = RefusingIndex(opened)
    monkeypatch.setattr(opened.index, "put", index.put)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(16)
    index.error = StorageFailed("the disk is gone")

    await opened.save(client, chain, some_images(chain))
    await until(lambda: index.refused > 0)
    for _ in range(200):
        await asyncio.sleep(0)

    assert index.refused <= 16, "each block was tried once at most, and then one at a time"

    index.error = None
    await until(lambda: passes(clock) and opened.residency(chain.keys[15]) == {TierName.DRAM, TierName.SSD})


async def test_a_save_to_ssd_ends_and_nothing_stays_held_with_every_error_of_its_record(
    opened: OpenStore, index: RefusingIndex
) -> None:
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(4)
    index.error = RuntimeError("an unexpected error")

    async with asyncio.timeout(60):
        with pytest.raises(RuntimeError, match="unexpected"):
            await opened.save(client, chain, some_images(chain), on_ssd=True)

    await until(lambda: not opened.blocks.holds.any() and not opened.unsettled())
    assert opened.hits(chain.keys) == 4, "they are in DRAM"
    index.error = None
    client_of_next, other = opened.store.leases.attach(CALLER, "next"), some_chain(1, seed=7)
    assert not (await opened.save(client_of_next, other, some_images(other, seed=7), on_ssd=True)).refused


async def test_a_save_to_ssd_ends_where_the_index_was_damaged_under_the_daemon(
    opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_lifecycle, "_SETTLED_WITHIN_S", 0.1)  # The second save waits for the first for this time.
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    environment = opened.index._environments[TierName.SSD]
    assert environment._env is not None
    environment._env.close()  # An example of an error from which LMDB does not recover.
    with (opened.files.folder / "index" / "data.mdb").open("r+b") as file:
        file.write(b"\xff" * 65536)

    for _ in range(2):
        async with asyncio.timeout(60):
            outcome = await opened.save(client, chain, some_images(chain), on_ssd=True)
        assert {type(error) for error in outcome.refused.values()} == {StorageFailed}
    assert opened.hits(chain.keys) == 2, "DRAM continues"
    await until(lambda: not opened.blocks.holds.any())


async def test_bytes_written_before_a_failed_flush_are_written_again_though_the_next_flush_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports an error of its write-back once, to one flush; the lost bytes may belong to another save."""
    monkeypatch.setattr(write_behind, "_PAUSE_AFTER_FAILURE_S", 0.01)
    calls = FaultyCalls()
    files = StoreFiles(tmp_path / "store", calls=calls)
    files.folder.mkdir()
    opened = files.open()

    def writes() -> int:
        return calls.names().count("pwritev")

    try:
        await opened.store.layouts.open(CALLER, LAYOUT)
        client = opened.store.leases.attach(CALLER, "test")
        first, second = some_chain(1, seed=1), some_chain(1, seed=2)
        before = writes()
        with calls.held("fdatasync") as flushing:
            await opened.save(client, first, some_images(first, seed=1))
            await asyncio.to_thread(flushing.acquire)
            of_one = writes() - before
            await opened.save(client, second, some_images(second, seed=2))
            commits_waiting = opened.index._environments[TierName.SSD]._queue
            await until(lambda: writes() == before + 2 * of_one and not commits_waiting.empty())
            calls.failing_once["fdatasync"] = errno.EIO  # The one that is held.

        keys = [first.keys[0], second.keys[0]]
        await until(lambda: all(opened.residency(key) == {TierName.DRAM, TierName.SSD} for key in keys))
        assert writes() == before + 4 * of_one
        await opened.settle()
    finally:
        await opened.close()
        files.remove()


async def test_where_the_index_of_the_ssd_is_full_old_blocks_leave_it_and_new_ones_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "_TRY_AGAIN_TRIM_S", 0.01)
    files = StoreFiles(tmp_path / "store", ssd_bytes=64 * MIB, dram_bytes=4 * MIB, map_bytes=MIB // 4)
    files.folder.mkdir()
    opened = files.open()

    async def on_ssd(key: bytes) -> None:
        await until(lambda: TierName.SSD in opened.residency(key))

    try:
        await opened.store.layouts.open(CALLER, LAYOUT)
        client = opened.store.leases.attach(CALLER, "test")
        for seed in range(8):  # The map has space for some hundred records, SSD for five thousand blocks.
            chain = some_chain(200, seed=seed)
            outcome = await opened.save(client, chain, some_images(chain, seed=seed))
            assert not outcome.refused
            await on_ssd(chain.keys[-1])
        assert opened.counters.evicted_ssd_blocks
        keys = [key for seed in range(8) for key in some_chain(200, seed=seed).keys]
        events = [event for key in keys for event in opened.explain.events(CALLER, key)]
        assert {(event.reason, event.detail) for event in events} == {(Reason.EVICTED, "lru")}, (
            "not at a client's request"
        )
        assert opened.ssd is not None and opened.ssd.used_bytes < opened.ssd.capacity_bytes // 2
        await opened.settle()
    finally:
        await opened.close()
        files.remove()
