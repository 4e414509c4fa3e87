"""The SSD tier: preallocated files, extents reused in place, direct I/O on threads.

Offsets of extents count from the page after a file's header (``ssd_files.py``). Bytes move directly between the
caller's memory and the file, so memory, offsets and lengths are multiples of 4 KiB.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, TierName
from kvservice.tiers import ssd_files
from kvservice.tiers.base import PartRead, PartSums, StoreMismatch
from kvservice.tiers.extents import SpaceMap, extent_size, lie_within
from kvservice.tiers.files import WRITE, FileCalls, IoPool
from kvservice.tiers.ssd_files import FileHeader, is_missing
from kvservice_api.errors import StorageFailed, TierFull
from kvservice_api.file_parts import FilePart, sums_of
from kvservice_api.image import PAGE_BYTES

log = logging.getLogger(__name__)

_TRIED_AGAIN_EVERY = 64  # One of so many reservations may be in a file whose writes fail.

T = TypeVar("T")
_Call = Callable[[int, Sequence[memoryview], int], int]


class SsdTier:
    """The tier over its files, by number. A file that is too large, or is to leave, stays so until `truncate`."""

    def __init__(
        self,
        files: dict[int, _File],
        headers: dict[int, FileHeader],
        io_threads: int,
        name: TierName,
        calls: FileCalls,
    ) -> None:
        """Use `open`."""
        self._name = name
        self._files = files
        self._headers = headers  # As they are to be; none for a file that leaves.
        self._calls = calls
        # Per file, as each is on a drive of its own: a slow drive keeps no other one waiting.
        self._pools = {number: IoPool(io_threads) for number in files}
        self._touched: set[int] = set()  # Files that were written since their last flush.
        self._sync_lock = threading.Lock()
        self._reserved = 0  # Calls of `reserve`.

    @classmethod
    def open(
        cls,
        paths: Sequence[Path | None],
        *,
        store_id: bytes,
        capacity_bytes: int | None,
        io_threads: int,
        calls: FileCalls | None = None,
        direct: Literal["auto", "off"] = "auto",
        name: TierName = TierName.SSD,
        creatable: Collection[int] | None = None,
        leaving: Collection[int] = (),
    ) -> SsdTier:
        """Open the files, by number, creating those that are missing and growing those that are too small.

        `capacity_bytes` is shared evenly among the files without those of `leaving`; None keeps all sizes. `creatable`
        are the numbers of the files that may be created; None means all. `io_threads` is the number per file. If any
        file cannot be used, none is created or changed. Raises StoreMismatch for a file of another store, and for a
        missing file that may not be created; OSError if the disk is full.
        """
        calls = calls or FileCalls()
        files = {number: path for number, path in enumerate(paths) if path is not None}
        staying = [number for number in files if number not in leaving]
        missing = [number for number, path in files.items() if is_missing(path)]
        found = {
            number: ssd_files.expect_file(path, store_id, number)
            for number, path in files.items()
            if number not in missing
        }
        for number in missing:
            if creatable is not None and number not in creatable:
                raise StoreMismatch(
                    f"{files[number]} is missing, and the store has blocks in it: mount its drive or restore the file, "
                    "or drop the blocks with `kvservice check --repair`"
                )
        wanted = dict.fromkeys(files, 0)
        for number in staying:
            if capacity_bytes is None:
                wanted[number] = found[number].size_bytes
            else:
                share = capacity_bytes // len(staying) // PAGE_BYTES * PAGE_BYTES
                wanted[number] = max(0, share - PAGE_BYTES)
        headers = {number: FileHeader(store_id, number, len(staying), wanted[number]) for number in staying}
        opened: dict[int, _File] = {}
        try:
            for number, header in found.items():
                opened[number] = _File(
                    files[number], header.size_bytes, calls, direct=direct == "auto", read_only=number in leaving
                )
            for number in missing:
                ssd_files.create(files[number], headers[number], calls)
                opened[number] = _File(files[number], wanted[number], calls, direct=direct == "auto")
            for number, header in found.items():
                if header.size_bytes < wanted[number]:
                    log.info("%s grows from %d to %d bytes", files[number], header.size_bytes, wanted[number])
                    ssd_files.resize(files[number], headers[number], calls)
                    opened[number].space.grow(wanted[number])
        except BaseException:
            for file in opened.values():
                file.close()
            raise
        tier = cls(opened, headers, io_threads, name, calls)
        if capacity_bytes is not None and not tier.is_too_large:
            tier.truncate()
        return tier

    @property
    def is_too_large(self) -> bool:
        """Whether the settings ask for less than the files have: see the class."""
        return any(self._wanted(number) < file.space.capacity_bytes for number, file in self._files.items())

    def _wanted(self, number: int) -> int:
        return self._headers[number].size_bytes if number in self._headers else 0

    def shrink(self) -> None:
        """Reserve nothing beyond the new sizes any more."""
        for number, file in self._files.items():
            file.space.shrink(min(file.space.capacity_bytes, self._wanted(number)))

    def truncate(self) -> None:
        """Cut the files to their new sizes, and delete those that leave."""
        for number in [number for number in self._files if number not in self._headers]:
            file = self._files.pop(number)
            self._pools.pop(number).close()
            assert not file.space.used_bytes
            self._touched.discard(number)
            file.close()
            try:
                ssd_files.delete(file.path)
            except OSError as error:  # A failing drive is often read-only.
                log.warning("%s has no blocks any more, and cannot be deleted: %s", file.path, error.strerror)
            else:
                log.info("%s has no blocks any more, and is deleted", file.path)
        for number, header in self._headers.items():
            ssd_files.resize(self._files[number].path, header, self._calls)

    @property
    def capacity_bytes(self) -> int:
        return sum(file.space.capacity_bytes for file in self._files.values())

    @property
    def used_bytes(self) -> int:
        return sum(file.space.used_bytes for file in self._files.values())

    @property
    def refusing_because(self) -> str:
        """Why no file can be written; empty while one can."""
        reasons = [file.refusing_because for file in self._files.values()]
        return reasons[0] if all(reasons) else ""

    @property
    def is_direct(self) -> bool:
        """Whether I/O bypasses the page cache."""
        return all(file.is_direct for file in self._files.values())

    def could_hold(self, size_bytes: int) -> bool:
        return extent_size(size_bytes) <= max(file.space.capacity_bytes for file in self._files.values())

    async def grown(self) -> bool:
        return False  # Files have their full size from the start.

    def reserve(self, size_bytes: int) -> Extent:
        """Space in the file with the most free space. Where writes to some files fail and others work, it is in one
        that works, also if space must be freed there; now and then in another, because a write that succeeds ends that.
        """
        self._reserved += 1
        files = [number for number, file in self._files.items() if file.space.capacity_bytes]
        working = [number for number in files if not self._files[number].refusing_because]
        usable = working if working and self._reserved % _TRIED_AGAIN_EVERY else files

        def rank(number: int) -> tuple[bool, int]:
            file = self._files[number]
            return not file.refusing_because, file.space.used_bytes

        for number in sorted(usable, key=rank):
            space = self._files[number].space
            if space.largest_free_bytes >= extent_size(size_bytes):
                return Extent(number, space.reserve(size_bytes), extent_size(size_bytes))
        raise TierFull(
            f"no file of the tier {self._name} has a free run of {extent_size(size_bytes)} bytes", tier=self._name
        )

    def release(self, extent: Extent) -> None:
        self._files[extent.segment].space.release(extent.offset_bytes, extent.size_bytes)

    def holds(
        self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]
    ) -> NDArray[np.bool_]:
        capacities = np.zeros(max(self._files) + 1, np.uint64)
        for number, file in self._files.items():
            capacities[number] = file.space.capacity_bytes
        known = segments.astype(np.int64) < len(capacities)
        here = np.where(known, segments, 0).astype(np.int64)
        return known & lie_within(offsets, sizes, capacities[here])

    def adopt(self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]) -> None:
        for number, file in self._files.items():
            here = segments == number
            file.space.adopt(offsets[here].astype(np.int64), sizes[here].astype(np.int64))

    async def write(
        self, extent: Extent, offset_bytes: int, data: memoryview, first: Callable[[memoryview], object] | None = None
    ) -> None:
        assert offset_bytes + len(data) <= extent.size_bytes
        file = self._files[extent.segment]
        position = extent.offset_bytes + offset_bytes

        def work() -> None:
            try:
                file.write(data, position)
            finally:
                self._touched.add(extent.segment)

        await self._pools[extent.segment].run(WRITE, work, None if first is None else partial(first, data))

    def flush_failures(self, extent: Extent) -> int:
        return self._files[extent.segment].flush_failures

    async def seal(self, extent: Extent) -> None:
        """No effect: `sync` makes the bytes durable, for all extents of a commit in one step."""

    async def read(
        self,
        extent: Extent,
        offset_bytes: int,
        into: memoryview,
        then: Callable[[memoryview], T] | None = None,
        *,
        priority: float = 0.0,
    ) -> T | None:
        assert offset_bytes + len(into) <= extent.size_bytes
        file = self._files[extent.segment]
        position = extent.offset_bytes + offset_bytes

        def work() -> T | None:
            file.read(into, position)
            return then(into) if then is not None else None

        return await self._pools[extent.segment].run(priority, work)

    async def read_together(
        self,
        segment: int,
        take: Callable[[], Sequence[PartRead]],
        then: Callable[[list[PartSums]], None],
        *,
        priority: float = 0.0,
    ) -> None:
        """As `base.read_together`: one job of a thread, and one read for parts with small gaps between them, as the end
        of a block and the begin of the next one.
        """
        file = self._files[segment]

        def work() -> None:
            parts = take()
            order = sorted(range(len(parts)), key=lambda number: _place(parts[number]))
            found = file.read_parts(
                [FilePart(_place(parts[number]), parts[number].into, parts[number].ranges) for number in order]
            )
            then([sums for _, sums in sorted(zip(order, found, strict=True), key=lambda each: each[0])])

        await self._pools[segment].run(priority, work)

    def sync(self) -> None:
        """Flush the files written since the last sync, all of them. Called on any thread, before their records' commit.

        Raises StorageFailed if some could not be flushed; these still need a flush.
        """
        failures: list[StorageFailed] = []
        with self._sync_lock:  # A second caller must not return while a flush still runs.
            for number in sorted(self._touched):
                self._touched.discard(number)  # Before the flush: a write during it is not covered by it.
                try:
                    self._files[number].sync()
                except StorageFailed as error:
                    self._touched.add(number)
                    failures.append(error)  # The other files are on other drives.
        if failures:
            raise StorageFailed("; ".join(error.message for error in failures), **failures[0].details)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        for file in self._files.values():
            file.close()


def _place(part: PartRead) -> int:
    return part.extent.offset_bytes + part.offset_bytes


class _File:
    """One preallocated file and its free space."""

    def __init__(self, path: Path, size: int, calls: FileCalls, *, direct: bool, read_only: bool = False) -> None:
        self.path = path
        self._calls = calls
        self.space = SpaceMap(size)
        self._write_refused = ""
        self._flush_refused = ""
        self.flush_failures = 0
        self._fd = calls.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.is_direct = False
        if direct and not read_only:
            self._try_direct()

    @property
    def refusing_because(self) -> str:
        """Why the last write or flush failed; empty after one that succeeded."""
        return self._write_refused or self._flush_refused

    def read(self, into: memoryview, position: int) -> None:
        try:
            self._transfer(self._calls.preadv, into, position)
        except OSError as error:
            raise self._failure(f"could not read {len(into)} bytes at {position} of", error) from error

    def read_parts(self, parts: Sequence[FilePart]) -> list[PartSums]:
        """Fill several buffers from their positions, which rise, with few calls if these move all bytes."""
        placed = [FilePart(PAGE_BYTES + position, into, ranges) for position, into, ranges in parts]
        found = list[PartSums]()
        for (position, into, ranges), sums in zip(parts, self._calls.read_parts(self._fd, placed), strict=True):
            if sums is not None:
                found.append(sums)
                continue
            try:  # Alone: a call may have moved less, and an error is of one part.
                self.read(into, position)
            except StorageFailed as error:
                found.append(error)
            else:
                found.append(sums_of(into, ranges))
        return found

    def write(self, data: memoryview, position: int) -> None:
        try:
            self._transfer(self._calls.pwritev, data, position)
        except OSError as error:
            failure = self._failure(f"could not write {len(data)} bytes at {position} of", error)
            self._write_refused = failure.message
            raise failure from error
        self._write_refused = ""

    def sync(self) -> None:
        try:
            self._calls.fdatasync(self._fd)
        except OSError as error:
            self.flush_failures += 1
            failure = self._failure("could not flush", error)
            self._flush_refused = failure.message
            raise failure from error
        self._flush_refused = ""

    def _transfer(self, call: _Call, data: memoryview, position: int) -> None:
        """Move all of `data`. A call may move less; the next one continues, with direct I/O from a page boundary."""
        done = 0
        while done < len(data):
            count = call(self._fd, [data[done:]], PAGE_BYTES + position + done)
            if self.is_direct and done + count < len(data):
                count -= count % PAGE_BYTES
            if not count:
                raise OSError(errno.EIO, f"only {done} bytes were moved")
            done += count

    def _failure(self, what: str, error: OSError) -> StorageFailed:
        name = errno.errorcode.get(error.errno or 0, "unknown")
        return StorageFailed(f"{what} {self.path}: {error.strerror or error} ({name})", errno=name)

    def close(self) -> None:
        os.close(self._fd)

    def _try_direct(self) -> None:
        """Use direct I/O if the header's page can be read and written back with it."""
        try:
            fd = self._calls.open(self.path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            return
        try:
            with mmap.mmap(-1, PAGE_BYTES) as memory, memoryview(memory) as page:
                works = (
                    self._calls.preadv(fd, [page], 0) == PAGE_BYTES and self._calls.pwritev(fd, [page], 0) == PAGE_BYTES
                )
        except OSError:
            works = False
        if works:
            os.close(self._fd)
            self._fd, self.is_direct = fd, True
        else:
            os.close(fd)
            log.info("O_DIRECT does not work for %s; the page cache is used", self.path)
