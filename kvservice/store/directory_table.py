"""One file of the residency directory, on its only writer's side.

The slot number of each row is kept here, in private memory, because clients could damage shared memory: the daemon
never reads it back. Bytes and rules: ``kvservice_api/residency_directory.py``.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from kvservice.blocks import Rows
from kvservice.tiers.files import FileCalls
from kvservice_api.residency_directory import (
    EMPTY_SLOT,
    HEADER_BYTES,
    SLOT,
    SLOT_BYTES,
    STATE_WORD,
    WITHDRAWN_SLOT,
    DirectoryState,
    Header,
    Slots,
    home_slot,
    home_slots,
    seal_slots,
)

_NO_SLOT = -1
_FREE, _GONE, _TAKEN = 0, 1, 2
_WORDS_PER_SLOT = SLOT_BYTES // 4
_FIRST_WORD = HEADER_BYTES // 4


class TableFull(Exception):
    """No slot is free."""


class DirectoryTable:
    """The hash table in one file. Rows are the block table's; each has at most one slot."""

    def __init__(self, path: Path, header: Header, calls: FileCalls) -> None:
        """Create the file with all its space allocated. An earlier file of this name keeps its readers.

        Raises OSError if there is no space; it then leaves no file.
        """
        self.slot_count = header.slot_count
        self.used_slots = 0  # Slots in use.
        self.gone_slots = 0  # Withdrawn slots, which are not empty.
        path.unlink(missing_ok=True)
        fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            calls.posix_fallocate(fd, 0, header.file_bytes)  # Otherwise a full tmpfs would cause a SIGBUS later.
            self._map = mmap.mmap(fd, header.file_bytes)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("I")  # A store of 4 bytes through it is one instruction.
        self._slots = np.frombuffer(self._map, SLOT, self.slot_count, HEADER_BYTES)
        self._kinds = bytearray(self.slot_count)
        self._slot_of_row = np.full(1024, _NO_SLOT, np.int32)
        encoded = header.encode()
        self._map[: len(encoded)] = encoded

    @property
    def fill(self) -> float:
        """The share of slots at which a search does not end."""
        return (self.used_slots + self.gone_slots) / self.slot_count

    def set_state(self, state: DirectoryState) -> None:
        self._words[STATE_WORD] = state

    def close(self, state: DirectoryState) -> None:
        """Set the state for readers, and unmap the file. Readers may keep their mapping."""
        self.set_state(state)
        del self._words, self._slots, self._map

    def has(self, row: int) -> bool:
        return row < len(self._slot_of_row) and bool(self._slot_of_row[row] != _NO_SLOT)

    def missing(self, rows: Rows) -> Rows:
        """The rows without a slot."""
        self._know(int(rows.max(initial=0)))
        absent: Rows = rows[self._slot_of_row[rows] == _NO_SLOT]
        return absent

    def put(self, row: int, key: bytes, slot: bytes) -> None:
        """Publish a row, or change its slot. `slot` comes from ``encode_slot``. Raises TableFull."""
        self._know(row)
        at = int(self._slot_of_row[row])
        if at == _NO_SLOT:
            at = self._take(home_slot(key, self.slot_count))
            self._slot_of_row[row] = at
        self._write(at, slot)

    def put_all(self, rows: Rows, slots: Slots) -> None:
        """Publish rows that have no slot, in a table that no reader trusts yet. Raises TableFull.

        `slots` need neither sequence nor crc.
        """
        self._know(int(rows.max(initial=0)))
        keys = np.ascontiguousarray(slots["key"]).view("<u8").reshape(-1, 4)
        places = np.fromiter(map(self._take, home_slots(keys, self.slot_count).tolist()), np.int64, len(rows))
        seal_slots(slots)
        slots["sequence"] = (self._slots["sequence"][places] | 1) + 1
        self._slots[places] = slots
        self._slot_of_row[rows] = places

    def withdraw(self, row: int) -> None:
        """Withdraw a row."""
        at = int(self._slot_of_row[row])
        assert at != _NO_SLOT
        self._slot_of_row[row] = _NO_SLOT
        self.used_slots -= 1
        last = self.slot_count - 1
        if self._kinds[(at + 1) & last] != _FREE:
            self._kinds[at] = _GONE
            self.gone_slots += 1
            self._write(at, WITHDRAWN_SLOT)
            return
        # The next slot is empty, so a search may end here; the same holds for withdrawn slots before.
        self._kinds[at] = _FREE
        self._write(at, EMPTY_SLOT)
        while self._kinds[at := (at - 1) & last] == _GONE:
            self._kinds[at] = _FREE
            self.gone_slots -= 1
            self._write(at, EMPTY_SLOT)

    def _take(self, home: int) -> int:
        """The first slot from `home` on that is not in use."""
        kinds = self._kinds
        free = _nearest(kinds, home, len(kinds))
        if free < 0:
            free = _nearest(kinds, 0, home)
        if free < 0:
            raise TableFull
        self.gone_slots -= kinds[free]
        self.used_slots += 1
        kinds[free] = _TAKEN
        return free

    def _write(self, at: int, slot: bytes) -> None:
        """Three stores, in the order that the sequence's rule requires."""
        word = _FIRST_WORD + _WORDS_PER_SLOT * at
        sequence = self._words[word]
        start = 4 * word
        self._words[word] = sequence | 1
        self._map[start + 4 : start + SLOT_BYTES] = slot
        self._words[word] = ((sequence | 1) + 1) & 0xFFFF_FFFF

    def _know(self, row: int) -> None:
        if row >= (known := len(self._slot_of_row)):
            more = np.full(max(known, row + 1 - known), _NO_SLOT, np.int32)
            self._slot_of_row = np.concatenate([self._slot_of_row, more])


def _nearest(kinds: bytearray, start: int, end: int) -> int:
    """The first slot in a range that is free or withdrawn; -1 where there is none."""
    free = kinds.find(_FREE, start, end)
    gone = kinds.find(_GONE, start, end if free < 0 else free)
    return free if gone < 0 else gone


assert (_FREE, _GONE) == (0, 1)  # Counted in `_take`.
