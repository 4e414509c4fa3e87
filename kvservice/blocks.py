"""The nouns of the store: tiers by name, extents, and the table of all blocks in memory.

A block is never a Python object of its own: it is a row in arrays, found by its key. A million
objects would cost the garbage collector a third of a second.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Shard

OBJECT_KEY_BYTES = KEY_BYTES + 8

Rows = NDArray[np.int64]
NO_ROW = -1
_NOWHERE = -1
_NO_USER, _USERS_UNKNOWN = 2**32 - 1, 0  # Values of the column `used_by`.


class TierName(str):
    """The name of a tier: lower-case letters, digits and hyphens. `DRAM` and `SSD` are the first two of every store."""

    __slots__ = ()
    DRAM: ClassVar[TierName]
    SSD: ClassVar[TierName]


TierName.DRAM = TierName("dram")
TierName.SSD = TierName("ssd")


class Extent(NamedTuple):
    """A place in one tier. `segment` is the number of the file; a tier with one file has segment 0."""

    segment: int
    offset_bytes: int
    size_bytes: int


_NO_EXTENT = Extent(0, _NOWHERE, 0)


def object_key(key: bytes, shard: Shard) -> bytes:
    """The name of one stored object: the block's key and the shard."""
    return key + shard.encode()


OBJECT_KEY = np.dtype([("key", "V32"), ("shard", "V8")])
assert OBJECT_KEY.itemsize == OBJECT_KEY_BYTES

ObjectKeys = NDArray[np.void]


def pack_object_keys(names: Sequence[bytes]) -> ObjectKeys:
    """Object keys as one array, with their two parts as its fields."""
    return np.frombuffer(b"".join(names), OBJECT_KEY)


_COLUMNS: dict[str, str] = {
    "key": "V32",
    "parent_key": "V32",
    "shard": "V8",  # Shard.encode(); the next four are the same in parts.
    "layer_begin": "u2",
    "layer_end": "u2",
    "head_begin": "u2",
    "head_end": "u2",
    "layout_id": "u4",
    "tenant": "u4",  # The tenant that owns the block; 0 is the tenant "default".
    "token_count": "u4",
    "size_bytes": "u8",  # Of the image.
    "trailer_checksum": "u8",
    "stored_at_ms": "u8",
    "used_at_ms": "u8",
    "access_seq": "i8",
    "hits": "u4",
    "used_by": "u4",  # The only client, by number, that stored or looked it up; 0 if others did, or if it is not known.
    "pinned_until_ms": "u8",  # Wall clock, ms; 0 if the block is not pinned.
    "leases": "i4",  # Number of leases that hold the row.
    "holds": "i4",  # Number of running I/O operations that hold the row.
    "next_shard": "i8",  # The next row of the same block key, or NO_ROW.
    "generation": "u4",  # Incremented when the row is freed, so that a stale row number is detected.
    "used_since_flush": "?",
    "verified": "?",  # This daemon verified the checksums of the copy in the first tier.
    "hinted": "?",  # The copy in the first tier was promoted because of a hint.
    "awaited": "?",  # A queued request will read it, as hints say: other blocks are evicted before it.
    "live": "?",  # Linked: lookups find it.
}

# ``[tier, row]``: the copy in each tier, in the order of `BlockTable.tiers`.
_TIER_COLUMNS: dict[str, str] = {
    "segment": "u2",
    "offset": "i8",
    "extent_size": "u8",
    "arrived_ms": "u8",  # When the copy was written to the tier; 0 if before this daemon's start.
    "unwanted": "?",  # Evicted from this tier; not written to it again until it is used.
}

_decode_shard = functools.lru_cache(maxsize=4096)(Shard.decode)


class BlockTable:
    """All stored objects, as rows of arrays. Rows are numbers; a freed one is used again.

    `tiers` are the tiers that a block may be in, from the fastest to the slowest. A tier's position in them is
    its row of the columns ``[tier, row]``.

    Arrays grow by replacement: read them through the table, never keep one across an await.
    """

    key: NDArray[np.void]
    parent_key: NDArray[np.void]
    shard: NDArray[np.void]
    layer_begin: NDArray[np.uint16]
    layer_end: NDArray[np.uint16]
    head_begin: NDArray[np.uint16]
    head_end: NDArray[np.uint16]
    layout_id: NDArray[np.uint32]
    tenant: NDArray[np.uint32]
    token_count: NDArray[np.uint32]
    size_bytes: NDArray[np.uint64]
    trailer_checksum: NDArray[np.uint64]
    stored_at_ms: NDArray[np.uint64]
    used_at_ms: NDArray[np.uint64]
    access_seq: NDArray[np.int64]
    hits: NDArray[np.uint32]
    used_by: NDArray[np.uint32]
    pinned_until_ms: NDArray[np.uint64]
    leases: NDArray[np.int32]
    holds: NDArray[np.int32]
    next_shard: NDArray[np.int64]
    generation: NDArray[np.uint32]
    used_since_flush: NDArray[np.bool_]
    verified: NDArray[np.bool_]
    hinted: NDArray[np.bool_]
    awaited: NDArray[np.bool_]
    live: NDArray[np.bool_]
    segment: NDArray[np.uint16]
    offset: NDArray[np.int64]
    extent_size: NDArray[np.uint64]
    arrived_ms: NDArray[np.uint64]
    unwanted: NDArray[np.bool_]

    def __init__(
        self,
        row_capacity: int = 1024,
        *,
        rows_likely: int | None = None,
        tiers: Sequence[TierName] = (TierName.DRAM, TierName.SSD),
    ) -> None:
        """Rows take memory only once they are used. Growing past `row_capacity` copies everything: milliseconds for
        tens of thousands of rows, on the event loop. So it is for as many as there can be, of which
        `rows_likely` are expected.
        """
        self.tiers = tuple(tiers)
        self.first_tier, self.last_tier = self.tiers[0], self.tiers[-1]
        self._position = {tier: position for position, tier in enumerate(self.tiers)}
        self.rows_likely = row_capacity if rows_likely is None else rows_likely
        self._first_row: dict[bytes, int] = {}  # Block key -> its first row.
        self._free: list[int] = []
        self.row_end = 0  # Rows at and above it were never used.
        self.live_count = 0
        self.live_of_layout: Counter[int] = Counter()  # Layout id -> live rows.
        self.next_access_seq = 1
        self.changes = 0  # How often a row's visibility or residency changed.
        self.listeners: list[Callable[[int], None]] = []  # Called with each changed row, by `tell`.
        for name, dtype in _COLUMNS.items():
            setattr(self, name, np.zeros(row_capacity, dtype))
        for name, dtype in _TIER_COLUMNS.items():
            setattr(self, name, np.zeros((len(self.tiers), row_capacity), dtype))

    @property
    def row_capacity(self) -> int:
        """Rows that there is space for before the arrays grow."""
        return len(self.key)

    # Finding

    def rows_of_keys(self, keys: Sequence[bytes]) -> Rows:
        """The first row of each block key; NO_ROW where nothing is stored."""
        found = map(self._first_row.get, keys, repeat(NO_ROW))
        return np.fromiter(found, np.int64, len(keys))

    def has_key(self, key: bytes) -> bool:
        """Whether some shard of the block is stored."""
        return key in self._first_row

    def shards_of(self, row: int) -> Iterator[int]:
        """This row and the further rows of its block key."""
        while row != NO_ROW:
            yield row
            row = int(self.next_shard[row])

    def row_of(self, key: bytes, shard: Shard) -> int:
        """The row of exactly this object, or NO_ROW."""
        wanted = shard.encode()
        for row in self.shards_of(self._first_row.get(key, NO_ROW)):
            if self.shard[row].tobytes() == wanted:
                return row
        return NO_ROW

    def rows_of_objects(self, object_keys: ObjectKeys) -> Rows:
        """The row of exactly each of these objects; NO_ROW where it is not stored."""
        if not self._first_row:
            return np.full(len(object_keys), NO_ROW)
        rows = self.rows_of_keys(object_keys["key"].tolist())
        wanted = object_keys["shard"]
        while len(others := np.flatnonzero((rows != NO_ROW) & (self.shard[rows] != wanted))):
            rows[others] = self.next_shard[rows[others]]
        return rows

    def are_all(self, rows: Rows, layout_id: int, shard: Shard) -> bool:
        """Whether all of these rows are of this layout and exactly this shard."""
        if self.shard[rows].tobytes() != shard.encode() * len(rows):  # Bytes, in half the time of two calls of NumPy.
            return False
        return bool((self.layout_id[rows] == layout_id).all())

    def cover(self, rows: Rows, shard: Shard) -> NDArray[np.bool_]:
        """Which rows hold all of `shard`."""
        same: NDArray[np.bool_] = self.shard[rows].view(np.uint64) == np.frombuffer(shard.encode(), np.uint64)
        if same.all():  # The usual case, in a fifth of the time.
            return same
        covered: NDArray[np.bool_] = (
            (self.layer_begin[rows] <= shard.layer_begin)
            & (self.layer_end[rows] >= shard.layer_end)
            & (self.head_begin[rows] <= shard.head_begin)
            & (self.head_end[rows] >= shard.head_end)
        )
        return covered

    def key_of(self, row: int) -> bytes:
        return bytes(self.key[row].tobytes())

    def shard_of(self, row: int) -> Shard:
        return _decode_shard(self.shard[row].tobytes())

    def shards(self, rows: Rows) -> list[Shard]:
        """The shard of each row."""
        return list(map(_decode_shard, self.shard[rows].view("V8").tolist()))

    def object_key_of(self, row: int) -> bytes:
        return bytes(self.key[row].tobytes() + self.shard[row].tobytes())

    def live_rows(self) -> Rows:
        return np.flatnonzero(self.live[: self.row_end])

    # Residency

    def position(self, tier: TierName) -> int:
        """The tier's index in `tiers`; 0 is the fastest."""
        return self._position[tier]

    def extent(self, row: int, tier: TierName) -> Extent | None:
        """Where the row's bytes are in `tier`, if it has them."""
        if not self.is_resident(row, tier):
            return None
        position = self._position[tier]
        offset = int(self.offset[position, row])
        return Extent(int(self.segment[position, row]), offset, int(self.extent_size[position, row]))

    def extents(self, rows: Rows, tier: TierName) -> list[Extent | None]:
        """As `extent`, for many rows."""
        position = self._position[tier]
        columns = (self.segment[position][rows], self.offset[position][rows], self.extent_size[position][rows])
        places = zip(*(column.tolist() for column in columns), strict=True)
        return [None if place[1] == _NOWHERE else Extent(*place) for place in places]

    def set_extent(self, row: int, tier: TierName, extent: Extent | None) -> None:
        position = self._position[tier]
        place = extent or _NO_EXTENT
        self.segment[position, row], self.offset[position, row], self.extent_size[position, row] = place
        if position == 0:
            self.verified[row] = False  # The caller sets it after it verified the copy.
            self.hinted[row] = False
        if self.live[row]:  # Lookups do not find other rows, wherever they are.
            self.tell(row)

    def set_extents(
        self,
        rows: Rows,
        tier: TierName,
        segments: NDArray[np.generic],
        offsets: NDArray[np.generic],
        sizes: NDArray[np.generic],
    ) -> None:
        """The same for many rows, without the listeners: call `tell` for those that are live, in short turns."""
        position = self._position[tier]
        self.segment[position, rows], self.offset[position, rows] = segments, offsets
        self.extent_size[position, rows] = sizes
        if position == 0:
            self.verified[rows] = self.hinted[rows] = False

    def resident(self, tier: TierName) -> NDArray[np.bool_]:
        """Which of the rows below `row_end` have a copy in `tier`."""
        return self.lie_in(slice(self.row_end), tier)

    def lie_in(self, rows: Rows | slice, tier: TierName) -> NDArray[np.bool_]:
        """Which of these rows have a copy in `tier`; none where the store has no such tier."""
        if tier not in self._position:
            return np.zeros(len(self.live[rows]), np.bool_)
        mask: NDArray[np.bool_] = self.offset[self._position[tier]][rows] != _NOWHERE
        return mask

    def lie_in_tiers(self, rows: Rows) -> NDArray[np.bool_]:
        """Which tiers have a copy of each row: ``[tier, row]``."""
        mask: NDArray[np.bool_] = self.offset[:, rows] != _NOWHERE
        return mask

    def lie_anywhere(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of these rows have a copy in any tier."""
        mask: NDArray[np.bool_] = np.logical_or.reduce(self.lie_in_tiers(rows), axis=0)
        return mask

    def tier_sets(self, rows: Rows) -> NDArray[np.int64]:
        """The tiers that have a copy of each row, as bits: bit 0 is the first tier."""
        bits = np.zeros(len(rows), np.int64)
        for position, offsets in enumerate(self.offset):
            bits |= (offsets[rows] != _NOWHERE).astype(np.int64) << position
        return bits

    def count_by_fastest(self, rows: Rows) -> list[int]:
        """How many of the rows have their fastest copy in each tier. Rows without a copy are not counted."""
        counts = []
        for tier in self.tiers:
            is_here = self.lie_in(rows, tier)
            counts.append(int(np.count_nonzero(is_here)))
            if counts[-1] == len(rows):
                break
            rows = rows[~is_here]
        return counts + [0] * (len(self.tiers) - len(counts))

    def resident_slower(self, tier: TierName) -> NDArray[np.bool_]:
        """Which of the rows below `row_end` have a copy in a tier that is slower than `tier`."""
        return self._any_copy(slice(self._position[tier] + 1, None), slice(self.row_end))

    def resident_faster(self, tier: TierName) -> NDArray[np.bool_]:
        """Which of the rows below `row_end` have a copy in a tier that is faster than `tier`."""
        return self._any_copy(slice(0, self._position[tier]), slice(self.row_end))

    def is_resident(self, row: int, tier: TierName) -> bool:
        return tier in self._position and bool(self.offset[self._position[tier], row] != _NOWHERE)

    def has_slower_copy(self, row: int, tier: TierName) -> bool:
        """Whether a tier that is slower than `tier` has a copy of the row."""
        return any(offset != _NOWHERE for offset in self.offset[self._position[tier] + 1 :, row].tolist())

    def tiers_of(self, row: int) -> list[TierName]:
        """The tiers that have a copy of the row, the fastest first."""
        offsets = self.offset[:, row].tolist()
        return [tier for tier, offset in zip(self.tiers, offsets, strict=True) if offset != _NOWHERE]

    def fastest(self, row: int) -> TierName | None:
        """The fastest tier that has a copy of the row; None if no tier has one."""
        return next(iter(self.tiers_of(row)), None)

    def since_ms(self, tier: TierName) -> NDArray[np.uint64]:
        """The column with the time when each row's copy was written to `tier`."""
        column: NDArray[np.uint64] = self.arrived_ms[self._position[tier]]
        return column

    def only_in(self, tier: TierName) -> Rows:
        """The visible blocks that are in this tier, and in no slower one."""
        return np.flatnonzero(self.resident(tier) & ~self.resident_slower(tier) & self.live[: self.row_end])

    @property
    def unwanted_on_ssd(self) -> NDArray[np.bool_]:
        """The column of `unwanted` for the second tier, as policies read it."""
        column: NDArray[np.bool_] = self.unwanted[1]
        return column

    def _any_copy(self, positions: slice, rows: slice) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = (self.offset[positions, rows] != _NOWHERE).any(axis=0)
        return mask

    # Pins: a pinned block keeps one copy, the one in the slowest tier that has one.

    def pinned(self, now_ms: int) -> NDArray[np.bool_]:
        """Which of the rows below `row_end` are pinned."""
        mask: NDArray[np.bool_] = self.pinned_until_ms[: self.row_end] > np.uint64(now_ms)
        return mask

    def pin_keeps(self, row: int, tier: TierName, now_ms: int) -> bool:
        """Whether a pin keeps the row's copy in `tier`."""
        return bool(self.pinned_until_ms[row] > now_ms) and not self.has_slower_copy(row, tier)

    # Changing

    def add(
        self,
        key: bytes,
        shard: Shard,
        *,
        parent_key: bytes,
        layout_id: int,
        tenant: int,
        token_count: int,
        size_bytes: int,
        trailer_checksum: int,
        now_ms: int,
    ) -> int:
        """A row for a new object. It has no residency yet, and no lookup finds it before `link`."""
        row = self._take_row()
        self.key[row] = key
        self.parent_key[row] = parent_key
        self.layout_id[row] = layout_id
        self.tenant[row] = tenant
        self.token_count[row] = token_count
        self.size_bytes[row] = size_bytes
        self.trailer_checksum[row] = trailer_checksum
        self.stored_at_ms[row] = self.used_at_ms[row] = now_ms
        self.used_by[row] = _NO_USER
        self._set_shard(row, shard)
        return row

    def link(self, row: int) -> None:
        """Make the row visible to lookups."""
        key = self.key_of(row)
        assert not self.live[row] and self.row_of(key, self.shard_of(row)) == NO_ROW, "an object has one row"
        self.next_shard[row] = self._first_row.get(key, NO_ROW)
        self._first_row[key] = row
        self.live[row] = True
        self.live_count += 1
        self.live_of_layout[int(self.layout_id[row])] += 1
        self.tell(row)

    def unlink(self, row: int) -> None:
        """Make the row invisible to lookups. It keeps its residency until `free`."""
        assert self.live[row]
        key = self.key_of(row)
        rows = [other for other in self.shards_of(self._first_row[key]) if other != row]
        if rows:
            self._first_row[key] = rows[0]
            for this, following in zip(rows, [*rows[1:], NO_ROW], strict=True):
                self.next_shard[this] = following
        else:
            del self._first_row[key]
        self.next_shard[row] = NO_ROW
        self.live[row] = False
        self.live_count -= 1
        self.live_of_layout[int(self.layout_id[row])] -= 1
        self.tell(row)

    def free(self, row: int) -> None:
        """Free an unlinked, unheld row that has no residency."""
        assert not self.live[row] and not self.leases[row] and not self.holds[row]
        assert (self.offset[:, row] == _NOWHERE).all()
        assert self.size_bytes[row], "a row that is free twice would get two blocks"
        self.size_bytes[row] = 0
        self.access_seq[row] = self.hits[row] = self.pinned_until_ms[row] = 0
        self.arrived_ms[:, row] = 0
        self.used_since_flush[row] = self.verified[row] = self.hinted[row] = self.awaited[row] = False
        self.unwanted[:, row] = False
        self.generation[row] += 1
        self._free.append(row)

    def touch(self, rows: Rows, now_ms: int) -> None:
        """Mark as used now. Earlier rows count as used later: a suffix is worth less than its prefix."""
        count = len(rows)
        if not count:
            return
        self.access_seq[rows] = np.arange(self.next_access_seq + count - 1, self.next_access_seq - 1, -1)
        self.next_access_seq += count
        self.used_at_ms[rows] = now_ms
        self.used_since_flush[rows] = True
        self.unwanted[:, rows] = False

    def note_user(self, rows: Rows, client: int) -> None:
        """Note that the client with this number, 1 or more, stores or reads the rows."""
        used_by = self.used_by[rows]
        if (used_by == client).all():
            return
        self.used_by[rows] = np.where((used_by == _NO_USER) | (used_by == client), client, _USERS_UNKNOWN)

    def used_only_by(self, rows: Rows, client: int) -> NDArray[np.bool_]:
        """Which of these rows no other client than this one has stored or read, as far as is known."""
        used_by = self.used_by[rows]
        mask: NDArray[np.bool_] = (used_by == _NO_USER) | (used_by == client)
        return mask

    def rank_newest(self, rows: Rows) -> None:
        """Rank the rows as used now, the first as the last used one. It is no use: their times of use stay."""
        count = len(rows)
        self.access_seq[rows] = np.arange(self.next_access_seq + count - 1, self.next_access_seq - 1, -1)
        self.next_access_seq += count

    def rank_oldest(self, rows: Rows) -> None:
        """Rank the rows as used before all others, until they are used again."""
        self.access_seq[rows] = 0

    def ancestors(self, row: int, limit: int = 1024) -> list[int]:
        """Rows of the stored blocks that this one continues, from its parent on; at most `limit`.

        Where a block is stored in several shards, the row of the same shard, else any.
        """
        shard = self.shard[row].tobytes()
        found: dict[int, None] = {}  # Clients name the parents, so parents may form a cycle.
        parent = self._parent_row(row, shard)
        while parent != NO_ROW and parent not in found and len(found) < limit:
            found[parent] = None
            parent = self._parent_row(parent, shard)
        return list(found)

    def parent_row(self, row: int) -> int:
        """The row of the stored block that this one continues, of the same shard if there is one; else NO_ROW."""
        return self._parent_row(row, self.shard[row].tobytes())

    def _parent_row(self, row: int, shard: bytes) -> int:
        first = self._first_row.get(self.parent_key[row].tobytes(), NO_ROW)
        if first == NO_ROW or self.next_shard[first] == NO_ROW:
            return first
        return next((row for row in self.shards_of(first) if self.shard[row].tobytes() == shard), first)

    def add_many(self, object_keys: ObjectKeys, columns: dict[str, NDArray[np.generic]]) -> Rows:
        """Rows for recovered objects, none of which is in the table yet. Sets `columns` as given."""
        count = len(object_keys)
        while len(self.key) < self.row_end + count:
            self._grow()
        assert not self._free, "recovery fills an empty table"
        new = slice(self.row_end, self.row_end + count)
        rows = np.arange(new.start, new.stop, dtype=np.int64)
        self.row_end += count
        self.offset[:, new] = _NOWHERE
        self.next_shard[new] = NO_ROW
        self.key[new] = object_keys["key"]
        self.shard[new] = object_keys["shard"]
        parts = np.ascontiguousarray(object_keys["shard"]).view(">u8").astype(np.uint64)
        for place, name in enumerate(("layer_begin", "layer_end", "head_begin", "head_end")):
            getattr(self, name)[new] = (parts >> np.uint64(48 - 16 * place)) & np.uint64(0xFFFF)
        for name, values in columns.items():
            getattr(self, name)[new] = values
        self.live[new] = True
        self.live_count += count
        layout_ids, counts = np.unique(self.layout_id[rows], return_counts=True)
        self.live_of_layout.update(dict(zip(layout_ids.tolist(), counts.tolist(), strict=True)))
        self._link_many(rows, object_keys["key"].tolist())
        if count:
            self.next_access_seq = max(self.next_access_seq, int(self.access_seq[new].max()) + 1)
        return rows

    def _link_many(self, rows: Rows, keys: Sequence[bytes]) -> None:
        first_row = self._first_row
        new = dict(zip(keys, rows.tolist(), strict=True))
        if len(new) == len(keys) and first_row.keys().isdisjoint(new):
            if first_row:
                first_row.update(new)
            else:
                self._first_row = new
            return
        for row, key in zip(rows.tolist(), keys, strict=True):  # Several shards of a block: five times as slow.
            before = first_row.setdefault(key, row)
            if before != row:
                self.next_shard[row] = before
                first_row[key] = row

    def _set_shard(self, row: int, shard: Shard) -> None:
        self.shard[row] = shard.encode()
        self.layer_begin[row], self.layer_end[row] = shard.layer_begin, shard.layer_end
        self.head_begin[row], self.head_end[row] = shard.head_begin, shard.head_end

    def tell(self, row: int) -> None:
        """Lookups find the row from now on, or no longer, or find another residency."""
        self.changes += 1
        for listener in self.listeners:
            listener(row)

    def _take_row(self) -> int:
        if self._free:
            row = self._free.pop()
        else:
            if self.row_end == len(self.key):
                self._grow()
            row = self.row_end
            self.row_end += 1
        self.offset[:, row] = _NOWHERE
        self.next_shard[row] = NO_ROW
        return row  # The other columns are set by `add`, or are zero: of a new array, or since `free`.

    def _grow(self) -> None:
        for name in (*_COLUMNS, *_TIER_COLUMNS):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)], axis=-1))
