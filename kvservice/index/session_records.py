"""Session manifests, and the bytes of one in the index.

A manifest's key is its layout's id (u32, big-endian) and the session's id. Little-endian::

    0        1          2       4            8              16              24          32
    | ver u8 | flags u8 | 0 u16 | layout u32 | revision u64 | created, ms   | used, ms  |
    32               40         44           48              52      56               88
    | expires, ms u64 | cuts u32 | slices u32 | positions u32 | 0 u32 | tip, 32 bytes  |
    88                                         ...
    | slices, 56 bytes each | positions, u64 each | crc u32 |

Flag 1: the last slice is an open tail. The crc is CRC-32 over the name and all of the record before
it, so a record that was damaged, or has another key, is detected.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

SESSION_VERSION = 1

#  | key 32 | first token u32 | tokens u32 | tokens of the block u32 | positions at i32 | stored position i64 |
SLICE = np.dtype(
    [
        ("key", "V32"),
        ("first_token", "<u4"),  # Of the block.
        ("token_count", "<u4"),
        ("block_tokens", "<u4"),
        ("positions_at", "<i4"),  # Where the positions of its tokens begin in the manifest's, or -1.
        ("stored_position", "<i8"),  # Of its first token; the others' are consecutive. -1: see positions, or none.
    ]
)
assert SLICE.itemsize == 56  # On-disk format: another size needs another version.

_HEAD = struct.Struct("<BBHIQQQQIIII32s")
assert _HEAD.size == 88
_LAYOUT_ID = struct.Struct(">I")
_CRC = struct.Struct("<I")
_HAS_TAIL = 1

Slices = NDArray[np.void]
Positions = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """One conversation in one layout. Immutable: a change creates a manifest of a higher revision.

    `tip` is the key that the next block continues. An open tail continues it too: it is the last slice,
    a whole partial block, and the next append puts a fuller block in its place.
    """

    session_id: str
    layout_id: int
    revision: int
    tip: bytes
    slices: Slices
    positions: Positions  # Of the slices whose positions are not consecutive.
    has_tail: bool
    cuts: int
    created_at_ms: int
    used_at_ms: int
    expires_at_ms: int

    @property
    def name(self) -> bytes:
        return session_name(self.layout_id, self.session_id)

    @property
    def token_count(self) -> int:
        return int(self.slices["token_count"].sum(dtype=np.uint64))

    @property
    def tail_tokens(self) -> int:
        return int(self.slices["token_count"][-1]) if self.has_tail else 0


def session_name(layout_id: int, session_id: str) -> bytes:
    """The key of a manifest in the index."""
    return _LAYOUT_ID.pack(layout_id) + session_id.encode()


def encode_manifest(manifest: Manifest) -> bytes:
    assert len(manifest.slices) and manifest.slices.dtype == SLICE  # Paired with decode.
    assert manifest.positions.dtype == np.uint64
    head = _HEAD.pack(
        SESSION_VERSION,
        _HAS_TAIL if manifest.has_tail else 0,
        0,
        manifest.layout_id,
        manifest.revision,
        manifest.created_at_ms,
        manifest.used_at_ms,
        manifest.expires_at_ms,
        manifest.cuts,
        len(manifest.slices),
        len(manifest.positions),
        0,
        manifest.tip,
    )
    body = head + manifest.slices.tobytes() + manifest.positions.astype("<u8").tobytes()
    return body + _CRC.pack(crc32(body, crc32(manifest.name)))


def decode_manifest(name: bytes, value: bytes) -> Manifest | None:
    """None where anything is wrong: the crc, the version, or numbers that contradict each other."""
    body, crc = value[:-4], value[-4:]
    if len(body) < _HEAD.size or len(name) <= _LAYOUT_ID.size or crc != _CRC.pack(crc32(body, crc32(name))):
        return None
    version, flags, _, layout_id, revision, *times, cuts, slice_count, positions, _, tip = _HEAD.unpack_from(body)
    if version != SESSION_VERSION or len(body) != _HEAD.size + SLICE.itemsize * slice_count + 8 * positions:
        return None
    slices = np.frombuffer(body, SLICE, slice_count, _HEAD.size)
    manifest = Manifest(
        name[_LAYOUT_ID.size :].decode(errors="replace"),
        layout_id,
        revision,
        tip,
        slices,
        np.frombuffer(body, "<u8", positions, _HEAD.size + slices.nbytes).astype(np.uint64),
        bool(flags & _HAS_TAIL),
        cuts,
        *times,
    )
    return manifest if manifest.name == name and _is_sound(manifest) else None


def _is_sound(manifest: Manifest) -> bool:
    slices = manifest.slices
    if not len(slices):
        return False
    counts, firsts = slices["token_count"].astype(np.int64), slices["first_token"].astype(np.int64)
    within = (counts > 0) & (firsts + counts <= slices["block_tokens"])
    at = slices["positions_at"].astype(np.int64)
    within &= (at < 0) | (at + counts <= len(manifest.positions))
    return bool(within.all())
