"""Publishes the block table's residency to clients on this host: ``kvservice_api/residency_directory.py``.

The table tells of every row that is linked, unlinked, or gains or loses a copy, and the slot is
changed before that call returns. So a block is published after lookups find it, and withdrawn
before the commit that allows its bytes to be lent again. Clients may see a slot late: a stale hit
costs them a lookup that misses.

A directory is a convenience. Where there is no space for it there is none, and nothing else fails.
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
    WITHDRAWN_SLOT,
    DirectoryState,
    Header,
    Slots,
    encode_slot,
    home_slot,
    home_slots,
    layout_mark,
    seal_slots,
)

log = logging.getLogger(__name__)

_FILL_MAX = 0.7
_SLOTS_MIN = 1 << 12
_FREE_SHARE = 16  # At the start it takes no more than this part of what the tmpfs has left: the arena needs it.
_ROWS_A_TURN = 512  # A millisecond of the event loop.

_NO_SLOT = -1
_FREE, _GONE, _TAKEN = 0, 1, 2
_WORDS_PER_SLOT = SLOT_BYTES // 4
_FIRST_WORD = HEADER_BYTES // 4
assert (_FREE, _GONE) == (0, 1)  # Counted in `DirectoryTable._take`.


class ResidencyDirectory:
    """The directory of one life of a daemon. `path` is empty where there is none."""

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
        """Make the file, marked as being built, in place of one that an earlier daemon left. Never fails."""
        self._blocks = blocks
        self._file = folder / FILE_NAME
        self._next_file = folder / f"{FILE_NAME}.next"
        self._identity = (store_id, arena_id, boot_epoch)
        self._bytes_max = bytes_max
        self._slots_min = slots_min
        self._calls = calls or FileCalls()
        self._current: DirectoryTable | None = None  # What stands under the file's name.
        self._next: DirectoryTable | None = None  # What is going to.
        self._crowded = asyncio.Event()
        self._mark = functools.cache(lambda layout_id: layout_mark(layouts[layout_id].fingerprint))
        self._open()

    @property
    def path(self) -> str:
        """Where clients find it; empty where there is none."""
        return str(self._file.absolute()) if self._current is not None else ""

    async def keep(self) -> None:
        """Fill the directory, and put another one in its place whenever it runs full. Ends where there is none."""
        if self._current is not None and await self._fill(self._current):
            self._current.set_state(DirectoryState.LIVE)
        while self._current is not None:
            await self._crowded.wait()
            self._crowded.clear()
            await self._replace()

    def close(self) -> None:
        """Tell readers that the directory is no longer up to date, and free its memory."""
        self._blocks.on_change = None
        for table in (self._current, self._next):
            if table is not None:
                table.close(DirectoryState.CLOSED)
        self._current = self._next = None
        self._crowded.set()  # `keep` returns.
        for path in (self._file, self._next_file):
            with contextlib.suppress(OSError):
                path.unlink()

    # What the block table tells

    def _changed(self, row: int) -> None:
        try:
            for table in (self._current, self._next):
                if table is not None:
                    self._update(table, row)
        except TableFull:  # It should have been replaced long ago.
            self._give_up("it ran full before a larger one was ready")

    def _update(self, table: DirectoryTable, row: int) -> None:
        flags = self._flags(row)
        if flags:
            blocks = self._blocks
            key = blocks.key[row].tobytes()
            mark = self._mark(int(blocks.layout_id[row]))
            slot = encode_slot(flags, int(blocks.token_count[row]), mark, blocks.shard[row].tobytes(), key)
            table.put(row, key, slot)
            if table.fill > _FILL_MAX:
                self._crowded.set()
        elif table.has(row):
            table.withdraw(row)

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
            self._next_file.unlink(missing_ok=True)  # A daemon that was killed may have left it.
            self._current = self._make(self._file, slots)
        except OSError as error:
            self._give_up(str(error))
            return
        self._blocks.on_change = self._changed

    def _first_slots(self) -> int:
        """As many as the block table is likely to have rows, where there is space for them. 0 means none."""
        blocks = self._blocks
        least = self._slots_for(blocks.live_count)
        if HEADER_BYTES + SLOT_BYTES * least > self._bytes_max:
            if self._bytes_max:
                log.warning("no residency directory: %d bytes are too few for it", self._bytes_max)
            return 0
        file_system = os.statvfs(self._file.parent)
        size_max = min(self._bytes_max, file_system.f_bavail * file_system.f_frsize // _FREE_SHARE) - HEADER_BYTES
        slots = self._slots_for(max(blocks.rows_likely, blocks.live_count))
        while slots > least and SLOT_BYTES * slots > size_max:
            slots //= 2
        return slots

    def _slots_for(self, rows: int) -> int:
        """A power of two of slots in which so many rows leave room for some more."""
        return max(self._slots_min, 1 << int(rows / _FILL_MAX).bit_length())

    def _make(self, path: Path, slots: int) -> DirectoryTable:
        return DirectoryTable(path, Header(*self._identity, slots, DirectoryState.BUILDING), self._calls)

    async def _fill(self, table: DirectoryTable) -> bool:
        """Publish every row there is; False where the table was given up. Changes meanwhile reach it by `_changed`."""
        blocks = self._blocks
        for start in range(0, blocks.row_end, _ROWS_A_TURN):
            if table not in (self._current, self._next):
                return False
            rows = np.arange(start, min(start + _ROWS_A_TURN, blocks.row_end))
            rows = table.missing(rows[blocks.live[rows]])
            slots = self._slots(rows)
            stored = slots["flags"] != 0
            try:
                table.put_all(rows[stored], slots[stored])
            except TableFull:
                self._give_up("it ran full while it was filled")
                return False
            await asyncio.sleep(0)
        return table in (self._current, self._next)

    def _slots(self, rows: Rows) -> Slots:
        """Slots without sequence and crc. Flags are 0 where a row has no copy."""
        blocks = self._blocks
        slots = np.zeros(len(rows), SLOT)
        tiers = blocks.tier_sets(rows)
        slots["flags"] = IN_DRAM * (tiers & 1) | ON_SSD * (tiers > 1)
        for name in ("token_count", "shard", "key"):
            slots[name] = getattr(blocks, name)[rows]
        ids, which = np.unique(blocks.layout_id[rows], return_inverse=True)
        slots["layout"] = np.array([self._mark(layout_id) for layout_id in ids.tolist()], "V8")[which]
        return slots

    async def _replace(self) -> None:
        """Put another file under the name: twice as large, or free of withdrawn slots where that is enough."""
        old = self._current
        if old is None or old.fill <= _FILL_MAX:
            return
        slots = old.slot_count * 2 if old.used_slots > old.slot_count * _FILL_MAX / 2 else old.slot_count
        if HEADER_BYTES + SLOT_BYTES * slots > self._bytes_max:
            self._give_up(f"{old.used_slots} blocks would take more than the {self._bytes_max} bytes allowed")
            return
        try:
            # On a thread, for the kernel clears all pages first.
            table = await on_thread(lambda: self._make(self._next_file, slots))
            if self._current is not old:  # Given up meanwhile.
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
        old.close(DirectoryState.REPLACED)  # Not before: who reads this looks for the new one.
        self._current, self._next = table, None
        log.info("the residency directory was replaced: %d slots for %d blocks", slots, table.used_slots)

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
    """The hash table in one file, as its only writer sees it. Rows are the block table's; each has at most one slot.

    The slot of each row is kept here, not in shared memory: what a client could damage is never read back.
    """

    def __init__(self, path: Path, header: Header, calls: FileCalls) -> None:
        """Make the file and claim all its space. An earlier file of this name keeps its readers.

        Raises OSError where the space is not to be had; nothing is left behind then.
        """
        self.slot_count = header.slot_count
        self.used_slots = 0  # In use.
        self.gone_slots = 0  # Withdrawn, and not empty.
        path.unlink(missing_ok=True)
        fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            calls.posix_fallocate(fd, 0, header.file_bytes)  # Else a full tmpfs would be a SIGBUS later.
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
        """The share of slots that a search does not end at."""
        return (self.used_slots + self.gone_slots) / self.slot_count

    def set_state(self, state: DirectoryState) -> None:
        self._words[STATE_WORD] = state

    def close(self, state: DirectoryState) -> None:
        """Write the state for readers, and unmap the file. Readers may keep it mapped."""
        self.set_state(state)
        del self._words, self._slots, self._map

    def has(self, row: int) -> bool:
        return row < len(self._slot_of_row) and bool(self._slot_of_row[row] != _NO_SLOT)

    def missing(self, rows: Rows) -> Rows:
        """Those that have no slot."""
        self._know(int(rows.max(initial=0)))
        absent: Rows = rows[self._slot_of_row[rows] == _NO_SLOT]
        return absent

    def put(self, row: int, key: bytes, slot: bytes) -> None:
        """Publish a row, or change what is published of it. `slot` comes from ``encode_slot``. Raises TableFull."""
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
        """Publish nothing of a row any more."""
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
        # A search that came here would end at the next slot: so it may end here, and where nothing came before.
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
        """Three stores that no reader can mistake for something else: see the sequence's rule."""
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
