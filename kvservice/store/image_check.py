"""Cuts images into pieces of I/O, and verifies their bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent
from kvservice.tiers.base import Tier
from kvservice_api.file_parts import NO_RANGES, Ranges, sums_of, sums_of_each
from kvservice_api.image import PAGE_BYTES, BlockGeometry, Trailer, checksum
from kvservice_api.layout import Shard

_LARGE_BYTES = 1 << 20  # A drive reads more at a time hardly faster.


@dataclass(frozen=True, slots=True, eq=False)
class ImagePiece:
    """Whole layers of one image, and their pages."""

    layer_begin: int
    layer_end: int
    start: int  # Bytes from the image's start; a multiple of 4 KiB, as is the end.
    end: int
    slices: Ranges = field(default_factory=lambda: NO_RANGES)  # Of each layer, counted from `start`.


@functools.lru_cache(maxsize=1024)
def cut(geometry: BlockGeometry, piece_bytes: int, first_bytes: int = 0) -> tuple[ImagePiece, ...]:
    """The layers in order, in pieces of at least `piece_bytes`, except possibly the last.

    With `first_bytes`, the first piece is at least so large, and each next one four times as large as the one before
    it, or twice from `_LARGE_BYTES` on, up to `piece_bytes`: so the first layers do not wait for many others.
    Small slices do not start on pages, so neighbouring pieces may share a page; both carry the
    same bytes of it.
    """
    pieces = []
    begin, start = 0, 0
    wanted = min(first_bytes or piece_bytes, piece_bytes)
    for layer in range(geometry.slice_count):
        is_last = layer + 1 == geometry.slice_count
        next_start = geometry.slices[-1].end if is_last else geometry.slices[layer + 1].start
        if is_last or next_start - start >= wanted:
            pages = page_range(geometry, begin, layer + 1)
            slices = np.array([geometry.slice_range(each) for each in range(begin, layer + 1)], np.int64) - pages[0]
            pieces.append(ImagePiece(begin, layer + 1, *pages, slices))
            size = max(wanted, next_start - start)
            wanted = min(size * (4 if size < _LARGE_BYTES else 2), piece_bytes)
            begin, start = layer + 1, next_start
    return tuple(pieces)


def page_range(geometry: BlockGeometry, layer_begin: int, layer_end: int) -> tuple[int, int]:
    """The pages of layers `layer_begin` to `layer_end`."""
    start = geometry.slice_range(layer_begin)[0]
    end = geometry.slice_range(layer_end - 1)[1]
    return start // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES


def trailer_start(geometry: BlockGeometry) -> int:
    """The offset of the trailer's first page."""
    return geometry.trailer_offset // PAGE_BYTES * PAGE_BYTES


def read_trailer(image_end: memoryview, geometry: BlockGeometry, key: bytes, expected: int) -> Trailer | None:
    """The trailer at the end of `image_end`, or None if it is damaged or another block's.

    `expected` is the trailer's checksum in the index record.
    """
    data = image_end[len(image_end) - Trailer.size_bytes(geometry.slice_count) :]
    if checksum(data) != expected:
        return None
    try:
        trailer = Trailer.decode(data)
    except ValueError:
        return None
    return trailer if trailer.key == key and len(trailer.checksums) == geometry.slice_count else None


def damaged_layers(
    pages: memoryview, start: int, geometry: BlockGeometry, layers: range, checksums: NDArray[np.uint64]
) -> list[int]:
    """Which of `layers` do not match their checksums. `pages` begins at byte `start` of the image."""
    sums = sums_of(pages, np.array([geometry.slice_range(layer) for layer in layers], np.int64) - start)
    return [layers[at] for at in np.flatnonzero(sums != checksums[layers.start : layers.stop]).tolist()]


def is_damaged(pages: memoryview, piece: ImagePiece, checksums: NDArray[np.uint64]) -> bool:
    """Whether any layer of a piece does not match its checksum. `pages` begins with the piece."""
    return bool((sums_of(pages, piece.slices) != checksums[piece.layer_begin : piece.layer_end]).any())


def scratch(size_bytes: int) -> memoryview:
    """Page-aligned memory for reading without the page cache."""
    memory = np.empty(size_bytes + PAGE_BYTES, np.uint8)
    skip = -memory.ctypes.data % PAGE_BYTES
    return memory[skip : skip + size_bytes].data


class StoredImage(NamedTuple):
    """A whole image in memory, and what the block table knows of it."""

    image: memoryview
    geometry: BlockGeometry
    key: bytes
    shard: Shard
    expected: int  # The trailer's checksum.


def damages(images: Sequence[StoredImage]) -> list[str]:
    """Of each of these images, at least one, the part that does not match its checksums; empty if all match. Layers
    are counted from the model's first.
    """
    found = sums_of_each([(each.image, _ranges(each.geometry)) for each in images])
    damaged = []
    for each, sums in zip(images, found, strict=True):
        trailer = read_trailer(each.image, each.geometry, each.key, each.expected)
        if trailer is None or trailer.shard != each.shard:
            damaged.append("the trailer")
        elif (are_wrong := sums != trailer.checksums).any():
            damaged.append(f"layer {each.shard.layer_begin + int(are_wrong.argmax())}")
        else:
            damaged.append("")
    return damaged


@functools.lru_cache(maxsize=64)
def _ranges(geometry: BlockGeometry) -> Ranges:
    """All slices of an image. Do not change them."""
    return np.array([each[:2] for each in geometry.slices], np.int64)


async def damage_in(
    tier: Tier,
    extent: Extent,
    geometry: BlockGeometry,
    key: bytes,
    shard: Shard,
    expected: int,
    *,
    piece_bytes: int,
    priority: float = 0.0,
) -> str:
    """The same for a copy in a tier, which is read piece by piece. Raises StorageFailed."""
    start = trailer_start(geometry)
    trailer = await tier.read(
        extent,
        start,
        scratch(geometry.image_bytes - start),
        lambda end: read_trailer(end, geometry, key, expected),
        priority=priority,
    )
    if trailer is None or trailer.shard != shard:
        return "the trailer"
    for piece in cut(geometry, piece_bytes):
        layers = range(piece.layer_begin, piece.layer_end)
        verify = functools.partial(
            damaged_layers, start=piece.start, geometry=geometry, layers=layers, checksums=trailer.checksums
        )
        damaged = await tier.read(extent, piece.start, scratch(piece.end - piece.start), verify, priority=priority)
        if damaged:
            return f"layer {shard.layer_begin + damaged[0]}"
    return ""
