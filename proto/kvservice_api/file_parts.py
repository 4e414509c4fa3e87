"""Parts of a file, read into memory, with the xxh3-64 of ranges of them.

A C extension (`file_parts.c`) reads and sums many parts in one call, without the interpreter's lock, and requests them
from the kernel together. Without it, Python does the same with a call per run of neighbours, one after another.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
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
_END_MAX = 2**63 - 1  # Of a file.


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
    outside its part, and for a part where no file can have one.
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
    return sums_of_each([(memory, ranges)])[0]


def sums_of_each(summed: Sequence[tuple[memoryview, Ranges]]) -> list[NDArray[np.uint64]]:
    """The xxh3-64 of ranges of several memories, at least one, in one call: thousands of small ranges would cost more
    in Python than their bytes take to read.
    """
    counts = [len(ranges) for _, ranges in summed]
    begins, ends = np.concatenate([ranges for _, ranges in summed]).T
    slices = np.zeros((len(begins), 4), np.int64)
    slices[:, 0] = np.repeat(np.arange(len(summed)), counts)
    slices[:, 1], slices[:, 2] = begins, ends - begins
    sources = [np.frombuffer(memory, np.uint8) for memory, _ in summed]
    sums = copying.copy_slices(sources, [], slices, copying.NO_RUNS)
    return [sums[begin:end] for begin, end in pairwise(accumulate(counts, initial=0))]


def _read_parts(
    preadv: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    parts: Sequence[FilePart],
    sums: NDArray[np.uint64],
) -> list[bool]:
    for part in parts:
        is_right = 0 <= part.position <= _END_MAX - len(part.into)
        if not is_right or any(not 0 <= begin <= end <= len(part.into) for begin, end in part.ranges.tolist()):
            raise ValueError("a part is outside any file, or a range outside its part")
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
