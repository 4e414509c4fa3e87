"""Blocks that are found in the SSD files without the index, by their trailers: for ``kvservice check --rebuild``.

A trailer ends on a page and says whose block it is; the descriptor in front of it says the rest (``image.py``). A
block counts only once every one of its slices matches its checksum. So one that was removed, and whose space nobody
took since, may be found, which does no harm: a key stands for its bytes for ever.

Blocks of earlier versions have no descriptor, nor have those whose image has no room for one. Their layout and token
count are those for which the checksums match; their parent is not known.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvservice.blocks import Extent, object_key
from kvservice.index.records import Records, new_records
from kvservice.store import image_check
from kvservice.store.caller import DEFAULT_TENANT
from kvservice.tiers.ssd import SsdTier
from kvservice_api.errors import InvalidRequest, StorageFailed
from kvservice_api.image import (
    DESCRIPTOR_BYTES,
    PAGE_BYTES,
    TRAILER_START,
    BlockGeometry,
    Descriptor,
    Trailer,
    block_geometry,
    checksum,
    tenant_tag,
)
from kvservice_api.layout import Layout, Shard

_READ_BYTES = 4 << 20
_PIECE_BYTES = 4 << 20
_BLOCKS_AT_ONCE = 8


@dataclass(slots=True)
class Found:
    """The blocks of the SSD files, and how many trailers led to none, by the reason."""

    keys: list[bytes]
    records: Records
    others: dict[str, int] = field(default_factory=dict)


class _Candidate(NamedTuple):
    """A trailer, and where its file has it; the file's first page counts."""

    segment: int
    end: int
    trailer: Trailer
    trailer_checksum: int
    descriptor: Descriptor | None


class _Block(NamedTuple):
    key: bytes
    extent: Extent
    layout_id: int
    token_count: int
    trailer_checksum: int
    parent_key: bytes
    stored_at_ms: int


async def find_blocks(files: Sequence[Path], tier: SsdTier, layouts: Mapping[int, Layout]) -> Found:
    """Every block whose bytes are whole. Reads the files once, and each block once more. Raises OSError."""
    blocks: list[_Block] = []
    others: dict[str, int] = {}
    for segment, path in enumerate(files):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            candidates = _candidates(fd, segment)
            while some := list(islice(candidates, _BLOCKS_AT_ONCE)):
                for block in await asyncio.gather(*(_block_of(fd, each, tier, layouts) for each in some)):
                    if isinstance(block, str):
                        others[block] = others.get(block, 0) + 1
                    else:
                        blocks.append(block)
        finally:
            os.close(fd)
    kept, differing = _one_of_each_key(_without_overlaps(blocks))
    if differing:
        others["of keys that have copies with different bytes: none of these is kept"] = differing
    kept.sort(key=lambda block: block.stored_at_ms)
    return Found([block.key for block in kept], _records(kept), others)


def _candidates(fd: int, segment: int) -> Iterator[_Candidate]:
    """Whatever looks like a trailer and ends on a page."""
    size = os.fstat(fd).st_size
    for start in range(PAGE_BYTES, size, _READ_BYTES):
        try:
            data = os.pread(fd, min(_READ_BYTES, size - start), start)
        except OSError:  # The disk cannot read a part of it.
            data = b"".join(_page_or_zeros(fd, place) for place in range(start, start + _READ_BYTES, PAGE_BYTES))
        words = np.frombuffer(data, "<u8", len(data) // 8)
        # Trailers begin on 8 bytes: their size, and that of a page, is a multiple of that.
        for word in np.flatnonzero((words & np.uint64(0xFFFF_FFFF_FFFF)) == np.uint64(TRAILER_START)).tolist():
            place = start + 8 * word
            end = place + Trailer.size_bytes(int(words[word]) >> 48)
            if end % PAGE_BYTES == 0 and end <= size and place >= PAGE_BYTES + DESCRIPTOR_BYTES:
                try:
                    before = os.pread(fd, end - place + DESCRIPTOR_BYTES, place - DESCRIPTOR_BYTES)
                    trailer = Trailer.decode(before[DESCRIPTOR_BYTES:])
                except (OSError, ValueError):
                    continue
                own = checksum(before[DESCRIPTOR_BYTES:])
                yield _Candidate(segment, end, trailer, own, _descriptor(before[:DESCRIPTOR_BYTES], own))


def _page_or_zeros(fd: int, place: int) -> bytes:
    try:
        return os.pread(fd, PAGE_BYTES, place)
    except OSError:
        return bytes(PAGE_BYTES)


def _descriptor(data: bytes, trailer_checksum: int) -> Descriptor | None:
    try:
        found = Descriptor.decode(data)
    except ValueError:
        return None
    return found if found.trailer_checksum == trailer_checksum else None


async def _block_of(fd: int, candidate: _Candidate, tier: SsdTier, layouts: Mapping[int, Layout]) -> _Block | str:
    """The block, its bytes verified, or why there is none."""
    trailer, descriptor = candidate.trailer, candidate.descriptor
    if descriptor is None:
        return await _block_without_descriptor(fd, candidate, tier, layouts)
    if descriptor.tenant != tenant_tag(DEFAULT_TENANT.name):
        return "of a tenant that is not known"
    ids = [number for number, layout in layouts.items() if layout.fingerprint == descriptor.layout_fingerprint]
    if not ids:
        return "of a layout that is not known"
    geometry = _geometry(layouts[ids[0]], trailer.shard, descriptor.token_count)
    if geometry is None:
        return "that contradict themselves"
    return await _verified(
        candidate, tier, ids[0], geometry, descriptor.token_count, descriptor.parent_key, descriptor.stored_at_ms
    )


async def _block_without_descriptor(
    fd: int, candidate: _Candidate, tier: SsdTier, layouts: Mapping[int, Layout]
) -> _Block | str:
    """Full blocks first. Layouts that would give the same bytes cannot be told from each other."""
    matching: list[tuple[int, BlockGeometry, int]] = []
    for is_full in (True, False):
        for layout_id, layout in layouts.items():
            counts = [layout.block_tokens] if is_full else range(layout.block_tokens - 1, 0, -1)
            for count in counts:
                geometry = _geometry(layout, candidate.trailer.shard, count)
                if geometry is None:
                    break
                if _first_slice_matches(fd, candidate, geometry):
                    matching.append((layout_id, geometry, count))
                    break
        if matching:
            break
    if len(matching) > 1:
        return "that fit several layouts"
    if not matching:
        return "of removed blocks, or of a layout that is not known"
    [(layout_id, geometry, count)] = matching
    return await _verified(candidate, tier, layout_id, geometry, count, bytes(32), 0)


def _geometry(layout: Layout, shard: Shard, token_count: int) -> BlockGeometry | None:
    try:
        return block_geometry(layout, shard.check(layout), token_count)
    except InvalidRequest:
        return None


def _first_slice_matches(fd: int, candidate: _Candidate, geometry: BlockGeometry) -> bool:
    start = candidate.end - geometry.image_bytes
    if start < PAGE_BYTES or geometry.slice_count != len(candidate.trailer.checksums):
        return False
    try:
        data = os.pread(fd, geometry.slice_bytes(0), start)
    except OSError:
        return False
    return checksum(data) == int(candidate.trailer.checksums[0])


async def _verified(
    candidate: _Candidate,
    tier: SsdTier,
    layout_id: int,
    geometry: BlockGeometry,
    token_count: int,
    parent_key: bytes,
    stored_at_ms: int,
) -> _Block | str:
    trailer, start = candidate.trailer, candidate.end - geometry.image_bytes
    if start < PAGE_BYTES or geometry.slice_count != len(trailer.checksums):
        return "that contradict themselves"
    extent = Extent(candidate.segment, start - PAGE_BYTES, geometry.image_bytes)
    try:
        damage = await image_check.damage_in(
            tier,
            extent,
            geometry,
            trailer.key,
            trailer.shard,
            candidate.trailer_checksum,
            piece_bytes=_PIECE_BYTES,
        )
    except StorageFailed:
        return "that cannot be read"
    if damage:
        return "of blocks that are damaged, or were partly overwritten"
    key = object_key(trailer.key, trailer.shard)
    return _Block(key, extent, layout_id, token_count, candidate.trailer_checksum, parent_key, stored_at_ms)


def _without_overlaps(blocks: Sequence[_Block]) -> list[_Block]:
    """Of blocks with the same bytes on disk the one that ends last.

    A client may save bytes that look like a block: their trailer then lies inside the block that has them. No time
    that a descriptor states decides, since the client would have chosen that too.
    """
    kept: list[_Block] = []
    for block in sorted(blocks, key=_end, reverse=True):
        last = kept[-1].extent if kept else None
        if last is None or last.segment != block.extent.segment or _end(block)[1] <= last.offset_bytes:
            kept.append(block)
    return kept


def _end(block: _Block) -> tuple[int, int]:
    return block.extent.segment, block.extent.offset_bytes + block.extent.size_bytes


def _one_of_each_key(blocks: Sequence[_Block]) -> tuple[list[_Block], int]:
    """One copy of each key; none where copies differ, and how many those are: nothing says which is right."""
    copies: dict[bytes, list[_Block]] = {}
    for block in blocks:
        copies.setdefault(block.key, []).append(block)
    kept: list[_Block] = []
    differing = 0
    for same in copies.values():
        if len({(each.layout_id, each.token_count, each.trailer_checksum) for each in same}) == 1:
            kept.append(same[0])
        else:
            differing += len(same)
    return kept, differing


def _records(blocks: Sequence[_Block]) -> Records:
    records = new_records(len(blocks))
    for row, block in enumerate(blocks):
        record = records[row]
        record["segment"], record["offset_bytes"], record["size_bytes"] = block.extent
        record["layout_id"], record["token_count"] = block.layout_id, block.token_count
        record["trailer_checksum"] = block.trailer_checksum
        record["stored_at_ms"] = record["used_at_ms"] = block.stored_at_ms
        record["access_seq"] = row + 1
        record["tenant"] = DEFAULT_TENANT.number
    if len(blocks):
        records["parent_key"] = np.frombuffer(b"".join(block.parent_key for block in blocks), "V32")
    return records
