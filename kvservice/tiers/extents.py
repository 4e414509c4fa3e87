"""The free space of a tier: a best-fit allocator that joins adjacent free runs.

Sizes are rounded up to a step of 1/32 of themselves (at least 4 KiB), or to such a step and one page. So at most 3.1 %
is wasted from 128 KiB up, and a block can use the freed space of another block of nearly the same size. Most full
blocks are a power of two and the page of their trailer: they waste nothing. If they were written one after another, the
trailer of one and the first layer of the next one are one short read.

A sorted list of the sizes finds free runs by size, and a sorted list of the starts finds them by place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import TierFull
from kvservice_api.image import PAGE_BYTES

_STEPS_PER_OCTAVE = 32


def extent_size(size_bytes: int) -> int:
    """The bytes that an extent for `size_bytes` takes."""
    assert size_bytes > 0
    return min(_rounded(size_bytes), _rounded(size_bytes - PAGE_BYTES) + PAGE_BYTES)


def _rounded(size_bytes: int) -> int:
    if size_bytes <= 0:
        return 0
    octave = 1 << (size_bytes.bit_length() - 1)
    step = max(PAGE_BYTES, octave // _STEPS_PER_OCTAVE)
    return -(-size_bytes // step) * step


def lie_within(
    offsets: NDArray[np.generic], sizes: NDArray[np.generic], capacities: NDArray[np.uint64] | np.uint64
) -> NDArray[np.bool_]:
    """Which of these extents are possible in a `SpaceMap`. The numbers come from the disk and may have any value."""
    starts, lengths = offsets.astype(np.uint64), sizes.astype(np.uint64)
    page = np.uint64(PAGE_BYTES)
    inside: NDArray[np.bool_] = (
        (starts <= capacities)
        & (lengths <= capacities - np.minimum(starts, capacities))  # Not a sum, which could overflow.
        & (starts % page == 0)
        & (lengths % page == 0)
        & (lengths > 0)
    )
    return inside


class SpaceMap:
    """The free runs of one file or memory range of `capacity_bytes`."""

    def __init__(self, capacity_bytes: int) -> None:
        assert capacity_bytes % PAGE_BYTES == 0
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._starts: list[int] = []  # Starts of the free runs, sorted.
        self._size_at: dict[int, int] = {}  # Start of a free run -> its size.
        self._sizes: list[int] = []  # The sizes that have at least one run, sorted.
        self._starts_of_size: dict[int, set[int]] = {}
        if capacity_bytes:
            self._put(0, 0, capacity_bytes)

    @property
    def largest_free_bytes(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    def reserve(self, size_bytes: int) -> int:
        """The offset of a free range of `extent_size(size_bytes)`. Raises TierFull if none is long enough."""
        size = extent_size(size_bytes)
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes):
            raise TierFull(f"no free run of {size} bytes; the longest has {self.largest_free_bytes}")
        found = self._sizes[at]
        start = next(iter(self._starts_of_size[found]))
        place = bisect_left(self._starts, start)
        self._take(place)
        if found > size:
            self._put(place, start + size, found - size)
        self.used_bytes += size
        return start

    def take(self, offset: int, size: int) -> bool:
        """Reserve exactly this range. Returns False, without a change, if a part of it is in use."""
        assert size > 0 and offset % PAGE_BYTES == size % PAGE_BYTES == 0
        place = bisect_right(self._starts, offset) - 1
        if place < 0 or (end := self._starts[place] + self._size_at[self._starts[place]]) < offset + size:
            return False
        start = self._starts[place]
        self._take(place)
        if end > offset + size:
            self._put(place, offset + size, end - offset - size)
        if start < offset:
            self._put(place, start, offset - start)
        self.used_bytes += size
        return True

    def release(self, offset: int, size: int) -> None:
        """Free a range that `reserve` or `adopt` took. What `shrink` cut off of it does not become free."""
        assert offset >= 0 and size > 0
        kept = min(offset + size, self.capacity_bytes) - offset
        if kept > 0:
            self._free(offset, kept)
        self.used_bytes -= size
        assert self.used_bytes >= 0

    def grow(self, capacity_bytes: int) -> None:
        """Add space at the end."""
        assert capacity_bytes >= self.capacity_bytes and capacity_bytes % PAGE_BYTES == 0
        old, self.capacity_bytes = self.capacity_bytes, capacity_bytes
        if capacity_bytes > old:
            self._free(old, capacity_bytes - old)

    def shrink(self, capacity_bytes: int) -> None:
        """Cut off the end. Ranges there that are in use stay so until their release."""
        assert 0 <= capacity_bytes <= self.capacity_bytes and capacity_bytes % PAGE_BYTES == 0
        self.capacity_bytes = capacity_bytes
        while self._starts and self._starts[-1] + self._size_at[self._starts[-1]] > capacity_bytes:
            start = self._starts[-1]
            self._take(len(self._starts) - 1)
            if start < capacity_bytes:
                self._put(len(self._starts), start, capacity_bytes - start)

    def adopt(self, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """Mark the ranges of an earlier start as used. The map must be empty.

        Raises ValueError if ranges overlap or if `lie_within` is false for one; the map stays empty then.
        """
        assert not self.used_bytes, "extents are adopted once, before anything is reserved"
        if not lie_within(offsets, sizes, np.uint64(self.capacity_bytes)).all():
            raise ValueError("an extent is outside its tier")
        order = np.argsort(offsets)
        starts, ends = offsets[order], offsets[order] + sizes[order]
        if (starts[1:] < ends[:-1]).any():
            raise ValueError("two extents overlap")
        run_starts = np.concatenate([np.zeros(1, np.int64), ends])
        run_sizes = np.append(starts, self.capacity_bytes) - run_starts
        self._reset(run_starts[run_sizes > 0], run_sizes[run_sizes > 0])
        self.used_bytes = int(sizes.sum())

    def _reset(self, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """Set the free runs. There may be a million of them."""
        self._starts = starts.tolist()
        self._size_at = dict(zip(self._starts, sizes.tolist(), strict=True))
        order = np.argsort(sizes, kind="stable")
        distinct, first = np.unique(sizes[order], return_index=True)
        groups = np.split(starts[order], first[1:]) if len(distinct) else []
        self._sizes = distinct.tolist()
        self._starts_of_size = {size: set(group.tolist()) for size, group in zip(self._sizes, groups, strict=True)}

    def _free(self, start: int, size: int) -> None:
        """Add a free run, joined with adjacent ones."""
        place = bisect_left(self._starts, start)
        end = start + size
        if place < len(self._starts):
            following = self._starts[place]
            assert end <= following, "an extent is released once"
            if following == end:
                end += self._take(place)
        if place:
            before = self._starts[place - 1]
            before_end = before + self._size_at[before]
            assert before_end <= start, "an extent is released once"
            if before_end == start:
                place -= 1
                self._take(place)
                start = before
        self._put(place, start, end - start)

    def _put(self, place: int, start: int, size: int) -> None:
        self._starts.insert(place, start)
        self._size_at[start] = size
        starts = self._starts_of_size.get(size)
        if starts is None:
            self._starts_of_size[size] = {start}
            insort(self._sizes, size)
        else:
            starts.add(start)

    def _take(self, place: int) -> int:
        """Remove a free run. Returns its size."""
        start = self._starts.pop(place)
        size = self._size_at.pop(start)
        starts = self._starts_of_size[size]
        starts.discard(start)
        if not starts:
            del self._starts_of_size[size]
            del self._sizes[bisect_left(self._sizes, size)]
        return size
