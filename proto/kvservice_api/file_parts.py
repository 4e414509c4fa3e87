"""Parts of a file, read into memory, with the xxh3-64 of ranges of them.

A C extension (`file_parts.c`) reads and sums many parts in one call, without the interpreter's lock. Without it, Python
does the same with a call per run of neighbours.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_api import copying

Ranges = NDArray[np.int64]
NO_RANGES: Ranges = np.empty((0, 2), np.int64)

# Between parts of one read: a disk reads as many bytes sooner than it begins another read. Also in `file_parts.c`.
_GAP_BYTES_MAX = 64 << 10
_GAP = memoryview(mmap.mmap(-1, _GAP_BYTES_MAX))  # The bytes there; they are not used.
_VECTORS_MAX = 512  # In one system call; Linux takes 1024.


class FilePart(NamedTuple):
    """Where a part begins in its file, the memory that it fills, and the ranges of it to sum: rows of (begin, end)."""

    position: int
    into: memoryview
    ranges: Ranges


def read_parts(
    fd: int, parts: Sequence[FilePart], preadv: Callable[[int, Sequence[memoryview], int], int] | None = None
) -> list[NDArray[np.uint64] | None]:
    """The checksums of each part's ranges; None for a part that was not read, because the file has no such bytes or
    the call failed. Any thread may call it; it blocks until all are read.

    Parts with small gaps between them, in the order of their positions, share one system call, and each of them is
    read or none. `preadv` is called instead of the operating system's, as `os.preadv`. Raises ValueError for a range
    outside its part.
    """
    counts = [len(part.ranges) for part in parts]
    sums = np.empty(sum(counts), np.uint64)
    if copying.native is not None and preadv is None:
        are_read: Sequence[Any] = copying.native.read_parts(fd, parts, sums)
    else:
        are_read = _read_parts(preadv or os.preadv, fd, parts, sums)
    found, at = list[NDArray[np.uint64] | None](), 0
    for is_read, count in zip(are_read, counts, strict=True):
        found.append(sums[at : at + count] if is_read else None)
        at += count
    return found


def sums_of(memory: memoryview, ranges: Ranges) -> NDArray[np.uint64]:
    """The xxh3-64 of these ranges."""
    slices = np.zeros((len(ranges), 4), np.int64)
    slices[:, 1], slices[:, 2] = ranges[:, 0], ranges[:, 1] - ranges[:, 0]
    return copying.copy_slices([np.frombuffer(memory, np.uint8)], [], slices, copying.NO_RUNS)


def _read_parts(
    preadv: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    parts: Sequence[FilePart],
    sums: NDArray[np.uint64],
) -> list[bool]:
    for part in parts:
        if any(not 0 <= begin <= end <= len(part.into) for begin, end in part.ranges.tolist()):
            raise ValueError("a range is outside its part, or has no place for its checksum")
    are_read, done = list[bool](), 0
    while len(are_read) < len(parts):
        run = _run(parts, len(are_read))
        begin = end = run[0].position
        buffers = list[memoryview]()
        for position, into, _ in run:
            buffers += [_GAP[: position - end], into] if position > end else [into]
            end = position + len(into)
        try:
            is_read = preadv(fd, buffers, begin) == end - begin
        except OSError:  # The caller reads each part alone, and learns which one it is.
            is_read = False
        are_read += [is_read] * len(run)
        for _, into, ranges in run:
            if is_read:
                sums[done : done + len(ranges)] = sums_of(into, ranges)
            done += len(ranges)
    return are_read


def _run(parts: Sequence[FilePart], first: int) -> Sequence[FilePart]:
    """The parts from `first` on that one system call reads."""
    end = parts[first].position + len(parts[first].into)
    after = first + 1
    while after < min(len(parts), first + _VECTORS_MAX // 2) and 0 <= parts[after].position - end <= _GAP_BYTES_MAX:
        end = parts[after].position + len(parts[after].into)
        after += 1
    return parts[first:after]
