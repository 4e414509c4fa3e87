"""Write-behind: where the SSD or its index refuses, DRAM goes on as a tier of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from kvservice.blocks import TierName
from kvservice.index.records import Records
from kvservice.store import write_behind
from kvservice_api.errors import IndexFull, KVError, StorageFailed
from tests.stores import LAYOUT, OpenStore, StoreFiles, some_chain, some_images, until


class RefusingIndex:
    """Stands before a store's index and refuses records of blocks on SSD while `error` is set."""

    def __init__(self, opened: OpenStore) -> None:
        self._put = opened.index.put
        self.error: KVError | None = None
        self.refused = 0

    def put(self, tier: TierName, keys: Sequence[bytes], records: Records) -> asyncio.Future[None]:
        if tier is TierName.SSD and self.error is not None:
            self.refused += 1
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(self.error)
            return failed
        return self._put(tier, keys, records)


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[OpenStore]:
    files = StoreFiles(tmp_path / "store", dram_bytes=256 * 1024)
    files.folder.mkdir()
    opened = files.open()
    await opened.store.open_layout(LAYOUT)
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
    client = opened.store.leases.attach("test")
    index.error = error

    for seed in range(6):  # Three times what DRAM holds.
        chain = some_chain(8, seed=seed)
        outcome = await opened.save(client, chain, some_images(chain, seed=seed))
        assert not outcome.refused
        assert opened.hits(chain.keys) == 8, "the newest conversation is there"
        await until(lambda: not opened.store.write_behind or not opened.store.write_behind.can_progress())

    assert index.refused
    assert opened.store.counters.lost_unwritten_blocks
    assert opened.residency(chain.keys[0]) == {TierName.DRAM}


async def test_once_the_index_takes_records_again_blocks_reach_the_ssd(opened: OpenStore, index: RefusingIndex) -> None:
    client, chain = opened.store.leases.attach("test"), some_chain(4)
    index.error = StorageFailed("the disk is gone")
    await opened.save(client, chain, some_images(chain))
    await until(lambda: index.refused > 0)
    assert opened.residency(chain.keys[0]) == {TierName.DRAM}

    index.error = None

    await until(lambda: all(opened.residency(key) == {TierName.DRAM, TierName.SSD} for key in chain.keys))
    await opened.settle()


async def test_while_commits_fail_blocks_are_not_all_written_again_and_again(
    opened: OpenStore, index: RefusingIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "_PAUSE_AFTER_FAILURE_S", 3600.0)
    client, chain = opened.store.leases.attach("test"), some_chain(16)
    index.error = StorageFailed("the disk is gone")

    await opened.save(client, chain, some_images(chain))
    await until(lambda: index.refused > 0)
    for _ in range(200):
        await asyncio.sleep(0)

    assert index.refused <= 16, "each block was tried once at most, and then one at a time"
