"""Publishes the block table's residency to clients on this host: ``kvservice_api/residency_directory.py``.

The table calls it for every row that is linked, unlinked, or gains or loses a copy, and the slot is changed before that
call returns. So a block is published after lookups find it, and withdrawn before the commit that allows its space to be
reused. Clients may see a slot late: a stale hit costs them a lookup that misses.

The directory is optional: without space for it there is none, and nothing else fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows
from kvservice.tiers.files import FileCalls, on_thread
from kvservice_api.layout import Layout
from kvservice_api.residency_directory import (
    EMPTY_SLOT,
    FILE_NAME,
    HEADER_BYTES,
    IN_DRAM,
    ON_SSD,
    SLOT,
    SLOT_BYTES,
    STATE_WORD,
    TAIL,
    WITHDRAWN_SLOT,
    DirectoryState,
    Header,
    Slots,
    encode_slot,
    home_slot,
    home_slots,
    layout_mark,
    seal_slots,
    tail_key,
)

log = logging.getLogger(__name__)

_FILL_MAX = 0.7
_SLOTS_MIN = 1 << 12
_FREE_SHARE = 16  # At the start it takes at most this part of the tmpfs's free space, because the arena needs space.
_ROWS_A_TURN = 512  # They take a millisecond of the event loop.

_ENTRIES_PER_ROW = 2  # Entry 2 * row is for the row's object, the next one for the tail that it is.
_NO_SLOT = -1
_FREE, _GONE, _TAKEN = 0, 1, 2
_WORDS_PER_SLOT = SLOT_BYTES // 4
_FIRST_WORD = HEADER_BYTES // 4
assert (_FREE, _GONE) == (0, 1)  # Counted in `DirectoryTable._take`.


class ResidencyDirectory:
    """The directory of one run of a daemon. `path` is empty if there is none."""

    def __init__(
        self,
        blocks: BlockTable,
        layouts: Mapping[int, Layout],
        folder: Path,
        *,
        store_id: bytes,
        arena_id: bytes,
        boot_epoch: int,
        bytes_max: int,
        slots_min: int = _SLOTS_MIN,
        calls: FileCalls | None = None,
    ) -> None:
        """Create the file, marked as being built; it replaces an earlier daemon's file. Never fails."""
        self._blocks = blocks
        self._file = folder / FILE_NAME
        self._next_file = folder / f"{FILE_NAME}.next"
        self._identity = (store_id, arena_id, boot_epoch)
        self._bytes_max = bytes_max
        self._slots_min = slots_min
        self._calls = calls or FileCalls()
        self._current: DirectoryTable | None = None  # The table under the file's name.
        self._next: DirectoryTable | None = None  # The table that will replace it.
        self._crowded = asyncio.Event()
        self._mark = functools.cache(lambda layout_id: layout_mark(layouts[layout_id].fingerprint))
        self._full_tokens = functools.cache(lambda layout_id: layouts[layout_id].block_tokens)
        self._open()

    @property
    def path(self) -> str:
        """The path for clients; empty if there is none."""
        return str(self._file.absolute()) if self._current is not None else ""

    async def keep(self) -> None:
        """Fill the directory, and replace it by a larger one when it is full. Returns if there is none."""
        if self._current is not None and await self._fill(self._current):
            self._current.set_state(DirectoryState.LIVE)
        while self._current is not None:
            await self._crowded.wait()
            self._crowded.clear()
            await self._replace()

    def close(self) -> None:
        """Tell readers that the directory is no longer up to date, and free its memory."""
        if self._changed in self._blocks.listeners:
            self._blocks.listeners.remove(self._changed)
        for table in (self._current, self._next):
            if table is not None:
                table.close(DirectoryState.CLOSED)
        self._current = self._next = None
        self._crowded.set()  # `keep` returns.
        for path in (self._file, self._next_file):
            with contextlib.suppress(OSError):
                path.unlink()

    # Calls of the block table

    def _changed(self, row: int) -> None:
        try:
            for table in (self._current, self._next):
                if table is not None:
                    self._update(table, row)
        except TableFull:  # The replacement came too late.
            self._give_up("it ran full before a larger one was ready")

    def _update(self, table: DirectoryTable, row: int) -> None:
        flags, entry = self._flags(row), _ENTRIES_PER_ROW * row
        if flags:
            self._publish(table, row, entry, flags)
            if table.fill > _FILL_MAX:
                self._crowded.set()
            return
        for each in (entry, entry + 1):
            if table.has(each):
                table.withdraw(each)

    def _publish(self, table: DirectoryTable, row: int, entry: int, flags: int) -> None:
        blocks = self._blocks
        layout_id, token_count = int(blocks.layout_id[row]), int(blocks.token_count[row])
        key, shard, mark = blocks.key[row].tobytes(), blocks.shard[row].tobytes(), self._mark(layout_id)
        table.put(entry, key, encode_slot(flags, token_count, mark, shard, key))
        if token_count < self._full_tokens(layout_id) and not table.has(entry + 1):
            key = tail_key(blocks.parent_key[row].tobytes())
            table.put(entry + 1, key, encode_slot(TAIL, token_count, mark, shard, key))

    def _flags(self, row: int) -> int:
        blocks = self._blocks
        if not blocks.live[row]:
            return 0
        first = blocks.first_tier
        return IN_DRAM * blocks.is_resident(row, first) | ON_SSD * blocks.has_slower_copy(row, first)

    # Files

    def _open(self) -> None:
        slots = self._first_slots()
        if not slots:
            return
        try:
            _retire(self._file)
            self._next_file.unlink(missing_ok=True)  # A killed daemon may have left it.
            self._current = self._new_table(self._file, slots)
        except OSError as error:
            self._give_up(str(error))
            return
        self._blocks.listeners.append(self._changed)

    def _first_slots(self) -> int:
        """The number of slots for the expected rows of the block table, within the available space. 0 means none."""
        blocks = self._blocks
        rows = blocks.live_rows()
        in_use = len(rows) + int(self._are_tails(rows).sum())
        least = self._slots_for(in_use)
        if HEADER_BYTES + SLOT_BYTES * least > self._bytes_max:
            if self._bytes_max:
                log.warning("no residency directory: %d bytes are too few for it", self._bytes_max)
            return 0
        file_system = os.statvfs(self._file.parent)
        size_max = min(self._bytes_max, file_system.f_bavail * file_system.f_frsize // _FREE_SHARE) - HEADER_BYTES
        slots = self._slots_for(max(blocks.rows_likely, in_use))
        while slots > least and SLOT_BYTES * slots > size_max:
            slots //= 2
        return slots

    def _slots_for(self, in_use: int) -> int:
        """A power of two of slots, with space for more than these."""
        return max(self._slots_min, 1 << int(in_use / _FILL_MAX).bit_length())

    def _are_tails(self, rows: Rows) -> NDArray[np.bool_]:
        """Which rows are of partial blocks."""
        ids, which = np.unique(self._blocks.layout_id[rows], return_inverse=True)
        full = np.array([self._full_tokens(layout_id) for layout_id in ids.tolist()], np.int64)
        are_tails: NDArray[np.bool_] = self._blocks.token_count[rows] < full[which]
        return are_tails

    def _new_table(self, path: Path, slots: int) -> DirectoryTable:
        return DirectoryTable(path, Header(*self._identity, slots, DirectoryState.BUILDING), self._calls)

    async def _fill(self, table: DirectoryTable) -> bool:
        """Publish every row; False if the table was abandoned. `_changed` handles changes meanwhile."""
        blocks = self._blocks
        for start in range(0, blocks.row_end, _ROWS_A_TURN):
            if table not in (self._current, self._next):
                return False
            rows = np.arange(start, min(start + _ROWS_A_TURN, blocks.row_end))
            entries, slots = self._slots(table.missing(rows[blocks.live[rows]]))
            try:
                table.put_all(entries, slots)
            except TableFull:
                self._give_up("it ran full while it was filled")
                return False
            await asyncio.sleep(0)
        return table in (self._current, self._next)

    def _slots(self, rows: Rows) -> tuple[Rows, Slots]:
        """Entries and their slots, without sequence and crc, of those rows that have a copy."""
        blocks = self._blocks
        tiers = blocks.tier_sets(rows)
        rows, tiers = rows[tiers != 0], tiers[tiers != 0]
        slots = np.zeros(len(rows), SLOT)
        slots["flags"] = IN_DRAM * (tiers & 1) | ON_SSD * (tiers > 1)
        for name in ("token_count", "shard", "key"):
            slots[name] = getattr(blocks, name)[rows]
        ids, which = np.unique(blocks.layout_id[rows], return_inverse=True)
        slots["layout"] = np.array([self._mark(layout_id) for layout_id in ids.tolist()], "V8")[which]
        are_tails = self._are_tails(rows)
        tails = slots[are_tails]
        tails["flags"] = TAIL
        tails["key"] = np.array([tail_key(key) for key in blocks.parent_key[rows[are_tails]].tolist()], "V32")
        entries = _ENTRIES_PER_ROW * np.concatenate([rows, rows[are_tails]])
        entries[len(rows) :] += 1
        return entries, np.concatenate([slots, tails])

    async def _replace(self) -> None:
        """Replace the file: by one without withdrawn slots if that is enough, else by one twice as large."""
        old = self._current
        if old is None or old.fill <= _FILL_MAX:
            return
        slots = old.slot_count * 2 if old.used_slots > old.slot_count * _FILL_MAX / 2 else old.slot_count
        if HEADER_BYTES + SLOT_BYTES * slots > self._bytes_max:
            self._give_up(f"{old.used_slots} slots in use would take more than the {self._bytes_max} bytes allowed")
            return
        try:
            # On a thread, because the kernel clears all pages first.
            table = await on_thread(lambda: self._new_table(self._next_file, slots))
            if self._current is not old:  # Closed meanwhile.
                table.close(DirectoryState.CLOSED)
                self._next_file.unlink(missing_ok=True)
                return
            self._next = table
            if not await self._fill(table):
                return
            table.set_state(DirectoryState.LIVE)
            self._next_file.replace(self._file)
        except OSError as error:
            self._give_up(str(error))
            return
        old.close(DirectoryState.REPLACED)  # Only now, because readers of this state open the new file.
        self._current, self._next = table, None
        log.info("the residency directory was replaced: %d slots, %d of them in use", slots, table.used_slots)

    def _give_up(self, why: str) -> None:
        log.warning("no residency directory: %s", why)
        self.close()


def _retire(path: Path) -> None:
    """Mark a file that a killed daemon left as closed, so that its readers unmap it."""
    try:
        with path.open("r+b") as file:
            header = Header.decode(file.read(HEADER_BYTES))
            file.seek(0)
            file.write(dataclasses.replace(header, state=DirectoryState.CLOSED).encode())
    except (FileNotFoundError, ValueError):
        return


class TableFull(Exception):
    """No slot is free."""


class DirectoryTable:
    """The hash table in one file, as its only writer sees it. An entry has at most one slot, see `_ENTRIES_PER_ROW`.

    The slot of each entry is kept here, not in shared memory: what a client could damage is never read back.
    """

    def __init__(self, path: Path, header: Header, calls: FileCalls) -> None:
        """Create the file with all its space allocated. An earlier file of this name keeps its readers.

        Raises OSError if there is no space; it then leaves no file.
        """
        self.slot_count = header.slot_count
        self.used_slots = 0  # In use.
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
        self._slot_of_entry = np.full(1024, _NO_SLOT, np.int32)
        encoded = header.encode()
        self._map[: len(encoded)] = encoded

    @property
    def fill(self) -> float:
        """The share of slots at which a search does not end."""
        return (self.used_slots + self.gone_slots) / self.slot_count

    def set_state(self, state: DirectoryState) -> None:
        self._words[STATE_WORD] = state

    def close(self, state: DirectoryState) -> None:
        """Write the state for readers, and unmap the file. Readers may keep it mapped."""
        self.set_state(state)
        del self._words, self._slots, self._map

    def has(self, entry: int) -> bool:
        return entry < len(self._slot_of_entry) and bool(self._slot_of_entry[entry] != _NO_SLOT)

    def missing(self, rows: Rows) -> Rows:
        """The rows whose object has no slot. Its tail then has none either."""
        entries = _ENTRIES_PER_ROW * rows
        self._know(int(entries.max(initial=0)))
        absent: Rows = rows[self._slot_of_entry[entries] == _NO_SLOT]
        return absent

    def put(self, entry: int, key: bytes, slot: bytes) -> None:
        """Publish an entry, or change its slot. `slot` comes from ``encode_slot``. Raises TableFull."""
        self._know(entry)
        at = int(self._slot_of_entry[entry])
        if at == _NO_SLOT:
            at = self._take(home_slot(key, self.slot_count))
            self._slot_of_entry[entry] = at
        self._write(at, slot)

    def put_all(self, entries: Rows, slots: Slots) -> None:
        """Publish entries that have no slot, in a table that no reader trusts yet. Raises TableFull.

        `slots` need neither sequence nor crc.
        """
        self._know(int(entries.max(initial=0)))
        keys = np.ascontiguousarray(slots["key"]).view("<u8").reshape(-1, 4)
        places = np.fromiter(map(self._take, home_slots(keys, self.slot_count).tolist()), np.int64, len(entries))
        seal_slots(slots)
        slots["sequence"] = (self._slots["sequence"][places] | 1) + 1
        self._slots[places] = slots
        self._slot_of_entry[entries] = places

    def withdraw(self, entry: int) -> None:
        """Withdraw an entry."""
        at = int(self._slot_of_entry[entry])
        assert at != _NO_SLOT
        self._slot_of_entry[entry] = _NO_SLOT
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

    def _know(self, entry: int) -> None:
        if entry >= (known := len(self._slot_of_entry)):
            more = np.full(max(known, entry + 1 - known), _NO_SLOT, np.int32)
            self._slot_of_entry = np.concatenate([self._slot_of_entry, more])


def _nearest(kinds: bytearray, start: int, end: int) -> int:
    """The first slot in a range that is free or withdrawn; -1 where there is none."""
    free = kinds.find(_FREE, start, end)
    gone = kinds.find(_GONE, start, end if free < 0 else free)
    return free if gone < 0 else gone
