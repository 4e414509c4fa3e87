"""The block table as the records tell it at start.

Free space is not recorded anywhere: it is what no record names, so the two cannot disagree.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import OBJECT_KEY_BYTES, BlockTable, ObjectKeys, Rows, TierName
from kvservice.index.block_index import BlockIndex
from kvservice.index.errors import StoreDamaged
from kvservice.index.layouts import LAYOUTS_NAME
from kvservice.index.records import RECORD, Records
from kvservice.index.recovery import UNKNOWN_LAYOUT
from kvservice.store.miss_reasons import MissReasons
from kvservice.tiers.base import Tier
from kvservice_api.errors import InvalidRequest
from kvservice_api.image import block_geometry
from kvservice_api.layout import Layout, Shard

log = logging.getLogger(__name__)

_LIKELY_BLOCK_BYTES = 64 << 10
_LIKELY_ROWS_MIN, _LIKELY_ROWS_MAX = 1 << 12, 1 << 23
_ROOM_FOR_MORE = 1.25  # Times the rows there are.
_ROWS_MAX = 1 << 26  # A table of so many takes 20 GB of addresses, and memory for the rows in use.

_EXTENT = ("segment", "offset_bytes", "size_bytes")
_MERGED = ("access_seq", "used_at_ms", "hits", "pinned_until_ms")  # Of two records of one object the greater counts.
_COPIED = ("layout_id", "tenant", "token_count", "trailer_checksum", "parent_key", "stored_at_ms", *_MERGED)


def recover(index: BlockIndex, tiers: Mapping[TierName, Tier], history: MissReasons | None = None) -> BlockTable:
    """Fill a new table, and tell each tier which of its space is taken.

    `tiers` are in the order of speed, the fastest first.

    Records that contradict their tier, their layout or each other are dropped: their blocks are misses,
    and `history` notes them, as it notes those that an emptied DRAM tier had.
    Raises StorageFailed where those cannot be removed from the index; StoreDamaged, and removes none of their
    records, where blocks may be of a layout whose entry is damaged.
    """
    if history is not None:
        history.note_lost(next(iter(tiers)), index.emptied_keys)
    rows_likely = sum(tier.capacity_bytes for tier in tiers.values()) // _LIKELY_BLOCK_BYTES
    rows_likely = min(max(rows_likely, _LIKELY_ROWS_MIN), _LIKELY_ROWS_MAX)
    blocks: BlockTable | None = None
    for name, tier in reversed(list(tiers.items())):  # The slowest first: most blocks lie there.
        found = index.load(name)
        if blocks is None:
            rows_likely = max(rows_likely, int(len(found.records) * _ROOM_FOR_MORE))
            blocks = BlockTable(max(rows_likely, _rows_max(index)), rows_likely=rows_likely, tiers=tuple(tiers))
        keys, records, dropped = found.object_keys, found.records, list(found.damaged)
        why = Counter(found.damaged.values())
        if index.layout_entries.damaged and why[UNKNOWN_LAYOUT]:
            raise StoreDamaged(_with_lost_layouts(index, name, why[UNKNOWN_LAYOUT]))
        sizes = _image_sizes(keys, records, index.layouts)
        rows = blocks.rows_of_objects(keys)
        sound = np.ones(len(keys), np.bool_)
        for reason, holds in (
            ("its extent lies outside the tier", tier.holds(*(records[field] for field in _EXTENT))),
            ("it does not fit its layout", (sizes > 0) & (sizes <= records["size_bytes"])),
            # The same object in another tier must be the same bytes.
            ("its copy in the other tier has other bytes", _agrees(blocks, rows, records)),
        ):
            why[reason] += int(np.count_nonzero(sound & ~holds))
            sound &= holds
        if not sound.all():
            dropped += [key.tobytes() for key in keys[~sound]]
        if dropped:
            log.error(
                "%d records of the tier %s are damaged or contradict the store, and are removed (%s): their blocks are "
                "misses until a client saves them again. If this is seen again, look for a failing drive or memory",
                len(dropped),
                name,
                ", ".join(f"{count}: {reason}" for reason, count in sorted(why.items()) if count),
            )
            if history is not None:
                history.note_lost(name, dropped)
            index.delete_now(name, dropped)  # Before any later record, which may name the same space.
            keys, records, rows, sizes = keys[sound], records[sound], rows[sound], sizes[sound]
        tier.adopt(records["segment"], records["offset_bytes"], records["size_bytes"])
        _add_new(blocks, keys, records, rows, sizes)
        blocks.set_extents(rows, name, *(records[field] for field in _EXTENT))
    assert blocks is not None, "a store has a tier"
    return blocks


def _agrees(blocks: BlockTable, rows: Rows, records: Records) -> NDArray[np.bool_]:
    agrees: NDArray[np.bool_] = (rows < 0) | (blocks.trailer_checksum[rows] == records["trailer_checksum"])
    return agrees


def _with_lost_layouts(index: BlockIndex, tier: TierName, count: int) -> str:
    names = ", ".join(key.hex() for key in index.layout_entries.damaged)
    folder = index.directory.parent / LAYOUTS_NAME
    return (
        f"the index {index.directory} is damaged: its entries of the layouts {names} are damaged, {folder} has no "
        f"sound copy of them, and {count} blocks of the tier {tier} are of layouts that are not known. Nothing was "
        f"removed. Bring {folder} back from a copy; `kvservice check --repair` deletes the records of these blocks"
    )


def _rows_max(index: BlockIndex) -> int:
    """As many objects as the indexes can name: LMDB takes more than the bare bytes of a key and its record."""
    records_max = sum(index.map_sizes.values()) // (OBJECT_KEY_BYTES + RECORD.itemsize)
    return min(records_max, _ROWS_MAX)


def _add_new(blocks: BlockTable, keys: ObjectKeys, records: Records, rows: Rows, sizes: NDArray[np.uint64]) -> None:
    """Add the objects that are not in the table yet, and note their `rows` in place."""
    old = rows >= 0
    if not old.any():  # As in the first tier: nothing needs to be picked out.
        rows[:] = blocks.add_many(keys, {name: records[name] for name in _COPIED} | {"size_bytes": sizes})
        return
    for name in _MERGED:
        column = getattr(blocks, name)
        column[rows[old]] = np.maximum(column[rows[old]], records[name][old].astype(column.dtype))
    new = np.flatnonzero(~old)
    columns = {name: records[name][new] for name in _COPIED}
    rows[new] = blocks.add_many(keys[new], {**columns, "size_bytes": sizes[new]})
    blocks.next_access_seq = max(blocks.next_access_seq, int(records["access_seq"].max(initial=0)) + 1)


def _image_sizes(keys: ObjectKeys, records: Records, layouts: Mapping[int, Layout]) -> NDArray[np.uint64]:
    """The image size that layout, shard and token count give; 0 where they contradict each other."""
    # Found among plain numbers, one after the other: of structures, a million take a second to sort.
    shards, which_shard = np.unique(np.ascontiguousarray(keys["shard"]).view(">u8"), return_inverse=True)
    lengths = records["layout_id"].astype(np.uint64) << np.uint64(32) | records["token_count"]
    lengths, which_length = np.unique(lengths, return_inverse=True)
    kinds, which = np.unique(which_length * len(shards) + which_shard, return_inverse=True)
    sizes = np.zeros(len(kinds), np.uint64)
    for at, kind in enumerate(kinds.tolist()):
        length, shard = int(lengths[kind // len(shards)]), int(shards[kind % len(shards)])
        layout = layouts[length >> 32]
        try:
            part = Shard.decode(shard.to_bytes(8, "big")).check(layout)
            sizes[at] = block_geometry(layout, part, length & 0xFFFF_FFFF).image_bytes
        except InvalidRequest:
            continue
    return sizes[which]
