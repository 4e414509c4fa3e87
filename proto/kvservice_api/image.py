"""The stored form of a block: the places of its bytes, and its checksums.

A block is stored layer-major. One layer of it is a *slice*: ``[K, V][kv head][token][dim]``, so a
range of heads is one run of bytes in K and one in V. The stored form of a block is its *image*::

    | slice 0 | slice 1 | ... | slice n-1 |  free  | descriptor | trailer |      whole image: a multiple of 4 KiB

Slices of 64 KiB or more share no 4 KiB page with another slice; smaller slices follow each other
without a gap. The trailer is the last part of the image and has one xxh3-64 per slice; see ``Trailer``. If the free
space before the trailer is large enough, it has a ``Descriptor``: what the index knows of the block, in case the index
is lost. A descriptor does not change the size of an image.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import Layout, Shard

PAGE_BYTES = 4096
_ALIGNED_SLICE_BYTES = 64 * 1024


class SliceGeometry(NamedTuple):
    """The place of one slice in an image, and its heads. Sizes in bytes."""

    start: int
    end: int
    k_bytes: int  # Size of the keys; the values follow them.
    head_begin: int  # Half-open range of the layer's own KV heads.
    head_end: int

    def head_runs(self, begin: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(start, end) of the keys of the heads `begin` to `end` in the slice, and (start, end) of their values."""
        heads, v_bytes = self.head_end - self.head_begin, self.end - self.start - self.k_bytes
        k_head, v_head = self.k_bytes // heads, v_bytes // heads
        first, last = begin - self.head_begin, end - self.head_begin
        keys = (first * k_head, last * k_head)
        return keys, (self.k_bytes + first * v_head, self.k_bytes + last * v_head)


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """The places of one stored object's bytes in its image. Sizes in bytes; layers count from the shard's first."""

    slices: tuple[SliceGeometry, ...]
    image_bytes: int  # The whole image with its trailer; a multiple of 4 KiB.
    trailer_offset: int

    @property
    def slice_count(self) -> int:
        return len(self.slices)

    @property
    def payload_bytes(self) -> int:
        return sum(each.end - each.start for each in self.slices)

    @property
    def slice_bytes_max(self) -> int:
        return max(each.end - each.start for each in self.slices)

    def slice_bytes(self, layer: int) -> int:
        start, end = self.slice_range(layer)
        return end - start

    def slice_range(self, layer: int) -> tuple[int, int]:
        """Start and end of a layer's slice."""
        return self.slices[layer][:2]

    def shares_pages(self, layer: int) -> bool:
        """Whether a 4 KiB page of the slice also has bytes of another slice."""
        start, end = self.slice_range(layer)
        is_last = layer + 1 == len(self.slices)
        return start % PAGE_BYTES != 0 or not (is_last or self.slices[layer + 1].start >= _aligned(end))


@functools.lru_cache(maxsize=4096)
def block_geometry(layout: Layout, shard: Shard, token_count: int) -> BlockGeometry:
    """The geometry of a block of `token_count` tokens, stored for `shard`."""
    if not 1 <= token_count <= layout.block_tokens:
        raise InvalidRequest(f"a block has 1..{layout.block_tokens} tokens, not {token_count}", field="token_count")
    slices: list[SliceGeometry] = []
    end, is_aligned = 0, False
    for layer in range(shard.layer_begin, shard.layer_end):
        group, (head_begin, head_end) = layout.group_of(layer), layout.heads_of(shard, layer)
        size = group.slice_bytes(head_end - head_begin, token_count)
        was_aligned, is_aligned = is_aligned, size >= _ALIGNED_SLICE_BYTES
        start = _aligned(end) if is_aligned or was_aligned else end
        end = start + size
        k_bytes = (head_end - head_begin) * token_count * group.k_head_dim * group.dtype_bytes
        slices.append(SliceGeometry(start, end, k_bytes, head_begin, head_end))
    trailer_bytes = Trailer.size_bytes(shard.layers)
    image_bytes = _aligned(end + trailer_bytes)
    return BlockGeometry(tuple(slices), image_bytes, image_bytes - trailer_bytes)


def layer_starts(layout: Layout, shard: Shard, token_counts: Sequence[int]) -> list[list[int]]:
    """Per layer of the shard: the offset of each block's slice in the concatenation of that layer's slices.

    Each list ends with the layer's total size in bytes. Layers of equal size share one list: do not change it.
    """
    tokens = list(accumulate(token_counts, initial=0))
    of_size: dict[int, list[int]] = {}
    starts: list[list[int]] = []
    for per_token in _token_bytes(layout, shard):
        if per_token not in of_size:
            of_size[per_token] = [count * per_token for count in tokens]
        starts.append(of_size[per_token])
    return starts


@functools.lru_cache(maxsize=256)
def _token_bytes(layout: Layout, shard: Shard) -> tuple[int, ...]:
    """Bytes of one token in each layer of the shard."""
    return tuple(layout.shard_slice_bytes(shard, layer, 1) for layer in range(shard.layer_begin, shard.layer_end))


#  | "KVTR" | version u16 | slices u16 | block key 32 | shard 8 | slices x xxh3-64 |      little-endian
_TRAILER_HEAD = struct.Struct("<4sHH32s8s")
_TRAILER_MAGIC = b"KVTR"
_TRAILER_VERSION = 1
_KEY = slice(8, 40)  # In the head.
assert _TRAILER_HEAD.size == 48  # On-disk format: another size needs another version.
TRAILER_START = int.from_bytes(_TRAILER_MAGIC + _TRAILER_VERSION.to_bytes(2, "little"), "little")  # 6 bytes.


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last part of an image: the block's key and shard, and the xxh3-64 of each slice, shape [slices].

    The index record has the xxh3-64 of the trailer itself. Trust a trailer only if it matches.
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
        """Parse `data`. Raises ValueError if it is not a trailer. Does not verify the trailer's own checksum."""
        if len(data) < _TRAILER_HEAD.size:
            raise ValueError("too short for a trailer")
        magic, version, count, key, shard = _TRAILER_HEAD.unpack_from(data)
        if magic != _TRAILER_MAGIC or version != _TRAILER_VERSION or len(data) != cls.size_bytes(count):
            raise ValueError("not a trailer of this version")
        return cls(key, Shard.decode(shard), np.frombuffer(data, "<u8", count, _TRAILER_HEAD.size).astype(np.uint64))


def checksums_of_trailers(trailers: NDArray[np.uint8], shard: Shard) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The slices' checksums, shape [block, slice], of trailers of one size, shape [block, byte]; and which of them are
    trailers of blocks that were stored for `shard`. As `Trailer.decode`, for many at once.
    """
    head = _TRAILER_HEAD.pack(_TRAILER_MAGIC, _TRAILER_VERSION, shard.layers, bytes(32), shard.encode())
    given, before, after = np.frombuffer(head, np.uint8), slice(0, _KEY.start), slice(_KEY.stop, len(head))
    are_right = (trailers[:, before] == given[before]).all(1) & (trailers[:, after] == given[after]).all(1)
    sums = np.ascontiguousarray(trailers[:, len(head) :]).view("<u8").astype(np.uint64, copy=False)
    return sums, are_right


#  | "KVBD" | version u16 | 0 u16 | tokens u32 | 0 u32 | parent key 32 | layout fingerprint 32 | tenant 16 |
#  | stored at, ms u64 | trailer's xxh3-64 | tag 8 |      little-endian
_DESCRIPTOR = struct.Struct("<4sH2xI4x32s32s16sQQ")
_DESCRIPTOR_MAGIC = b"KVBD"
_DESCRIPTOR_VERSION = 1
_TAG_BYTES = 8
_TAG_PURPOSE = b"kvservice/block"  # Separates this use of the secret from any other use.
DESCRIPTOR_BYTES = _DESCRIPTOR.size + _TAG_BYTES
assert DESCRIPTOR_BYTES == 120  # On-disk format: another size needs another version.


class TagMismatch(ValueError):
    """A descriptor is complete, but its tag does not match the store's secret."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The part before a trailer: enough to create the block's index record again.

    It contains the trailer's checksum, so that a descriptor of an earlier block at the same place does not match. Its
    tag proves that a daemon of the store wrote both: a BLAKE2b-64 over the descriptor's other bytes and the whole
    trailer, with the store's secret as the key. Eight bytes are enough. To test a guessed tag, a client needs a forged
    image, a lost index and an operator's rebuild. A disk of 1 TiB has space for 2^28 such guesses, so the probability
    that any of them is right is 2^-36. The tags of a client's own blocks do not help to guess others.

    The tag covers the checksums of the slices, which are in the trailer, not the slices themselves.
    """

    token_count: int
    parent_key: bytes
    layout_fingerprint: bytes
    tenant: bytes  # `tenant_tag` of its name.
    stored_at_ms: int
    trailer_checksum: int

    def encode(self, trailer: bytes, secret: bytes) -> bytes:
        """120 bytes. `trailer` is the block's encoded trailer, `secret` the store's secret of 32 bytes."""
        body = _DESCRIPTOR.pack(
            _DESCRIPTOR_MAGIC,
            _DESCRIPTOR_VERSION,
            self.token_count,
            self.parent_key,
            self.layout_fingerprint,
            self.tenant,
            self.stored_at_ms,
            self.trailer_checksum,
        )
        return body + _tag(body + trailer, secret)

    @classmethod
    def decode(cls, data: bytes, trailer: bytes, secret: bytes) -> Descriptor:
        """Parse and verify. Raises ValueError if `data` is no descriptor of `trailer`, TagMismatch for a wrong tag."""
        if len(data) != DESCRIPTOR_BYTES:
            raise ValueError(f"a descriptor has {DESCRIPTOR_BYTES} bytes, not {len(data)}")
        body, tag = data[:-_TAG_BYTES], data[-_TAG_BYTES:]
        magic, version, *fields = _DESCRIPTOR.unpack(body)
        if magic != _DESCRIPTOR_MAGIC or version != _DESCRIPTOR_VERSION:
            raise ValueError("not a descriptor of this version")
        found = cls(*fields)
        if found.trailer_checksum != checksum(trailer):
            raise ValueError("a descriptor of another trailer")
        if not hmac.compare_digest(tag, _tag(body + trailer, secret)):
            raise TagMismatch("a descriptor whose tag does not match the store's secret")
        return found


def _tag(data: bytes, secret: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_TAG_BYTES, key=secret, person=_TAG_PURPOSE).digest()


def descriptor_offset(geometry: BlockGeometry) -> int | None:
    """The offset of an image's descriptor, or None if the space between last slice and trailer is too small."""
    offset = geometry.trailer_offset - DESCRIPTOR_BYTES
    return offset if offset >= geometry.slices[-1].end else None


@functools.cache
def tenant_tag(name: str) -> bytes:
    """The 16 bytes that identify a tenant in a descriptor."""
    return hashlib.sha256(name.encode()).digest()[:16]


def checksum(data: bytes | memoryview) -> int:
    """xxh3-64 with seed 0. Releases the GIL for large data."""
    return xxhash.xxh3_64_intdigest(data)


def _aligned(size_bytes: int) -> int:
    return (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
