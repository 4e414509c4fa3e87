"""The generations of a shared arena's extents, by which clients that read in place detect that bytes may have changed.

The file belongs to its arena once the arena's header says so. An arena without its generations cannot be used any more,
because a client may still read the old ones.
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
    """One u32 per page. Only the daemon increments them; clients read them."""

    def __init__(self, directory: Path, capacity_bytes: int, calls: FileCalls) -> None:
        """Open a file that `examine` accepted or `create` made."""
        fd = calls.open(directory / GENERATIONS_NAME, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, generations_file_bytes(capacity_bytes))
        finally:
            os.close(fd)
        count = capacity_bytes // PAGE_BYTES
        self._words: NDArray[np.uint32] = np.frombuffer(self._map, "<u4", count, PAGE_BYTES)

    @staticmethod
    def examine(directory: Path, arena_id: bytes, capacity_bytes: int) -> str:
        """Why the file does not belong to this arena; empty if it does."""
        try:
            with (directory / GENERATIONS_NAME).open("rb") as file:
                head = file.read(PAGE_BYTES)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return "its generations are gone"
        # It is longer where a growth was interrupted.
        if size < generations_file_bytes(capacity_bytes) or not are_generations_of(head, arena_id):
            return "its generations are another arena's, or damaged"
        return ""

    @staticmethod
    def create(directory: Path, arena_id: bytes, capacity_bytes: int, calls: FileCalls) -> None:
        """Create the file, with all its pages allocated. Raises OSError if there is no space for it."""
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

    @staticmethod
    def grow(directory: Path, capacity_bytes: int, calls: FileCalls) -> None:
        """Make the file long enough for an arena of this capacity. Raises OSError if there is no space for it."""
        fd = calls.open(directory / GENERATIONS_NAME, os.O_RDWR)
        try:
            calls.posix_fallocate(fd, 0, generations_file_bytes(capacity_bytes))
        finally:
            os.close(fd)

    def get_many(self, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The generations of the extents that begin at `offsets`."""
        found: NDArray[np.uint32] = self._words[offsets // PAGE_BYTES]
        return found

    def bump(self, offset_bytes: int) -> None:
        """Increment the generation of a released extent, before its space is reserved again."""
        index = generation_index(offset_bytes)
        self._words[index] = (int(self._words[index]) + 1) & _WORD_MAX

    def bump_all_except(self, offsets: NDArray[np.int64]) -> None:
        """Increment every page's generation except at `offsets`, the extents that were recovered at start.

        Clients may still read other extents in place, which an earlier daemon did not release before its end.
        """
        kept = np.sort(offsets) // PAGE_BYTES
        for start in range(0, len(self._words), _WORDS_AT_A_TIME):
            words = self._words[start : start + _WORDS_AT_A_TIME]
            step = np.ones(len(words), np.uint32)
            first, last = np.searchsorted(kept, (start, start + len(words)))
            step[kept[first:last] - start] = 0
            words += step  # Wraps.
