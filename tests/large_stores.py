"""Stores of very many small blocks, written in bulk by the daemon's own modules, as after many saves."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvservice.blocks import Extent, TierName, object_key
from kvservice.index.block_index import BlockIndex
from kvservice.index.records import new_records
from kvservice.tiers.ssd import SsdTier
from kvservice_api.image import Trailer, block_geometry, checksum
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard

# One token per block and 32 bytes per slice: an image takes one page of 4 KiB.
LAYOUT = Layout(model_id="many", dtype="uint8", layers=2, kv_heads=1, k_head_dim=16, v_head_dim=16, block_tokens=1)
_WHOLE = Shard.whole(LAYOUT)
_GEOMETRY = block_geometry(LAYOUT, _WHOLE, 1)
_CHAIN_BLOCKS = 100
_BLOCKS_AT_A_TIME = 4096
_STORED_AT_MS = 1_700_000_000_000

IMAGE_BYTES = _GEOMETRY.image_bytes


@dataclass(frozen=True)
class LargeStore:
    """The written keys, and the store's folders."""

    folder: Path
    chains: list[BlockChain]
    ssd_bytes: int
    map_bytes: int

    @property
    def settings(self) -> dict[str, object]:
        """The daemon's settings, for ``DaemonProcess``."""
        return {"ssd__capacity_bytes": self.ssd_bytes, "index__durable_map_bytes": self.map_bytes}


def slices_of(key: bytes) -> list[bytes]:
    """The stored bytes of a block, layer by layer."""
    return [key, key[::-1]]


def write_store(folder: Path, block_count: int) -> LargeStore:
    """A store in `folder` of so many blocks, all of them on SSD, in conversations of a hundred."""
    chains = [
        block_chain(LAYOUT, np.arange(min(_CHAIN_BLOCKS, block_count - first)), salt=first.to_bytes(8, "big"))
        for first in range(0, block_count, _CHAIN_BLOCKS)
    ]
    # Keys are not sorted, so pages of the index are two thirds full: 160 bytes of key and record take up to 256.
    map_bytes = (4 << 20) + 512 * block_count
    ssd_bytes = map_bytes + (block_count + 256) * IMAGE_BYTES * 8 // 7  # Above the low watermark.
    asyncio.run(_write(folder, chains, ssd_bytes, map_bytes))
    return LargeStore(folder, chains, ssd_bytes, map_bytes)


async def _write(folder: Path, chains: Sequence[BlockChain], ssd_bytes: int, map_bytes: int) -> None:
    index = BlockIndex.open(folder / "index", map_bytes=map_bytes)
    try:
        ssd = SsdTier.open(
            [folder / "ssd-000.kv"], store_id=index.store_id, capacity_bytes=ssd_bytes - map_bytes, io_threads=1
        )
        try:
            index.remember_ssd_files([folder / "ssd-000.kv"])
            layout_id = await index.put_layout(LAYOUT)
            keys = [key for chain in chains for key in chain]
            parents = [parent for chain in chains for parent in (chain.parent, *chain.keys[:-1])]
            for first in range(0, len(keys), _BLOCKS_AT_A_TIME):
                part = slice(first, first + _BLOCKS_AT_A_TIME)
                await _write_blocks(index, ssd, layout_id, first, keys[part], parents[part])
            ssd.sync()
        finally:
            ssd.close()
    finally:
        index.close()


async def _write_blocks(
    index: BlockIndex, ssd: SsdTier, layout_id: int, first: int, keys: Sequence[bytes], parents: Sequence[bytes]
) -> None:
    extents = [ssd.reserve(IMAGE_BYTES) for _ in keys]
    start = extents[0].offset_bytes
    assert [extent.offset_bytes - start for extent in extents] == list(range(0, IMAGE_BYTES * len(keys), IMAGE_BYTES))
    trailer_checksums = []
    with mmap.mmap(-1, IMAGE_BYTES * len(keys)) as images:
        for number, key in enumerate(keys):
            slices = slices_of(key)
            trailer = Trailer(key, _WHOLE, np.array([checksum(data) for data in slices], np.uint64)).encode()
            trailer_checksums.append(checksum(trailer))
            at = number * IMAGE_BYTES
            images[at : at + 64] = b"".join(slices)
            images[at + _GEOMETRY.trailer_offset : at + IMAGE_BYTES] = trailer
        with memoryview(images) as view:
            await ssd.write(Extent(extents[0].segment, start, len(view)), 0, view)
    records = new_records(len(keys))
    records["layout_id"], records["token_count"], records["size_bytes"] = layout_id, 1, IMAGE_BYTES
    records["offset_bytes"] = [extent.offset_bytes for extent in extents]
    records["trailer_checksum"] = trailer_checksums
    records["stored_at_ms"] = records["used_at_ms"] = _STORED_AT_MS
    records["access_seq"] = np.arange(first + 1, first + 1 + len(keys))
    records["parent_key"] = np.array(parents, "V32")
    await index.put(TierName.SSD, [object_key(key, _WHOLE) for key in keys], records)
