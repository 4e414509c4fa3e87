"""Where the bytes of a stored block lie, and the checksums beside them.

A block is stored layer-major. One layer of it is a *slice*: ``[K, V][kv head][token][dim]``, so a
range of heads is one run of bytes in K and one in V. The stored form of a block is its *image*::

    | slice 0 | slice 1 | ... | slice n-1 |  free  | descriptor | trailer |      whole image: a multiple of 4 KiB

Slices of 64 KiB or more start and end on pages of 4 KiB that no other slice has; smaller ones follow
one another without a gap. The trailer is the image's last bytes and holds one xxh3-64
per slice; see ``Trailer``. Where there is room in front of it, there is a ``Descriptor``: what the index knows of
the block, for when the index is lost. It takes no space of its own, so images with and without one are alike.
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
    """Where one slice lies in an image, and which heads it has. Sizes in bytes."""

    start: int
    end: int
    k_bytes: int  # The keys; the values follow.
    head_begin: int  # The layer's own KV heads, a half-open range.
    head_end: int

    def head_runs(self, begin: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the heads `begin` to `end` lie in the slice: start and end of their keys, and of their values."""
        heads, v_bytes = self.head_end - self.head_begin, self.end - self.start - self.k_bytes
        k_head, v_head = self.k_bytes // heads, v_bytes // heads
        first, last = begin - self.head_begin, end - self.head_begin
        keys = (first * k_head, last * k_head)
        return keys, (self.k_bytes + first * v_head, self.k_bytes + last * v_head)


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """Where the bytes of one stored object lie in its image. Sizes in bytes; layers count from the shard's first."""

    slices: tuple[SliceGeometry, ...]
    image_bytes: int  # The whole, trailer included; a multiple of 4 KiB.
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
        """Whether a 4 KiB page of the slice carries bytes of another slice too."""
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
    """For each layer of the shard, where each block's slice starts in that layer's bytes, block after block.

    Each list ends with the layer's size in bytes. Layers of one size share a list: do not change it.
    """
    tokens = list(accumulate(token_counts, initial=0))
    of_size: dict[int, list[int]] = {}
    starts: list[list[int]] = []
    for layer in range(shard.layer_begin, shard.layer_end):
        per_token = layout.shard_slice_bytes(shard, layer, 1)
        if per_token not in of_size:
            of_size[per_token] = [count * per_token for count in tokens]
        starts.append(of_size[per_token])
    return starts


#  | "KVTR" | version u16 | slices u16 | block key 32 | shard 8 | slices x xxh3-64 |      little-endian
_TRAILER_HEAD = struct.Struct("<4sHH32s8s")
_TRAILER_MAGIC = b"KVTR"
_TRAILER_VERSION = 1
assert _TRAILER_HEAD.size == 48  # On-disk format: another size needs another version.
TRAILER_START = int.from_bytes(_TRAILER_MAGIC + _TRAILER_VERSION.to_bytes(2, "little"), "little")  # 6 bytes.


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


#  | "KVBD" | version u16 | 0 u16 | tokens u32 | 0 u32 | parent key 32 | layout fingerprint 32 | tenant 16 |
#  | stored at, ms u64 | trailer's xxh3-64 | tag 8 |      little-endian
_DESCRIPTOR = struct.Struct("<4sH2xI4x32s32s16sQQ")
_DESCRIPTOR_MAGIC = b"KVBD"
_DESCRIPTOR_VERSION = 1
_TAG_BYTES = 8
_TAG_PURPOSE = b"kvservice/block"  # So that no other use of the secret ever gives the same bytes.
DESCRIPTOR_BYTES = _DESCRIPTOR.size + _TAG_BYTES
assert DESCRIPTOR_BYTES == 120  # On-disk format: another size needs another version.


class TagMismatch(ValueError):
    """A descriptor is whole, and its tag is not the one that the store's secret gives."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What stands in front of a trailer: enough to make the block's index record again.

    It names its trailer by the trailer's checksum, so one that was left by an earlier block is told from it. Its tag
    says that a daemon of the store wrote both: a BLAKE2b-64 over the descriptor's other bytes and the whole trailer,
    with the store's secret as the key. Eight bytes are enough: a client can find out only with a forged image, a lost
    index and an operator's rebuild whether it has guessed a tag. A disk of 1 TiB has room for 2^28 such guesses, so
    all of them together are right with a probability of 2^-36. Tags of a client's own blocks tell nothing of others.

    The slices are not under the tag but their checksums are, which the trailer has.
    """

    token_count: int
    parent_key: bytes
    layout_fingerprint: bytes
    tenant: bytes  # `tenant_tag` of its name.
    stored_at_ms: int
    trailer_checksum: int

    def encode(self, trailer: bytes, secret: bytes) -> bytes:
        """`trailer` is the block's, encoded; `secret` the store's, 32 bytes."""
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
        """Raises ValueError where `data` is no descriptor of this trailer; TagMismatch where only the tag differs."""
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
            raise TagMismatch("a descriptor whose tag the secret does not give")
        return found


def _tag(data: bytes, secret: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_TAG_BYTES, key=secret, person=_TAG_PURPOSE).digest()


def descriptor_offset(geometry: BlockGeometry) -> int | None:
    """Where an image has its descriptor; None where there is no room between the last slice and the trailer."""
    offset = geometry.trailer_offset - DESCRIPTOR_BYTES
    return offset if offset >= geometry.slices[-1].end else None


@functools.cache
def tenant_tag(name: str) -> bytes:
    """A tenant's 16 bytes in a descriptor."""
    return hashlib.sha256(name.encode()).digest()[:16]


def checksum(data: bytes | memoryview) -> int:
    """xxh3-64 with seed 0. Releases the GIL for large data."""
    return xxhash.xxh3_64_intdigest(data)


def _aligned(size_bytes: int) -> int:
    return (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
