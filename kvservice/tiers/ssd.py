"""The SSD tier: preallocated files, extents reused in place, direct I/O on threads.

Each file begins with a page that names its store, its number and its size; offsets of extents count from the page after
it. Bytes move directly between the caller's memory and the file, so memory, offsets and lengths are multiples of 4 KiB.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, TierName
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.extents import SpaceMap, extent_size, lie_within
from kvservice.tiers.files import WRITE, FileCalls, IoPool
from kvservice_api.errors import StorageFailed, TierFull
from kvservice_api.image import PAGE_BYTES

log = logging.getLogger(__name__)

T = TypeVar("T")
_Call = Callable[[int, Sequence[memoryview], int], int]

#  | "KVSSD001" | store id 16 | file number u32 | file count u32 | size u64 |     little-endian
_HEADER = struct.Struct("<8s16sIIQ")
_MAGIC = b"KVSSD001"
assert _HEADER.size == 40


class SsdTier:
    def __init__(self, files: list[_File], io_threads: int, name: TierName) -> None:
        """Use `open`."""
        self._name = name
        self._files = files
        self._pool = IoPool(io_threads)
        self._touched: set[int] = set()  # Files that were written since their last flush.
        self._sync_lock = threading.Lock()

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        *,
        store_id: bytes,
        capacity_bytes: int,
        io_threads: int,
        calls: FileCalls | None = None,
        direct: Literal["auto", "off"] = "auto",
        name: TierName = TierName.SSD,
        creatable: Collection[int] | None = None,
    ) -> SsdTier:
        """Open the files, creating those that are missing. `capacity_bytes` is shared evenly among them.

        `creatable` are the numbers of the files that may be created; None means all. If any file cannot be used, none
        is created. Raises StoreMismatch for a file of another store or another capacity, and for a missing file that
        may not be created; OSError if the disk is full.
        """
        calls = calls or FileCalls()
        size = max(0, capacity_bytes // len(paths) // PAGE_BYTES * PAGE_BYTES - PAGE_BYTES)
        headers = [_HEADER.pack(_MAGIC, store_id, number, len(paths), size) for number in range(len(paths))]
        missing = [number for number, path in enumerate(paths) if is_missing(path)]
        for number, path in enumerate(paths):
            if number not in missing:
                _check(path, headers[number], size)
            elif creatable is not None and number not in creatable:
                raise StoreMismatch(
                    f"{path} is missing, and the store has blocks in it: mount its drive or restore the file, or "
                    "drop the blocks with `kvservice check --repair`"
                )
        files: list[_File] = []
        try:
            for number, path in enumerate(paths):
                if number in missing:
                    _create(path, headers[number], size, calls)
                files.append(_File(path, size, calls, direct=direct == "auto"))
        except BaseException:
            for file in files:
                file.close()
            raise
        return cls(files, io_threads, name)

    @property
    def capacity_bytes(self) -> int:
        return sum(file.space.capacity_bytes for file in self._files)

    @property
    def used_bytes(self) -> int:
        return sum(file.space.used_bytes for file in self._files)

    @property
    def refusing_because(self) -> str:
        """Why no file can be written; empty while one can."""
        reasons = [file.refusing_because for file in self._files]
        return reasons[0] if all(reasons) else ""

    @property
    def is_direct(self) -> bool:
        """Whether I/O bypasses the page cache."""
        return all(file.is_direct for file in self._files)

    def could_hold(self, size_bytes: int) -> bool:
        return extent_size(size_bytes) <= max(file.space.capacity_bytes for file in self._files)

    async def grown(self) -> bool:
        return False  # Files have their full size from the start.

    def reserve(self, size_bytes: int) -> Extent:
        """Space in the file with the most free space; files with failed writes come last."""

        def rank(number: int) -> tuple[bool, int]:
            file = self._files[number]
            return bool(file.refusing_because), file.space.used_bytes

        for number in sorted(range(len(self._files)), key=rank):
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
        capacities = np.array([file.space.capacity_bytes for file in self._files], np.uint64)
        known = segments.astype(np.int64) < len(capacities)
        here = np.where(known, segments, 0).astype(np.int64)
        return known & lie_within(offsets, sizes, capacities[here])

    def adopt(self, segments: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]) -> None:
        for number, file in enumerate(self._files):
            here = segments == number
            file.space.adopt(offsets[here].astype(np.int64), sizes[here].astype(np.int64))

    async def write(
        self, extent: Extent, offset_bytes: int, data: memoryview, first: Callable[[memoryview], object] | None = None
    ) -> None:
        assert offset_bytes + len(data) <= extent.size_bytes
        file = self._files[extent.segment]
        position = extent.offset_bytes + offset_bytes

        def work() -> None:
            if first is not None:
                first(data)
            try:
                file.write(data, position)
            finally:
                self._touched.add(extent.segment)

        await self._pool.run(WRITE, work)

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

        return await self._pool.run(priority, work)

    def sync(self) -> None:
        """Flush the files written since the last sync. Called on any thread, before their records' commit.

        Raises StorageFailed; the file then still needs a flush.
        """
        with self._sync_lock:  # A second caller must not return while a flush still runs.
            for number in sorted(self._touched):
                self._touched.discard(number)  # Before the flush: a write during it is not covered by it.
                try:
                    self._files[number].sync()
                except StorageFailed:
                    self._touched.add(number)
                    raise

    def close(self) -> None:
        self._pool.close()
        for file in self._files:
            file.close()


class _File:
    """One preallocated file and its free space."""

    def __init__(self, path: Path, size: int, calls: FileCalls, *, direct: bool) -> None:
        self._path = path
        self._calls = calls
        self.space = SpaceMap(size)
        self._write_refused = ""
        self._flush_refused = ""
        self.flush_failures = 0
        self._fd = calls.open(path, os.O_RDWR)
        self.is_direct = False
        if direct:
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
        return StorageFailed(f"{what} {self._path}: {error.strerror or error} ({name})", errno=name)

    def close(self) -> None:
        os.close(self._fd)

    def _try_direct(self) -> None:
        """Use direct I/O if the header's page can be read and written back with it."""
        try:
            fd = self._calls.open(self._path, os.O_RDWR | os.O_DIRECT)
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
            log.info("O_DIRECT does not work for %s; the page cache is used", self._path)


def is_missing(path: Path) -> bool:
    """Whether the file does not exist. Raises OSError if that cannot be determined."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


class Origin(NamedTuple):
    """The identity of an SSD file: file `number` of `of` of a store."""

    store_id: bytes
    number: int
    of: int


def origin_of(path: Path) -> Origin | None:
    """None if it is not an SSD file of this version. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        return None
    _, store_id, number, count, _ = _HEADER.unpack(data)
    return Origin(store_id, number, count)


def _create(path: Path, header: bytes, size: int, calls: FileCalls) -> None:
    """Allocate the file completely or not at all: it has another name until all its blocks are allocated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    fd = calls.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        calls.posix_fallocate(fd, 0, PAGE_BYTES + size)
        os.pwrite(fd, header, 0)
        calls.fdatasync(fd)
        partial.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        text = f"{error.strerror}: an SSD file of {PAGE_BYTES + size} bytes cannot be made"
        raise OSError(error.errno, text, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    """Make a new name in the folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check(path: Path, expected: bytes, size: int) -> None:
    with path.open("rb") as file:
        found = file.read(len(expected))
        found_size = os.fstat(file.fileno()).st_size
    if found == expected and found_size == PAGE_BYTES + size:
        return
    magic, store_id, number, count, header_size = (
        _HEADER.unpack(found) if len(found) == _HEADER.size else (b"", b"", 0, 0, 0)
    )
    if magic != _MAGIC:
        raise StoreMismatch(f"{path} is no SSD file of this version: move it away, or name another folder")
    if store_id != _HEADER.unpack(expected)[1]:
        raise StoreMismatch(f"{path} belongs to another store: name that store, or another folder for its files")
    raise StoreMismatch(
        f"{path} was made for file {number + 1} of {count} with {header_size} bytes and has {found_size}; the settings "
        f"ask for {size} bytes. The size of an SSD tier is fixed: restore the settings, or start a new store"
    )
