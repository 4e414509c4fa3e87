"""A residency directory over a block table of its own, without the rest of a store."""

from __future__ import annotations

from pathlib import Path

from kvservice.blocks import BlockTable, Extent, TierName
from kvservice.store.directory import ResidencyDirectory
from kvservice.tiers.files import FileCalls
from kvservice_api.layout import Layout, Shard

LAYOUTS = {
    number: Layout(f"layout {number}", "uint8", layers=4, kv_heads=4, k_head_dim=8, v_head_dim=8) for number in (1, 2)
}
SHARDS = (Shard(0, 4, 0, 4), Shard(0, 4, 0, 2), Shard(0, 4, 2, 4), Shard(1, 3, 0, 4))
STORE_ID, ARENA_ID = bytes(range(16)), bytes(16)


class DirectoryFixture:
    """`put` and `drop` objects as the store does; the table notifies the directory."""

    def __init__(
        self,
        folder: Path,
        *,
        epoch: int = 7,
        slots_min: int = 8,
        bytes_max: int = 1 << 24,
        blocks: BlockTable | None = None,
        calls: FileCalls | None = None,
    ) -> None:
        self.folder = folder
        self.epoch = epoch
        self.blocks = blocks or BlockTable(4)
        self.directory = ResidencyDirectory(
            self.blocks,
            LAYOUTS,
            folder,
            store_id=STORE_ID,
            arena_id=ARENA_ID,
            boot_epoch=epoch,
            bytes_max=bytes_max,
            slots_min=slots_min,
            calls=calls,
        )

    def put(
        self,
        key: bytes,
        shard: Shard = SHARDS[0],
        layout_id: int = 1,
        tier: TierName = TierName.DRAM,
        *,
        parent: bytes = b"",
    ) -> int:
        """Store an object, or give it a copy in another tier. With a `parent` it is a partial block."""
        row = self.blocks.row_of(key, shard)
        if row >= 0:
            self.blocks.set_extent(row, tier, Extent(0, 4096 * row, 4096))
            return row
        row = self.blocks.add(
            key,
            shard,
            parent_key=parent or bytes(32),
            layout_id=layout_id,
            tenant=0,
            token_count=LAYOUTS[layout_id].block_tokens - bool(parent),
            size_bytes=4096,
            trailer_checksum=0,
            now_ms=0,
        )
        self.blocks.set_extent(row, tier, Extent(0, 4096 * row, 4096))
        self.blocks.link(row)
        return row

    def drop(self, key: bytes, shard: Shard = SHARDS[0]) -> None:
        """Delete an object."""
        row = self.blocks.row_of(key, shard)
        self.blocks.unlink(row)
        for tier in (TierName.DRAM, TierName.SSD):
            self.blocks.set_extent(row, tier, None)
        self.blocks.free(row)

    @property
    def fill(self) -> float:
        table = self.directory._current
        return table.fill if table is not None else 0.0
