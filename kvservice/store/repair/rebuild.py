"""Finds blocks in the SSD files without the index, by their trailers: for ``kvservice check --rebuild``.

A trailer ends at a page boundary and has the block's key; the descriptor before it has the rest (``image.py``). A block
is accepted only if each of its slices matches its checksum. The search may find a removed block whose space was not
reused. This is harmless, because the bytes of a key never change.

A client chooses the bytes that it saves, and may save a whole image with descriptor and trailer. So a descriptor is
accepted only with a tag of the store's secret. A trailer without such a descriptor is accepted if the image has no
space for one, and in a store with blocks from before descriptors existed. Layout and token count are then those for
which the checksums match, and the parent is not known.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvservice.blocks import Extent, object_key
from kvservice.clock import Clock
from kvservice.index.descriptor_secret import DescriptorSecret
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
    TagMismatch,
    Trailer,
    block_geometry,
    checksum,
    descriptor_offset,
    tenant_tag,
)
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Layout, Shard

_READ_BYTES = 4 << 20
_PIECE_BYTES = 4 << 20
_BLOCKS_AT_ONCE = 8


@dataclass(slots=True)
class SearchResult:
    """The blocks of the SSD files, and the number of trailers without a block, per reason."""

    keys: list[bytes]
    records: Records
    others: dict[str, int] = field(default_factory=dict)
    with_other_tag: int = 0  # Blocks that were found without their descriptors, whose tags are not this store's.


class Progress:
    """Reports the progress of a long check: at most one line per `every_s` seconds."""

    def __init__(self, clock: Clock, say: Callable[[str], None], *, every_s: float = 5.0) -> None:
        """`say` is called with each line, without a line break."""
        self._clock = clock
        self._say = say
        self._every_s = every_s
        self._next_s = clock.monotonic_s() + every_s

    def note(self, line: Callable[[], str]) -> None:
        """Report `line()`, if `every_s` has passed."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._say(line())


class _Candidate(NamedTuple):
    """A trailer, and its offset in the file, with the file's first page."""

    segment: int
    end: int
    trailer: Trailer
    trailer_checksum: int
    descriptor: Descriptor | None
    has_other_tag: bool  # There is a descriptor, but its tag is not this store's.


class _Block(NamedTuple):
    key: bytes
    extent: Extent
    layout_id: int
    token_count: int
    trailer_checksum: int
    parent_key: bytes
    stored_at_ms: int
    is_tagged: bool = False  # Tagged by this store.


class Search:
    """One search for blocks in the SSD files of a store. It blocks the event loop while it reads the files."""

    def __init__(
        self, tier: SsdTier, layouts: Mapping[int, Layout], secret: DescriptorSecret, progress: Progress | None = None
    ) -> None:
        """`tier` has the same files open. `layouts`, by id, are those whose blocks are searched."""
        self._tier = tier
        self._layouts = layouts
        self._secret = secret
        self._progress = progress
        self._read_bytes = self._total_bytes = 0
        self._blocks: list[_Block] = []
        self._others: Counter[str] = Counter()
        self._with_other_tag = 0

    async def run(self, files: Sequence[Path | None]) -> SearchResult:
        """Every block with correct bytes, in the files by number. Reads them once, and each block once more. Raises
        OSError.
        """
        there = [(number, path) for number, path in enumerate(files) if path is not None]
        self._total_bytes = sum(path.stat().st_size for _, path in there)
        for segment, path in there:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                candidates = self._candidates(fd, segment)
                while some := list(islice(candidates, _BLOCKS_AT_ONCE)):
                    found = await asyncio.gather(*(self._block_of(fd, each) for each in some))
                    for candidate, block in zip(some, found, strict=True):
                        if isinstance(block, str):
                            self._others[block] += 1
                        else:
                            self._blocks.append(block)
                            self._with_other_tag += candidate.has_other_tag
                    self._note_progress()
            finally:
                os.close(fd)
        sure = _without_doubtful(_without_overlaps(self._blocks))
        kept, differing = _one_of_each_key(sure)
        if differing:
            self._others["of keys that have copies with different bytes: none of these is kept"] = differing
        kept.sort(key=lambda block: block.stored_at_ms)
        return SearchResult([block.key for block in kept], _records(kept), self._others, self._with_other_tag)

    def _note_progress(self) -> None:
        if self._progress is not None:
            self._progress.note(
                lambda: (
                    f"{self._read_bytes / 2**20:,.0f} of {self._total_bytes / 2**20:,.0f} MiB of the SSD files read, "
                    f"{len(self._blocks)} blocks found, {self._others.total()} trailers without a block"
                )
            )

    def _candidates(self, fd: int, segment: int) -> Iterator[_Candidate]:
        """All bytes that look like a trailer and end at a page boundary, in the order of the file."""
        size = os.fstat(fd).st_size
        self._read_bytes += min(PAGE_BYTES, size)
        for start in range(PAGE_BYTES, size, _READ_BYTES):
            try:
                data = os.pread(fd, min(_READ_BYTES, size - start), start)
            except OSError:  # The disk cannot read a part of the file.
                data = b"".join(_page_or_zeros(fd, place) for place in range(start, start + _READ_BYTES, PAGE_BYTES))
            self._read_bytes += len(data)
            self._note_progress()
            words = np.frombuffer(data, "<u8", len(data) // 8)
            # Trailers begin on 8 bytes: their size, and that of a page, is a multiple of that.
            for word in np.flatnonzero((words & np.uint64(0xFFFF_FFFF_FFFF)) == np.uint64(TRAILER_START)).tolist():
                place = start + 8 * word
                end = place + Trailer.size_bytes(int(words[word]) >> 48)
                if end % PAGE_BYTES == 0 and end <= size and place >= PAGE_BYTES + DESCRIPTOR_BYTES:
                    try:
                        before = os.pread(fd, end - place + DESCRIPTOR_BYTES, place - DESCRIPTOR_BYTES)
                        yield self._candidate(segment, end, before[:DESCRIPTOR_BYTES], before[DESCRIPTOR_BYTES:])
                    except (OSError, ValueError):
                        continue

    def _candidate(self, segment: int, end: int, before: bytes, encoded: bytes) -> _Candidate:
        """`before` are the bytes at the place of a descriptor. Raises ValueError if `encoded` is not a trailer."""
        trailer = Trailer.decode(encoded)
        descriptor, has_other_tag = None, False
        try:
            descriptor = Descriptor.decode(before, encoded, self._secret.key)
        except TagMismatch:
            has_other_tag = True
        except ValueError:
            pass
        return _Candidate(segment, end, trailer, checksum(encoded), descriptor, has_other_tag)

    async def _block_of(self, fd: int, candidate: _Candidate) -> _Block | str:
        """The block, with verified bytes, or why there is none."""
        trailer, descriptor = candidate.trailer, candidate.descriptor
        if descriptor is None:
            return await self._block_without_descriptor(fd, candidate)
        if descriptor.tenant != tenant_tag(DEFAULT_TENANT.name):
            return "of a tenant that is not known"
        fingerprint = descriptor.layout_fingerprint
        ids = [number for number, layout in self._layouts.items() if layout.fingerprint == fingerprint]
        if not ids:
            return "of a layout that is not known"
        geometry = _geometry(self._layouts[ids[0]], trailer.shard, descriptor.token_count)
        if geometry is None:
            return "that contradict themselves"
        return await self._verified(
            candidate, ids[0], geometry, descriptor.token_count, descriptor.parent_key, descriptor.stored_at_ms
        )

    async def _block_without_descriptor(self, fd: int, candidate: _Candidate) -> _Block | str:
        """Full blocks first. Two layouts with the same bytes cannot be distinguished."""
        matching: list[tuple[int, BlockGeometry, int]] = []
        for is_full in (True, False):
            for layout_id, layout in self._layouts.items():
                counts = [layout.block_tokens] if is_full else range(layout.block_tokens - 1, 0, -1)
                for count in counts:
                    self._note_progress()
                    geometry = _geometry(layout, candidate.trailer.shard, count)
                    if geometry is None:
                        break
                    if self._may_lack_descriptor(geometry) and _first_slice_matches(fd, candidate, geometry):
                        matching.append((layout_id, geometry, count))
                        break
            if matching:
                break
        if len(matching) > 1:
            return "that fit several layouts"
        if not matching and candidate.has_other_tag:
            return "with a tag that this store's secret does not give"
        if not matching and self._secret.every_block:
            return "without a descriptor that this store wrote"
        if not matching:
            return "of removed blocks, or of a layout that is not known"
        [(layout_id, geometry, count)] = matching
        return await self._verified(candidate, layout_id, geometry, count, bytes(32), 0)

    def _may_lack_descriptor(self, geometry: BlockGeometry) -> bool:
        return not self._secret.every_block or descriptor_offset(geometry) is None

    async def _verified(
        self,
        candidate: _Candidate,
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
        own = candidate.trailer_checksum
        try:
            damage = await image_check.damage_in(
                self._tier, extent, geometry, trailer.key, trailer.shard, own, piece_bytes=_PIECE_BYTES
            )
        except StorageFailed:
            return "that cannot be read"
        if damage:
            return "of blocks that are damaged, or were partly overwritten"
        key = object_key(trailer.key, trailer.shard)
        is_tagged = candidate.descriptor is not None
        return _Block(key, extent, layout_id, token_count, own, parent_key, stored_at_ms, is_tagged)


def _page_or_zeros(fd: int, place: int) -> bytes:
    try:
        return os.pread(fd, PAGE_BYTES, place)
    except OSError:
        return bytes(PAGE_BYTES)


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


def _without_overlaps(blocks: Sequence[_Block]) -> list[_Block]:
    """Of blocks that overlap on disk, the one that ends last.

    A client may save bytes that look like a block: their trailer is then inside the client's block. The time in a
    descriptor cannot decide, because the client would have chosen that too.
    """
    kept: list[_Block] = []
    for block in sorted(blocks, key=_end, reverse=True):
        last = kept[-1].extent if kept else None
        if last is None or last.segment != block.extent.segment or _end(block)[1] <= last.offset_bytes:
            kept.append(block)
    return kept


def _end(block: _Block) -> tuple[int, int]:
    return block.extent.segment, block.extent.offset_bytes + block.extent.size_bytes


def _without_doubtful(blocks: Sequence[_Block]) -> list[_Block]:
    """Of blocks with the same key and common layers and heads: those with this store's tag, if there are any."""
    tagged: dict[bytes, list[Shard]] = {}
    for block in blocks:
        if block.is_tagged:
            tagged.setdefault(block.key[:KEY_BYTES], []).append(_shard(block))
    return [
        block
        for block in blocks
        if block.is_tagged or not any(_overlap(_shard(block), each) for each in tagged.get(block.key[:KEY_BYTES], ()))
    ]


def _shard(block: _Block) -> Shard:
    return Shard.decode(block.key[KEY_BYTES:])


def _overlap(one: Shard, other: Shard) -> bool:
    layers = max(one.layer_begin, other.layer_begin) < min(one.layer_end, other.layer_end)
    return layers and max(one.head_begin, other.head_begin) < min(one.head_end, other.head_end)


def _one_of_each_key(blocks: Sequence[_Block]) -> tuple[list[_Block], int]:
    """One copy per key; no copy if copies differ, because none is known to be right, and the number of such keys."""
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
