"""The residency directory: which blocks a daemon stores, in shared memory that its clients may read.

One file, ``directory``, beside the arena: a page of header, then a hash table with open addressing.
Little-endian, except the shard, which ``Shard.encode`` encodes::

    0          8           12        16            32            48             56            64
    | KVRESDIR | version 4 | state 4 | store id 16 | arena id 16 | boot epoch 8 | slot count 8 |
    64               68
    | contents 4     | zeros
    4096                 4160                 4224
    | slot 0             | slot 1             | ...                      a power of two of slots

    0            4       8         12          16         24        32                            64
    | sequence 4 | crc 4 | flags 4 | tokens 4  | layout 8 | shard 8 | block key 32                |

A slot describes one stored object. A partial block has a second slot, of flag ``TAIL``, under the key `tail_key` of
its parent key: it shows that a tail continues the parent. Readers that do not know this flag ignore the slot, because
it has neither of the other flags. The bit ``HAS_TAILS`` of the contents says that the daemon writes such slots.

The search for a key starts at the slot number of its first 8 bytes modulo the slot count, continues with the next
slots, wraps around, and ends at an empty slot (flags 0).
A withdrawn object leaves a slot that is not empty (``GONE``), so that the search continues after it.

Only the daemon writes; clients read without a lock. A reader uses a slot only if both conditions hold.
Otherwise the slot is torn and counts as a miss, so a reader never confuses two objects:

* The sequence is even, and has the same value before and after the slot was copied. It is odd while the
  daemon writes the slot, and two higher afterwards.
* The crc, CRC-32 over the slot from its flags on, is correct. On processors on which other cores can see
  writes in another order, the sequence alone is not sufficient.

A directory is valid for one run of the daemon: its boot epoch must be the one that the daemon sent to
the client. The state of a file says whether a larger file has replaced it, and whether its daemon has
stopped. A slot is out of date at most for the time that the daemon needs to write it.
"""

from __future__ import annotations

import hashlib
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
TAIL = 8  # A slot that has this flag is in use too.
HAS_TAILS = 1  # A bit of the header's contents.

_HEADER = struct.Struct("<8sII16s16sQQI")
_MAGIC = b"KVRESDIR"
STATE_WORD = 3  # The index of the state in the file, in words of 4 bytes.
assert _HEADER.size == 68
_TAILS = b"kvservice/tails/1"

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
    """Whether the file may be read. Only `LIVE` means that it has all blocks."""

    BUILDING = 1  # Not all blocks are in it yet.
    LIVE = 2
    REPLACED = 3  # Another file has its name now.
    CLOSED = 4  # The daemon has stopped.


@dataclass(frozen=True, slots=True)
class Header:
    store_id: bytes
    arena_id: bytes
    boot_epoch: int
    slot_count: int
    state: DirectoryState
    contents: int = HAS_TAILS

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + SLOT_BYTES * self.slot_count

    def encode(self) -> bytes:
        assert self.slot_count & (self.slot_count - 1) == 0 < self.slot_count
        known = (self.store_id, self.arena_id, self.boot_epoch, self.slot_count, self.contents)
        return _HEADER.pack(_MAGIC, VERSION, self.state, *known)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Header:
        """Parse the start of `data`. Raises ValueError if it is not a header of this version."""
        if len(data) < _HEADER.size:
            raise ValueError("the directory's header is cut off")
        magic, version, state, store_id, arena_id, boot_epoch, slot_count, contents = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != VERSION:
            raise ValueError("it is not a directory of this version")
        if not slot_count or slot_count & (slot_count - 1):
            raise ValueError(f"the slot count {slot_count} is not a power of two")
        return cls(store_id, arena_id, boot_epoch, slot_count, DirectoryState(state), contents)


def layout_mark(fingerprint: bytes) -> bytes:
    """The value of a slot's `layout` field: the first 8 bytes of the layout's fingerprint."""
    return fingerprint[:8]


def tail_key(parent: bytes) -> bytes:
    """The key of the slots of partial blocks that continue the key `parent`: 32 bytes, no key of a block."""
    return hashlib.sha256(_TAILS + parent).digest()


def home_slot(key: bytes, slot_count: int) -> int:
    """The slot at which the search for a key starts."""
    return int.from_bytes(key[:8], "little") & (slot_count - 1)


def home_slots(packed_keys: NDArray[np.uint64], slot_count: int) -> NDArray[np.int64]:
    """`home_slot` for many keys, shape [keys]. `packed_keys` has the shape [keys, 4]."""
    homes: NDArray[np.int64] = (packed_keys[:, 0] & np.uint64(slot_count - 1)).astype(np.int64)
    return homes


def encode_slot(flags: int, token_count: int, layout: bytes, shard: bytes, key: bytes) -> bytes:
    """A slot without its sequence: 60 bytes."""
    covered = _COVERED.pack(flags, token_count, layout, shard, key)
    return _CRC.pack(crc32(covered)) + covered


WITHDRAWN_SLOT = encode_slot(GONE, 0, b"", b"", b"")
EMPTY_SLOT = encode_slot(0, 0, b"", b"", b"")


def seal_slots(slots: Slots) -> None:
    """Fill in the crc of each slot."""
    slots["crc"] = crcs_of(slots["covered"].tolist())


def crcs_of(covered: Sequence[bytes]) -> NDArray[np.uint32]:
    return np.fromiter(map(crc32, covered), np.uint32, len(covered))
