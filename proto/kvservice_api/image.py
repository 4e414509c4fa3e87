"""Where the bytes of a stored block lie, and the checksums beside them.

A block is stored layer-major. One layer of it is a *slice*: ``[K, V][kv head][token][dim]``, so a
range of heads is one run of bytes in K and one in V. The stored form of a block is its *image*::

    | slice 0 | slice 1 | ... | slice n-1 |  zeros  | trailer |      whole image: a multiple of 4 KiB

Slices of 64 KiB or more start on 4 KiB; smaller ones follow one another without a gap. The trailer
is the image's last bytes and holds one xxh3-64 per slice; see ``Trailer``.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import Layout, Shard

PAGE_BYTES = 4096
_ALIGNED_SLICE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """Where the bytes of one stored object lie in its image. Sizes in bytes."""

    slice_count: int
    slice_bytes: int  # Payload of one slice.
    slice_stride: int  # From one slice's start to the next one's.
    k_bytes: int  # Of a slice, the keys; the values follow.
    image_bytes: int  # The whole, trailer included; a multiple of 4 KiB.
    trailer_offset: int

    @property
    def payload_bytes(self) -> int:
        return self.slice_count * self.slice_bytes

    def slice_range(self, layer: int) -> tuple[int, int]:
        """Start and end of a layer's slice; layers count from the shard's first."""
        start = layer * self.slice_stride
        return start, start + self.slice_bytes


@functools.lru_cache(maxsize=4096)
def block_geometry(layout: Layout, shard: Shard, token_count: int) -> BlockGeometry:
    """The geometry of a block of `token_count` tokens, stored for `shard`."""
    if not 1 <= token_count <= layout.block_tokens:
        raise InvalidRequest(f"a block has 1..{layout.block_tokens} tokens, not {token_count}", field="token_count")
    slice_bytes = layout.slice_bytes(shard.heads, token_count)
    stride = _aligned(slice_bytes) if slice_bytes >= _ALIGNED_SLICE_BYTES else slice_bytes
    end = (shard.layers - 1) * stride + slice_bytes
    trailer_bytes = Trailer.size_bytes(shard.layers)
    image_bytes = _aligned(end + trailer_bytes)
    return BlockGeometry(
        slice_count=shard.layers,
        slice_bytes=slice_bytes,
        slice_stride=stride,
        k_bytes=shard.heads * token_count * layout.k_head_dim * layout.dtype_bytes,
        image_bytes=image_bytes,
        trailer_offset=image_bytes - trailer_bytes,
    )


#  | "KVTR" | version u16 | slices u16 | block key 32 | shard 8 | slices x xxh3-64 |      little-endian
_TRAILER_HEAD = struct.Struct("<4sHH32s8s")
_TRAILER_MAGIC = b"KVTR"
_TRAILER_VERSION = 1
assert _TRAILER_HEAD.size == 48  # On-disk format: another size needs another version.


@dataclass(frozen=True, slots=True)
class Trailer:
    """What stands behind a block's slices: whose they are, and the xxh3-64 of each.

    The trailer's own xxh3-64 stands in the index record, so a trailer can be trusted once it matches.
    """

    key: bytes
    shard: Shard
    checksums: NDArray[np.uint64]

    @staticmethod
    def size_bytes(slice_count: int) -> int:
        return _TRAILER_HEAD.size + 8 * slice_count

    def encode(self) -> bytes:
        assert len(self.checksums) == self.shard.layers
        head = _TRAILER_HEAD.pack(_TRAILER_MAGIC, _TRAILER_VERSION, len(self.checksums), self.key, self.shard.encode())
        return head + self.checksums.astype("<u8").tobytes()

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Trailer:
        """Raises ValueError where the bytes are no trailer. Compare its checksum before trusting it."""
        if len(data) < _TRAILER_HEAD.size:
            raise ValueError("too short for a trailer")
        magic, version, count, key, shard = _TRAILER_HEAD.unpack_from(data)
        if magic != _TRAILER_MAGIC or version != _TRAILER_VERSION or len(data) != cls.size_bytes(count):
            raise ValueError("not a trailer of this version")
        return cls(key, Shard.decode(shard), np.frombuffer(data, "<u8", count, _TRAILER_HEAD.size).astype(np.uint64))


def checksum(data: bytes | memoryview) -> int:
    """xxh3-64 with seed 0. Releases the GIL for large data."""
    return xxhash.xxh3_64_intdigest(data)


def _aligned(size_bytes: int) -> int:
    return (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
