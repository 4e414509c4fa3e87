"""Copies of slices with their checksums, in one pass over the data.

The work is done by a C extension (`copying.c`), where it was built, and by NumPy and xxhash otherwise, with the same
results. Both release the interpreter's lock while they copy. With the environment variable KVS_PURE_PYTHON=1 the
extension is neither built nor used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_ARGUMENTS = 5  # The number of its arguments' form, also in `copying.c`.


def _extension() -> ModuleType | None:
    """None if there is none, or if it was built from an older `copying.c`."""
    if os.environ.get("KVS_PURE_PYTHON") != "1":
        with suppress(ImportError):
            found = import_module("kvservice_api._copying")
            return found if getattr(found, "arguments", 0) == _ARGUMENTS else None
    return None


native = _extension()

# Smaller transfers stay in the processor's caches, where the next reader finds them.
STREAMED_BYTES_MIN = 8 << 20

PIECE_BYTES = 512 << 10  # Larger ones leave the caches before they are summed; smaller ones cost calls.
_BY_WORDS_BYTES_MIN = 32 << 10  # Below this size, choosing the copy routine costs more than it saves.

_OUTSIDE = "is not within its array, or has other runs than there are"

Memory = NDArray[Any]
Table = NDArray[np.int64]
NO_RUNS: Table = np.empty((0, 6), np.int64)


def implementation() -> str:
    """What does the work: "native with AVX2", "native", or "pure Python"."""
    if native is None:
        return "pure Python"
    return "native with AVX2" if native.has_avx2 else "native"


def copy_slices(
    sources: Sequence[Memory],
    targets: Sequence[Memory],
    slices: Table,
    runs: Table,
    *,
    streamed: bool = False,
    summed: bool = True,
) -> NDArray[np.uint64]:
    """Copy parts of some slices, and return the xxh3-64 of each whole slice, as it was read; none if not `summed`.

    `slices` has a row for each: (number of its source, its offset there, its size, how many runs). `runs` has those of
    all slices, one after the other: (number of its target, its offset there, where it begins in the slice, rows, bytes
    of a row, distance of the rows in the target). The rows of a run follow each other in the slice. Offsets, sizes and
    distances are bytes; offsets count from an array's first element. A slice without runs is only summed. Fastest with
    a slice's runs in the order of their begins.

    `streamed` copies do not stay in the processor's caches: faster for more than these hold. Raises ValueError for
    what is outside its slice or array, and for a target that cannot be written; nothing is copied then. Sources and
    targets that overlap give undefined bytes.
    """
    if any(not target.flags.writeable for target in targets):
        raise ValueError("a target is read-only")
    slices, runs = np.ascontiguousarray(slices, np.int64), np.ascontiguousarray(runs, np.int64)
    sums = np.empty(len(slices) if summed else 0, np.uint64)
    copy = _copy_slices if native is None else native.copy_slices
    copy(sources, targets, slices, runs, sums, streamed)
    return sums


def _copy_slices(
    sources: Sequence[Memory],
    targets: Sequence[Memory],
    slices: Table,
    runs: Table,
    sums: NDArray[np.uint64],
    streamed: bool,
) -> None:
    origins, places = [_Extent(each) for each in sources], [_Extent(each) for each in targets]
    rows = runs.tolist()
    todo, used = [], 0
    for number, offset, size, count in slices.tolist():
        if number not in range(len(origins)) or count not in range(len(rows) - used + 1):
            raise ValueError(f"a slice {_OUTSIDE}")
        origins[number].check(offset, 1, size, 0)
        todo.append((origins[number].part(offset, 1, size, 0), rows[used : used + count]))
        used += count
        for target, at, begin, lines, line_bytes, stride in todo[-1][1]:
            if target not in range(len(places)) or min(begin, lines, line_bytes) < 0:
                raise ValueError(f"a run of a slice {_OUTSIDE}")
            if lines and line_bytes:
                if begin + lines * line_bytes > size:
                    raise ValueError(f"a run of a slice {_OUTSIDE}")
                places[target].check(at, lines, line_bytes, stride)
    if used != len(rows):
        raise ValueError("there are runs that belong to no slice")
    for position, (source, its_runs) in enumerate(todo):
        found = _copy_slice(source, places, its_runs, summed=bool(len(sums)))
        if len(sums):
            sums[position] = found


def _copy_slice(source: Memory, places: Sequence[_Extent], runs: Sequence[Sequence[int]], *, summed: bool) -> int:
    digest, read = xxhash.xxh3_64(), 0
    for number, offset, begin, rows, row_bytes, stride in _pieces(runs):
        end = begin + rows * row_bytes
        _copy(source[begin:end], places[number].part(offset, rows, row_bytes, stride))
        if summed and len(source) > PIECE_BYTES and end > read:  # While it is in the cache.
            digest.update(source[read:end].data)
            read = end
    if not read:
        return xxhash.xxh3_64_intdigest(source.data) if summed else 0
    digest.update(source[read:].data)
    return digest.intdigest()


def _pieces(runs: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int, int, int, int]]:
    """The runs, in pieces that the cache holds."""
    for number, offset, begin, rows, row_bytes, stride in runs:
        if not rows or not row_bytes:
            continue
        if rows == 1:
            for at in range(0, row_bytes, PIECE_BYTES):
                yield number, offset + at, begin + at, 1, min(PIECE_BYTES, row_bytes - at), 0
            continue
        some = max(1, PIECE_BYTES // row_bytes)
        for row in range(0, rows, some):
            count = min(some, rows - row)
            yield number, offset + row * stride, begin + row * row_bytes, count, row_bytes, stride


class _Extent:
    """The bytes of an array of any strides, from the lowest address to the highest."""

    def __init__(self, array: Memory) -> None:
        reach = [(length - 1) * step for length, step in zip(array.shape, array.strides, strict=True)]
        self._first = sum(step for step in reach if step < 0) if array.size else 0
        self._end = array.itemsize + sum(step for step in reach if step > 0) if array.size else 0
        self._array = array
        self.__array_interface__ = {
            "data": (array.__array_interface__["data"][0] + self._first, not array.flags.writeable),
            "shape": (self._end - self._first,),
            "typestr": "|u1",
            "version": 3,
        }
        self._bytes: Memory = np.asarray(self)

    def check(self, offset: int, rows: int, row_bytes: int, stride: int) -> None:
        """Raises ValueError if these rows, at least one, are not within the array."""
        last = offset + (rows - 1) * stride
        if row_bytes < 0 or min(offset, last) < self._first or max(offset, last) + row_bytes > self._end:
            raise ValueError(f"a slice or a run of it {_OUTSIDE}")

    def part(self, offset: int, rows: int, row_bytes: int, stride: int) -> Memory:
        """One row, shape [bytes], or several, [row, byte]."""
        at = offset - self._first
        if rows == 1:
            return self._bytes[at : at + row_bytes]
        return np.ndarray((rows, row_bytes), np.uint8, self._bytes, at, (stride, 1))


def _copy(source: Memory, target: Memory) -> None:
    if _copies_by_words(source, target):
        np.positive(source.view(np.uint64), out=target.view(np.uint64))
    else:
        np.copyto(target, source.reshape(target.shape))


def _copies_by_words(source: Memory, target: Memory) -> bool:
    """Whether NumPy's own loop over words is faster, whose speed does not depend on alignment.

    Processors' string copies run at a third of their speed for some relative alignments of source and target, such as
    a buffer from malloc and a page of the arena: their addresses differ by 16 bytes, modulo the page size.
    """
    if target.ndim != 1 or source.size < _BY_WORDS_BYTES_MIN or source.size % 8:
        return False
    distance: int = target.__array_interface__["data"][0] - source.__array_interface__["data"][0]
    return distance % 32 != 0 and distance % 8 == 0
