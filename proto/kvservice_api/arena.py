"""The shared memory of a daemon: the files in its arena's folder, byte for byte.

::

    arena         | header, a page | extents ...                    |    images of blocks (layout.py)
    generations   | header, a page | u32 a page of the arena's data |    little-endian
    writers/<id>  | header 32 | (offset u64, size u64) ...          |    one file a client that writes in place

**Generations** are the fence of whoever reads in place. An extent's generation is the word of its
first page; the daemon raises it when the extent is released, before the space is lent again. Who has
used bytes reads the word once more: another value means that they may have been others.

**Writers** hold an flock on their file for as long as they may write. The daemon notes there what it
has reserved for them, so that a daemon that starts anew leaves that space alone while the lock is held.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvservice_api.image import PAGE_BYTES, checksum

ARENA_NAME, GENERATIONS_NAME, WRITERS_NAME = "arena", "generations", "writers"

#  | "KVARENA2" | arena id 16 | store id 16 | capacity u64 | flags u64 | xxh3-64 of all before |    little-endian
_HEADER = struct.Struct("<8s16s16sQQQ")
_MAGIC = b"KVARENA2"
_HAS_GENERATIONS = 1
HEADER_BYTES = _HEADER.size
assert HEADER_BYTES == 64  # Another format needs another magic.

#  | "KVGENER1" | arena id 16 |
_GENERATIONS_HEADER = struct.Struct("<8s16s")
_GENERATIONS_MAGIC = b"KVGENER1"

#  | "KVWRITE1" | arena id 16 | zeros 8 |
_WRITER_HEADER = struct.Struct("<8s16s8x")
_WRITER_MAGIC = b"KVWRITE1"
WRITER_HEADER_BYTES = _WRITER_HEADER.size
WRITER_NOTE = struct.Struct("<QQ")  # Offset and size of an extent; a size of 0 is an empty place.
assert WRITER_HEADER_BYTES % WRITER_NOTE.size == 0  # No note lies across two pages: it is there or it is not.


class ArenaHeader(NamedTuple):
    """What the arena's first page says. `capacity_bytes` counts without that page.

    `has_generations` is set once the file of generations is there: from then on the two belong together.
    """

    arena_id: bytes
    store_id: bytes
    capacity_bytes: int
    has_generations: bool

    def encode(self) -> bytes:
        assert len(self.arena_id) == len(self.store_id) == 16
        flags = _HAS_GENERATIONS if self.has_generations else 0
        body = _HEADER.pack(_MAGIC, self.arena_id, self.store_id, self.capacity_bytes, flags, 0)[:-8]
        return body + checksum(body).to_bytes(8, "little")

    @classmethod
    def decode(cls, data: bytes) -> ArenaHeader:
        """Raises ValueError, which says in what way the bytes are no header."""
        if len(data) < HEADER_BYTES:
            raise ValueError("its header is cut off")
        magic, arena_id, store_id, capacity_bytes, flags, expected = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("it is no arena of this version")
        if checksum(data[: HEADER_BYTES - 8]) != expected or flags not in (0, _HAS_GENERATIONS):
            raise ValueError("its header is damaged")
        return cls(arena_id, store_id, capacity_bytes, bool(flags))


def generations_file_bytes(capacity_bytes: int) -> int:
    """The size of the file of generations for an arena of this capacity."""
    return PAGE_BYTES + -(-4 * (capacity_bytes // PAGE_BYTES) // PAGE_BYTES) * PAGE_BYTES


def generation_index(offset_bytes: int) -> int:
    """Which word is the generation of an extent that begins here."""
    return offset_bytes // PAGE_BYTES


def encode_generations_header(arena_id: bytes) -> bytes:
    return _GENERATIONS_HEADER.pack(_GENERATIONS_MAGIC, arena_id)


def are_generations_of(data: bytes, arena_id: bytes) -> bool:
    """Whether a file that begins with `data` has the generations of this arena."""
    return data[: _GENERATIONS_HEADER.size] == encode_generations_header(arena_id)


def encode_writer_header(arena_id: bytes) -> bytes:
    return _WRITER_HEADER.pack(_WRITER_MAGIC, arena_id)


def writer_notes(data: bytes, arena_id: bytes) -> list[tuple[int, int, int]]:
    """What is noted in a writer's file: where in it, and an extent's offset and size. Nothing of another arena."""
    if data[:WRITER_HEADER_BYTES] != encode_writer_header(arena_id):
        return []
    places = range(WRITER_HEADER_BYTES, len(data) - WRITER_NOTE.size + 1, WRITER_NOTE.size)
    notes = ((place, *WRITER_NOTE.unpack_from(data, place)) for place in places)
    return [(place, offset, size) for place, offset, size in notes if size]
