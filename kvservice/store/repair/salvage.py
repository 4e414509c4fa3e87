"""Makes a new durable index from the readable part of a damaged one: for ``kvservice check --repair``.

It reads every leaf page of the old file, also pages that no tree reaches. Each record, layout and session has a CRC
over itself and its key. A record that is only on a free page may be of a block that was removed later. So it is used
only if the bytes at its place are still those of the block.

The new index is created in a folder beside the old one and replaces it at the end; the old one is kept
(``index/replacement.py``). If a repair is interrupted before that, the old index is unchanged.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvservice.blocks import TierName
from kvservice.index import pages, replacement
from kvservice.index.block_index import BlockIndex
from kvservice.index.descriptor_secret import DESCRIPTORS_KEY, DescriptorSecret, has_all_descriptors, read_secret
from kvservice.index.environment import DATA_NAME
from kvservice.index.errors import StoreDamaged
from kvservice.index.identity import (
    IDENTITY_NAME,
    STORE_ID_BYTES,
    STORE_KEY,
    read_identity,
    refuse_newer,
    write_identity,
)
from kvservice.index.layouts import LAYOUTS_NAME, decode_layout, layout_copies
from kvservice.index.records import RECORD, Records, is_sound
from kvservice.index.recovery import overlaps
from kvservice.index.session_records import decode_manifest
from kvservice.store.repair.rebuild import SearchResult
from kvservice.tiers.ssd_files import read_header

_RECORDS_AT_ONCE = 4096
_MAP_BYTES_MIN = 4 << 20
_MAP_BYTES_PER_RECORD = 512

Verify = Callable[[Sequence[bytes], Records], Awaitable[Sequence[bool]]]


@dataclass(slots=True)
class SalvagedIndex:
    """The contents of a damaged index that were found. Entries are unchanged."""

    meta: dict[bytes, bytes] = field(default_factory=dict)
    layouts: dict[bytes, bytes] = field(default_factory=dict)
    sessions: dict[bytes, bytes] = field(default_factory=dict)
    records: dict[bytes, bytes] = field(default_factory=dict)
    doubtful: dict[bytes, bytes] = field(default_factory=dict)  # Records on pages that are not in use.
    secret: DescriptorSecret = field(default_factory=lambda: DescriptorSecret.new(every_block=True))
    secret_is_lost: bool = False  # `secret` is then a new one, with which no block was tagged.


def read(store: Path, ssd_files: Sequence[Path] = ()) -> SalvagedIndex:
    """All entries of the store's durable index with a correct CRC, the layouts' own files, and the store's secret.

    `ssd_files` are files in other folders. Raises OSError, StoreDamaged, StoreTooNew.
    """
    saved = SalvagedIndex(layouts=layout_copies(store))
    path = store / "index" / DATA_NAME
    if path.exists():
        found: list[tuple[bool, bytes, bytes]] = sorted(pages.salvage(path), key=lambda entry: entry[0])
        for in_use, key, value in found:  # Entries in use come last, and replace the others.
            _sort_in(saved, in_use, key, value)
    refuse_newer(saved.meta)
    headers = (read_header(file) for file in (*sorted(store.glob("ssd-*.kv")), *ssd_files))
    ids = [header.store_id for header in headers if header is not None]
    saved.meta[STORE_KEY] = _most_frequent([*ids, saved.meta.get(STORE_KEY, b""), read_identity(store)])
    if not saved.meta[STORE_KEY]:
        raise StoreDamaged(f"no file in {store} names the store")
    for key in saved.records:
        saved.doubtful.pop(key, None)
    found_secret = read_secret(store)
    saved.secret_is_lost = found_secret is None
    saved.secret = found_secret or DescriptorSecret.new(every_block=has_all_descriptors(saved.meta))
    saved.meta[DESCRIPTORS_KEY] = saved.secret.mark
    return saved


def _most_frequent(ids: Sequence[bytes]) -> bytes:
    """The id that most places name; if several do, the first of them. Empty if no place names one.

    One flipped bit may be in any of the places, and an SSD file with another id cannot be opened.
    """
    counts = Counter(store_id for store_id in ids if len(store_id) == STORE_ID_BYTES)
    return counts.most_common(1)[0][0] if counts else b""


def _sort_in(saved: SalvagedIndex, in_use: bool, key: bytes, value: bytes) -> None:
    if is_sound(key, value):
        chosen = saved.records if in_use else saved.doubtful
        if key not in chosen or _access_number(chosen[key]) <= _access_number(value):
            chosen[key] = value
    elif decode_layout(key, value) is not None:
        saved.layouts[key] = value
    elif in_use and decode_manifest(key, value) is not None:
        saved.sessions[key] = value
    elif in_use and key.isascii() and len(value) < 1 << 16:
        saved.meta[key] = value  # `BlockIndex.create` uses the entries that it knows.


def _access_number(record: bytes) -> int:
    return int(np.frombuffer(record, RECORD)["access_seq"][0])


def make_index(store: Path, saved: SalvagedIndex) -> BlockIndex:
    """A new index beside the old one, still without records of blocks and sessions.

    The store's identity file is written again if it names another store than `saved`. Raises StoreError,
    StorageFailed, OSError.
    """
    if read_identity(store) != saved.meta[STORE_KEY]:
        write_identity(store, saved.meta[STORE_KEY])
    directory = replacement.begin(store)
    return BlockIndex.create(directory, map_bytes=_map_bytes(store, saved), meta=saved.meta, layouts=saved.layouts)


def make_room(store: Path, saved: SalvagedIndex, more: int) -> BlockIndex:
    """Reopen the new index, with space for `more` blocks. Raises StoreError, StorageFailed."""
    return BlockIndex.open(replacement.new_index(store), map_bytes=_map_bytes(store, saved, more), create=False)


def _map_bytes(store: Path, saved: SalvagedIndex, more: int = 0) -> int:
    old = store / "index" / DATA_NAME
    size = old.stat().st_size if old.is_file() else 0
    return max(size, _MAP_BYTES_MIN + _MAP_BYTES_PER_RECORD * (len(saved.records) + len(saved.doubtful) + more))


async def fill(index: BlockIndex, saved: SalvagedIndex, verify: Verify, found: SearchResult | None = None) -> None:
    """Record the saved entries, and the blocks `found` in the SSD files that are not among them.

    `verify` returns the doubtful records whose bytes are still those of their blocks. Raises IndexFull, StorageFailed.
    """
    keys, records = _joined(saved.records)
    doubtful_keys, doubtful = _joined(saved.doubtful)
    if len(doubtful_keys):
        known = np.isin(doubtful["layout_id"], list(index.layouts))
        rows = np.flatnonzero(known)
        right = np.array(await verify([doubtful_keys[row] for row in rows], doubtful[rows]), np.bool_)
        rows = rows[right]
        together = np.concatenate((records, doubtful[rows]))
        rows = rows[~overlaps(together)[len(records) :]]
        keys, records = keys + [doubtful_keys[row] for row in rows], np.concatenate((records, doubtful[rows]))
    if found is not None:
        known_keys = set(keys)
        new = np.array([row for row, key in enumerate(found.keys) if key not in known_keys], np.int64)
        together = np.concatenate((records, found.records[new]))
        new = new[~overlaps(together)[len(records) :]]
        keys, records = keys + [found.keys[row] for row in new], np.concatenate((records, found.records[new]))
    for start in range(0, len(keys), _RECORDS_AT_ONCE):
        some = slice(start, start + _RECORDS_AT_ONCE)
        await index.put(TierName.SSD, keys[some], records[some])
    if saved.sessions:
        await index.put_session_values(saved.sessions)


def put_in_place(store: Path) -> Path | None:
    """Replace the old index by the new one. Returns the old one's new path. Raises OSError."""
    _give_to_owner(store, replacement.new_index(store))
    return replacement.put_in_place(store)


def _give_to_owner(store: Path, new: Path) -> None:
    """Root makes the files; the daemon, which the store belongs to, is to open them."""
    if os.geteuid() == 0:
        owner = store.stat()
        layouts = store / LAYOUTS_NAME
        for path in (new, *new.rglob("*"), store / IDENTITY_NAME, layouts, *layouts.glob("*")):
            if path.exists():
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _joined(values: Mapping[bytes, bytes]) -> tuple[list[bytes], Records]:
    return list(values), np.frombuffer(b"".join(values.values()), RECORD)
