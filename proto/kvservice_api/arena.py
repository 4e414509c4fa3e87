"""The shared memory of a daemon: the files in its arena's folder, byte for byte.

::

    arena         | header, a page | extents ...                    |    images of blocks (layout.py)
    generations   | header, a page | one u32 per page of the arena's data |    little-endian
    writers/<id>  | header 32 | (offset u64, size u64) ...          |    one file per client that writes in place

**Generations** are the fence for clients that read in place. An extent's generation is the word of its
first page. The daemon increments it when it releases the extent, before it reuses the space. After a
client has used the bytes, it reads the word again: another value means that the bytes may have been replaced.

**Writers** hold an flock on their file while they may write. The daemon notes the reserved extents in
that file, so that a restarted daemon does not use the space while the lock is held.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvservice_api.image import PAGE_BYTES, checksum

ARENA_NAME, GENERATIONS_NAME, WRITERS_NAME = "arena", "generations", "writers"

#  | "KVARENA2" | arena id 16 | store id 16 | capacity u64 | flags u64 | xxh3-64 of the fields before |    little-endian
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
WRITER_NOTE = struct.Struct("<QQ")  # Offset and size of an extent; a size of 0 marks an unused note.
assert WRITER_HEADER_BYTES % WRITER_NOTE.size == 0  # No note crosses a page boundary: it is written whole or not.


class ArenaHeader(NamedTuple):
    """The arena's first page. `capacity_bytes` does not include that page.

    The daemon sets `has_generations` once the file of generations exists. From then on the arena needs it.
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
        """Parse the first `HEADER_BYTES` of `data`. Raises ValueError with the reason if they are no header."""
        if len(data) < HEADER_BYTES:
            raise ValueError("its header is cut off")
        magic, arena_id, store_id, capacity_bytes, flags, expected = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("it is not an arena of this version")
        if checksum(data[: HEADER_BYTES - 8]) != expected or flags not in (0, _HAS_GENERATIONS):
            raise ValueError("its header is damaged")
        return cls(arena_id, store_id, capacity_bytes, bool(flags))


def generations_file_bytes(capacity_bytes: int) -> int:
    """The size of the file of generations for an arena of this capacity."""
    return PAGE_BYTES + -(-4 * (capacity_bytes // PAGE_BYTES) // PAGE_BYTES) * PAGE_BYTES


def generation_index(offset_bytes: int) -> int:
    """The index of the generation word of an extent that begins at `offset_bytes`."""
    return offset_bytes // PAGE_BYTES


def encode_generations_header(arena_id: bytes) -> bytes:
    return _GENERATIONS_HEADER.pack(_GENERATIONS_MAGIC, arena_id)


def are_generations_of(data: bytes, arena_id: bytes) -> bool:
    """Whether `data` is the start of this arena's file of generations."""
    return data[: _GENERATIONS_HEADER.size] == encode_generations_header(arena_id)


def encode_writer_header(arena_id: bytes) -> bytes:
    return _WRITER_HEADER.pack(_WRITER_MAGIC, arena_id)


def writer_notes(data: bytes, arena_id: bytes) -> list[tuple[int, int, int]]:
    """The notes in a writer's file: (place in the file, extent offset, extent size), all in bytes.

    Empty for a file of another arena.
    """
    if data[:WRITER_HEADER_BYTES] != encode_writer_header(arena_id):
        return []
    places = range(WRITER_HEADER_BYTES, len(data) - WRITER_NOTE.size + 1, WRITER_NOTE.size)
    notes = ((place, *WRITER_NOTE.unpack_from(data, place)) for place in places)
    return [(place, offset, size) for place, offset, size in notes if size]
