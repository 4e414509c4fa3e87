"""Which blocks a smaller DRAM tier keeps, and that each has its bytes there."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvservice.blocks import TierName
from kvservice.index.block_index import BlockIndex
from kvservice.store.smaller_arena import SmallerArena
from kvservice.tiers.arena import Arena
from kvservice_api.image import PAGE_BYTES
from tests.file_faults import FaultyCalls
from tests.unit.index_samples import LAYOUT, some_keys, some_records

MIB = 2**20
NOW_MS = 1000
BLOCKS, BLOCK = 8, 16 * PAGE_BYTES
KEYS = some_keys(BLOCKS)
PINNED, LAST_USED = 1, 5
ON_SSD = (2, 3, 5, 6, 7)


@dataclass(frozen=True)
class Filled:
    """A store whose blocks were used in the order of their numbers, except `LAST_USED`."""

    index: BlockIndex
    parent: Path
    contents: Sequence[bytes]

    def open_arena(self, blocks: int, calls: FaultyCalls | None = None) -> Arena:
        return Arena.open(self.parent, self.index.store_id, PAGE_BYTES + blocks * BLOCK, calls=calls)

    async def shrink(self, blocks: int, *, room_bytes: int = 2**40, fails: int = 0) -> list[int]:
        """Make the tier smaller. Returns the blocks that it has then."""
        calls = FaultyCalls()
        arena = self.open_arena(blocks, calls)
        if fails:
            calls.failing["posix_fallocate"] = fails
        assert arena.is_too_large
        folder = arena.directory / "index"
        tiers = [TierName.DRAM, TierName.SSD]
        smaller = await SmallerArena(self.index, folder, tiers, MIB, room_bytes, NOW_MS).replace(arena)
        try:
            assert not self.index.open_volatile(folder, smaller.arena_id, map_bytes=MIB)
            assert not list(smaller.directory.glob("*.new"))
            found = self.index.load(TierName.DRAM)
            for key, record in zip(found.keys, found.records, strict=True):
                start = int(record["offset_bytes"])
                assert smaller.data[start : start + BLOCK] == self.contents[KEYS.index(key)]
                assert start + BLOCK <= smaller.ready_bytes
            return sorted(map(KEYS.index, found.keys))
        finally:
            smaller.close()

    @property
    def lost(self) -> list[int]:
        return sorted(map(KEYS.index, self.index.emptied_keys))


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvservice-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
async def store(tmp_path: Path, shm: Path) -> AsyncIterator[Filled]:
    index = BlockIndex.open(tmp_path / "index", map_bytes=MIB)
    layout_id = await index.put_layout(LAYOUT)
    filled = Filled(index, shm, [bytes([number + 1]) * BLOCK for number in range(BLOCKS)])
    arena = filled.open_arena(BLOCKS)
    arena.allocate(arena.capacity_bytes)
    for number, content in enumerate(filled.contents):
        arena.data[number * BLOCK : (number + 1) * BLOCK] = content
    index.open_volatile(arena.directory / "index", arena.arena_id, map_bytes=MIB)
    records = some_records(BLOCKS, layout_id=layout_id)
    records["size_bytes"] = BLOCK
    records["offset_bytes"] = [number * BLOCK for number in range(BLOCKS)]
    records["access_seq"] = [99 if number == LAST_USED else number for number in range(BLOCKS)]
    records["pinned_until_ms"][PINNED] = NOW_MS + 1
    await index.put(TierName.DRAM, KEYS, records)
    await index.put(TierName.SSD, [KEYS[number] for number in ON_SSD], records[list(ON_SSD)])
    index.close_volatile()
    arena.close()
    yield filled
    index.close()


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [(1, [PINNED]), (3, [0, PINNED, 4]), (4, [0, PINNED, 4, LAST_USED]), (5, [0, PINNED, 4, LAST_USED, 7])],
)
async def test_pinned_blocks_stay_then_those_without_a_copy_then_those_used_last(
    store: Filled, blocks: int, kept: list[int]
) -> None:
    assert await store.shrink(blocks) == kept
    assert store.lost == [number for number in range(BLOCKS) if number not in (*kept, *ON_SSD)]


async def test_what_fits_into_the_memory_beside_the_old_arena_stays(
    store: Filled, caplog: pytest.LogCaptureFixture
) -> None:
    assert await store.shrink(5, room_bytes=2 * BLOCK) == [PINNED, 4]
    assert "3 blocks leave: there is not enough memory for two arenas" in caplog.text
    assert store.lost == [0]


async def test_a_tier_keeps_its_size_if_there_is_no_memory_for_another_arena(
    store: Filled, caplog: pytest.LogCaptureFixture
) -> None:
    assert await store.shrink(3, fails=errno.ENOSPC) == list(range(BLOCKS))
    assert "the DRAM tier keeps its size: [Errno 28] No space left on device" in caplog.text


async def test_a_tier_whose_layouts_are_damaged_keeps_its_size(store: Filled) -> None:
    store.index.layout_entries.damaged.append(b"of a layout")
    assert await store.shrink(3) == list(range(BLOCKS))
