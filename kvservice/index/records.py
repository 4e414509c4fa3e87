"""The bytes of one index record: where a block is stored, what it holds, and when it was used.

A record is the value that LMDB keeps under an object key (block key and shard)::

    0        1       2            4             8              12         16
    | ver u8 | 0 u8  | segment u16 | layout u32  | tokens u32   | hits u32 |
    16                       24                     32
    | extent offset u64      | extent size u64      | trailer xxh3-64 u64  |
    40                       48                     56
    | stored at, ms u64      | used at, ms u64      | access number u64    |
    64                                                               96
    | parent key, 32 bytes                                            |
    96                       104          108                116     120
    | pinned until, ms u64   | tenant u32 | zeros: spare u64 | crc u32 |

Little-endian. The crc is CRC-32 over the object key and the record before it, so a record that was
damaged, or has another key, is detected. Records written before pins and tenants existed have zeros
there: not pinned, of tenant 0, which is "default".
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import OBJECT_KEY_BYTES

RECORD_VERSION = 1

RECORD = np.dtype(
    [
        ("version", "u1"),
        ("flags", "u1"),
        ("segment", "<u2"),
        ("layout_id", "<u4"),
        ("token_count", "<u4"),
        ("hits", "<u4"),
        ("offset_bytes", "<u8"),
        ("size_bytes", "<u8"),
        ("trailer_checksum", "<u8"),
        ("stored_at_ms", "<u8"),
        ("used_at_ms", "<u8"),
        ("access_seq", "<u8"),
        ("parent_key", "V32"),  # V, not S: NumPy strips the zero bytes at the end of an S.
        ("pinned_until_ms", "<u8"),  # 0: not pinned.
        ("tenant", "<u4"),
        ("reserved", "V8"),
        ("crc", "<u4"),
    ]
)
assert RECORD.itemsize == 120  # On-disk format: another size needs another version.

# A key and its record side by side, read as what the crc covers or as what is stored.
_ROW_BYTES = OBJECT_KEY_BYTES + RECORD.itemsize
_ROW = np.dtype(
    {
        "names": ["covered", "crc", "value"],
        "formats": [f"V{_ROW_BYTES - 4}", "<u4", f"V{RECORD.itemsize}"],
        "offsets": [0, _ROW_BYTES - 4, OBJECT_KEY_BYTES],
        "itemsize": _ROW_BYTES,
    }
)

# CRC-32 over bytes that end in their own CRC-32 is always this: checking needs no slice.
_RESIDUE = 0x2144DF1C

Records = NDArray[np.void]


def new_records(count: int) -> Records:
    """`count` empty records of this version, to be filled in by field."""
    records = np.zeros(count, RECORD)
    records["version"] = RECORD_VERSION
    return records


def encode_records(keys: Sequence[bytes], records: Records) -> list[bytes]:
    """One value per record, each with its crc. There is at least one record."""
    assert 0 < len(keys) == len(records)
    assert records.dtype == RECORD and (records["version"] == RECORD_VERSION).all()
    assert (records["size_bytes"] > 0).all() and (records["token_count"] > 0).all()  # Paired with decode.
    packed_keys = b"".join(keys)
    assert len(packed_keys) == OBJECT_KEY_BYTES * len(keys)
    joined = np.empty((len(keys), _ROW_BYTES), np.uint8)
    joined[:, :OBJECT_KEY_BYTES] = np.frombuffer(packed_keys, np.uint8).reshape(len(keys), -1)
    joined[:, OBJECT_KEY_BYTES:] = np.ascontiguousarray(records).view(np.uint8).reshape(len(keys), -1)
    rows = joined.view(_ROW)[:, 0]
    rows["crc"] = list(map(crc32, rows["covered"].tolist()))
    values: list[bytes] = rows["value"].tolist()  # Five times as fast as slicing.
    return values


def is_sound(key: bytes, value: bytes) -> bool:
    """Whether `value` is a record that was written under this key."""
    sized = len(key) == OBJECT_KEY_BYTES and len(value) == RECORD.itemsize
    return sized and crc32(value, crc32(key)) == _RESIDUE and value[0] == RECORD_VERSION


def decode_records(keys: Sequence[bytes], values: Sequence[bytes]) -> tuple[NDArray[np.bool_], Records]:
    """Which records are sound, and all of them. Records of a wrong length are returned as zeros."""
    sound = np.fromiter(map(crc32, values, map(crc32, keys)), np.uint32, len(values)) == _RESIDUE
    joined = b"".join(values)
    if len(joined) != RECORD.itemsize * len(values) or len(set(map(len, values))) > 1:
        sound &= np.fromiter(map(len, values), np.int64, len(values)) == RECORD.itemsize
        blank = bytes(RECORD.itemsize)
        joined = b"".join(value if fits else blank for value, fits in zip(values, sound.tolist(), strict=True))
    records = np.frombuffer(joined, RECORD)
    sound &= np.fromiter(map(len, keys), np.int64, len(keys)) == OBJECT_KEY_BYTES
    sound &= (records["version"] == RECORD_VERSION) & (records["size_bytes"] > 0) & (records["token_count"] > 0)
    return sound, records
