"""The generations of a shared arena's extents: how those who read in place learn that bytes may have changed.

The file belongs to its arena from the moment on that the arena's header says so. An arena whose
generations got lost cannot be used any more: somebody may still look at the old ones.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvservice.tiers.files import FileCalls
from kvservice_api.arena import (
    GENERATIONS_NAME,
    are_generations_of,
    encode_generations_header,
    generation_index,
    generations_file_bytes,
)
from kvservice_api.image import PAGE_BYTES

_WORDS_AT_A_TIME = 1 << 20
_WORD_MAX = 2**32 - 1


class Generations:
    """One u32 a page. Raised by the daemon only, read by everybody."""

    def __init__(self, directory: Path, capacity_bytes: int, calls: FileCalls) -> None:
        """Open what `examine` found, or `create` made."""
        fd = calls.open(directory / GENERATIONS_NAME, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, generations_file_bytes(capacity_bytes))
        finally:
            os.close(fd)
        count = capacity_bytes // PAGE_BYTES
        self._words: NDArray[np.uint32] = np.frombuffer(self._map, "<u4", count, PAGE_BYTES)

    @staticmethod
    def examine(directory: Path, arena_id: bytes, capacity_bytes: int) -> str:
        """Why the file is not that of this arena; empty where it is."""
        try:
            with (directory / GENERATIONS_NAME).open("rb") as file:
                head = file.read(PAGE_BYTES)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return "its generations are gone"
        if size != generations_file_bytes(capacity_bytes) or not are_generations_of(head, arena_id):
            return "its generations are another arena's, or damaged"
        return ""

    @staticmethod
    def create(directory: Path, arena_id: bytes, capacity_bytes: int, calls: FileCalls) -> None:
        """Make the file, its pages promised by the kernel. Raises OSError where there is no space for it."""
        path = directory / GENERATIONS_NAME
        path.unlink(missing_ok=True)
        fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            calls.posix_fallocate(fd, 0, generations_file_bytes(capacity_bytes))
            os.pwrite(fd, encode_generations_header(arena_id), 0)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def get_many(self, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Those of the extents that begin at `offsets`."""
        found: NDArray[np.uint32] = self._words[offsets // PAGE_BYTES]
        return found

    def raise_(self, offset_bytes: int) -> None:
        """The extent that began here is no more: before its space is lent again."""
        index = generation_index(offset_bytes)
        self._words[index] = (int(self._words[index]) + 1) & _WORD_MAX

    def raise_all_but(self, offsets: NDArray[np.int64]) -> None:
        """No extents but those that begin at `offsets` were found at start.

        Others may have been read in place until the end of an earlier daemon, which had no time to release them.
        """
        kept = np.sort(offsets) // PAGE_BYTES
        for start in range(0, len(self._words), _WORDS_AT_A_TIME):
            words = self._words[start : start + _WORDS_AT_A_TIME]
            step = np.ones(len(words), np.uint32)
            first, last = np.searchsorted(kept, (start, start + len(words)))
            step[kept[first:last] - start] = 0
            words += step  # Wraps.
