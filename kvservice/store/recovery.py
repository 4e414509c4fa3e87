"""The block table as the records tell it at start.

Free space is not recorded anywhere: it is what no record names, so the two cannot disagree.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows, TierName
from kvservice.index.block_index import BlockIndex
from kvservice.index.records import Records
from kvservice.store.history import History
from kvservice.tiers.base import Tier
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Layout, Shard, block_geometry

log = logging.getLogger(__name__)

_LIKELY_BLOCK_BYTES = 64 << 10  # Should blocks be smaller, the table grows while the daemon serves.
_ROWS_MIN, _ROWS_MAX = 1 << 12, 1 << 23

_MERGED = ("access_seq", "used_at_ms", "hits", "pinned_until_ms")  # Of two records of one object the greater counts.
_COPIED = ("layout_id", "token_count", "trailer_checksum", "parent_key", "stored_at_ms", *_MERGED)


def recover(index: BlockIndex, tiers: Mapping[TierName, Tier], history: History | None = None) -> BlockTable:
    """Fill a new table, and tell each tier which of its space is taken.

    Records that contradict their tier, their layout or each other are dropped: their blocks are misses,
    and `history` is told of them, as of those that an emptied DRAM tier had.
    """
    if history is not None:
        history.note_lost(TierName.DRAM, index.emptied_keys)
    rows_likely = sum(tier.capacity_bytes for tier in tiers.values()) // _LIKELY_BLOCK_BYTES
    blocks = BlockTable(min(max(rows_likely, _ROWS_MIN), _ROWS_MAX))
    known: dict[bytes, int] = {}  # Object key -> row.
    for name, tier in tiers.items():
        found = index.load(name)
        keys, records, dropped = found.keys, found.records, list(found.damaged)
        sizes = _image_sizes(keys, records, index.layouts)
        sound = tier.holds(records["segment"], records["offset_bytes"], records["size_bytes"])
        sound &= (sizes > 0) & (sizes <= records["size_bytes"])
        rows = np.fromiter((known.get(key, -1) for key in keys), np.int64, len(keys))
        # The same object in another tier must be the same bytes.
        sound &= (rows < 0) | (blocks.trailer_checksum[rows] == records["trailer_checksum"])
        if not sound.all():
            dropped += [keys[at] for at in np.flatnonzero(~sound).tolist()]
        if dropped:
            log.error("records that cannot be trusted are dropped", extra={"tier": name, "count": len(dropped)})
            if history is not None:
                history.note_lost(name, dropped)
            index.delete(name, dropped)  # Committed before any later record, which may name the same space.
        records, rows, sizes = records[sound], rows[sound], sizes[sound]
        keys = [keys[at] for at in np.flatnonzero(sound).tolist()]
        tier.adopt(records["segment"], records["offset_bytes"], records["size_bytes"])
        _add_new(blocks, known, keys, records, rows, sizes)
        _set_extents(blocks, name, rows, records)
    return blocks


def _add_new(
    blocks: BlockTable,
    known: dict[bytes, int],
    keys: list[bytes],
    records: Records,
    rows: Rows,
    sizes: NDArray[np.uint64],
) -> None:
    """Add the objects that are not in the table yet, and note their `rows` in place."""
    old = rows >= 0
    for name in _MERGED:
        column = getattr(blocks, name)
        column[rows[old]] = np.maximum(column[rows[old]], records[name][old].astype(column.dtype))
    new = np.flatnonzero(~old)
    names = [keys[at] for at in new.tolist()]
    columns = {name: records[name][new] for name in _COPIED}
    rows[new] = blocks.add_many(names, {**columns, "size_bytes": sizes[new]})
    known.update(zip(names, rows[new].tolist(), strict=True))
    blocks.next_access_seq = max(blocks.next_access_seq, int(records["access_seq"].max(initial=0)) + 1)


def _set_extents(blocks: BlockTable, tier: TierName, rows: Rows, records: Records) -> None:
    if tier is TierName.DRAM:
        blocks.dram_offset[rows], blocks.dram_size[rows] = records["offset_bytes"], records["size_bytes"]
    else:
        blocks.ssd_segment[rows] = records["segment"]
        blocks.ssd_offset[rows], blocks.ssd_size[rows] = records["offset_bytes"], records["size_bytes"]


def _image_sizes(keys: list[bytes], records: Records, layouts: Mapping[int, Layout]) -> NDArray[np.uint64]:
    """The image size that layout, shard and token count give; 0 where they contradict each other."""
    shards = np.frombuffer(b"".join(key[KEY_BYTES:] for key in keys), ">u8").astype(np.uint64)
    kinds = np.empty(len(keys), np.dtype([("layout", "u4"), ("tokens", "u4"), ("shard", "u8")]))
    kinds["layout"], kinds["tokens"], kinds["shard"] = records["layout_id"], records["token_count"], shards
    unique, which = np.unique(kinds, return_inverse=True)
    sizes = np.zeros(len(unique), np.uint64)
    for at, (layout_id, tokens, shard) in enumerate(unique.tolist()):
        layout = layouts[layout_id]
        try:
            part = Shard.decode(int(shard).to_bytes(8, "big")).check(layout)
            sizes[at] = block_geometry(layout, part, tokens).image_bytes
        except InvalidRequest:
            continue
    return sizes[which]
