"""The residency directory: which blocks a daemon stores, in shared memory that its clients may read.

One file, ``directory``, beside the arena: a page of header, then a hash table with open addressing.
Little-endian, but for the shard, which is as ``Shard.encode`` has it::

    0          8           12        16            32            48             56            64
    | KVRESDIR | version 4 | state 4 | store id 16 | arena id 16 | boot epoch 8 | slot count 8 | zeros
    4096                 4160                 4224
    | slot 0             | slot 1             | ...                      a power of two of slots

    0            4       8         12          16         24        32                            64
    | sequence 4 | crc 4 | flags 4 | tokens 4  | layout 8 | shard 8 | block key 32                |

A slot tells of one stored object. A key's slot is the one that its first 8 bytes name, modulo the
slot count, or one of those behind it, round the end: a search ends at an empty slot (flags 0). What
was withdrawn leaves a slot that is not empty (``GONE``), so that a search goes on behind it.

The daemon alone writes, while clients read without a lock. A reader never takes one object for
another, for it takes a slot only where all of this holds, and else calls it torn, which is a miss:

* The sequence is even, and the same before and after the slot was copied. It is odd while the
  daemon writes the slot, and has grown by two once it has.
* The crc, CRC-32 over the slot from its flags on, is right. On processors that let other cores see
  writes in another order, sequences alone prove nothing.

A directory is good for one life of the daemon: its boot epoch must be the one that the daemon told
the client. A file that is replaced by a larger one says so in its state, and so does one whose
daemon has stopped. What stands in a slot may be late by the time it takes to write it, no more.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kvservice_api.image import PAGE_BYTES
from kvservice_api.keys import KEY_BYTES

FILE_NAME = "directory"
VERSION = 1
HEADER_BYTES = PAGE_BYTES
SLOT_BYTES = 64

IN_DRAM, ON_SSD = 1, 2  # Flags. A slot that has one of them is in use.
GONE = 4

_HEADER = struct.Struct("<8sII16s16sQQ")
_MAGIC = b"KVRESDIR"
STATE_WORD = 3  # The state's place in the file, counted in 4 bytes.
assert _HEADER.size == 64

SLOT = np.dtype(
    {
        "names": ["sequence", "crc", "flags", "token_count", "layout", "shard", "key", "covered"],
        "formats": ["<u4", "<u4", "<u4", "<u4", "V8", "V8", f"V{KEY_BYTES}", "V56"],
        "offsets": [0, 4, 8, 12, 16, 24, 32, 8],  # `covered` is what the crc is over.
        "itemsize": SLOT_BYTES,
    }
)
_COVERED = struct.Struct("<II8s8s32s")
_CRC = struct.Struct("<I")
assert _COVERED.size == SLOT["covered"].itemsize

Slots = NDArray[np.void]


class DirectoryState(IntEnum):
    BUILDING = 1  # Not all blocks are in it yet.
    LIVE = 2
    REPLACED = 3  # There is another file under its name.
    CLOSED = 4  # There is none any more.


@dataclass(frozen=True, slots=True)
class Header:
    store_id: bytes
    arena_id: bytes
    boot_epoch: int
    slot_count: int
    state: DirectoryState

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + SLOT_BYTES * self.slot_count

    def encode(self) -> bytes:
        assert self.slot_count & (self.slot_count - 1) == 0 < self.slot_count
        return _HEADER.pack(_MAGIC, VERSION, self.state, self.store_id, self.arena_id, self.boot_epoch, self.slot_count)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Header:
        """Raises ValueError where the bytes are no header of this version."""
        if len(data) < _HEADER.size:
            raise ValueError("the directory's header is cut off")
        magic, version, state, store_id, arena_id, boot_epoch, slot_count = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != VERSION:
            raise ValueError("it is no directory of this version")
        if not slot_count or slot_count & (slot_count - 1):
            raise ValueError(f"{slot_count} is no count of slots")
        return cls(store_id, arena_id, boot_epoch, slot_count, DirectoryState(state))


def layout_mark(fingerprint: bytes) -> bytes:
    """What stands in a slot for a layout: the first 8 bytes of its fingerprint."""
    return fingerprint[:8]


def home_slot(key: bytes, slot_count: int) -> int:
    """Where the search for a key begins."""
    return int.from_bytes(key[:8], "little") & (slot_count - 1)


def home_slots(packed_keys: NDArray[np.uint64], slot_count: int) -> NDArray[np.int64]:
    """The same for many. `packed_keys` has the shape [keys, 4]."""
    homes: NDArray[np.int64] = (packed_keys[:, 0] & np.uint64(slot_count - 1)).astype(np.int64)
    return homes


def encode_slot(flags: int, token_count: int, layout: bytes, shard: bytes, key: bytes) -> bytes:
    """A slot without its sequence: 60 bytes."""
    covered = _COVERED.pack(flags, token_count, layout, shard, key)
    return _CRC.pack(crc32(covered)) + covered


WITHDRAWN_SLOT = encode_slot(GONE, 0, b"", b"", b"")
EMPTY_SLOT = encode_slot(0, 0, b"", b"", b"")


def seal_slots(slots: Slots) -> None:
    """Fill in the crc of each."""
    slots["crc"] = crcs_of(slots["covered"].tolist())


def crcs_of(covered: Sequence[bytes]) -> NDArray[np.uint32]:
    return np.fromiter(map(crc32, covered), np.uint32, len(covered))
