"""The arena: one shared-memory file that outlives the daemon.

Its first page is a header; offsets of extents count from the page after it. Extents use only the part that the kernel
has allocated (``posix_fallocate``), so a full tmpfs means a smaller tier and never SIGBUS. A background thread
allocates the pages and then faults them in, without writing to them, because they may hold live blocks.

The formats of the arena and of the files beside it are in ``kvservice_api/arena.py``.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.files import FileCalls
from kvservice.tiers.generations import Generations
from kvservice_api.arena import (
    ARENA_NAME,
    GENERATIONS_NAME,
    HEADER_BYTES,
    WRITERS_NAME,
    ArenaHeader,
    generations_file_bytes,
)
from kvservice_api.image import PAGE_BYTES
from kvservice_api.mapping import HUGE_PAGE_BYTES, Mapping

log = logging.getLogger(__name__)

NEW_ARENA_NAME = "arena.new"  # A smaller arena, until it replaces the arena.

_STEP_BYTES = 64 << 20
_STEP_BYTES_MIN = 1 << 20  # Shared memory that stays free for other programs, such as an engine.

# Both calls hold the lock of the process's memory map, on which other threads wait that allocate memory. So each call
# is for a small part.
_FAULT_IN_BYTES = 1 << 20
_REFUSALS_MAX = 16  # Give up after some failures: a page may be busy, or the kernel has no huge pages, or none free.


def arena_directory(parent: Path, store_id: bytes) -> Path:
    """The folder of a store's arena in the tmpfs `parent`."""
    return parent / f"kvservice-{store_id.hex()[:16]}"


class Arena:
    """An open arena. `data` is the memory after the header; only the first `ready_bytes` of it may be accessed.

    `capacity_bytes` counts without the header.
    """

    def __init__(
        self,
        directory: Path,
        lock_fd: int,
        fd: int,
        capacity_bytes: int,
        arena_id: bytes,
        why_new: str,
        calls: FileCalls,
    ) -> None:
        """Use `open`."""
        self.directory = directory
        self.capacity_bytes = self.wanted_bytes = capacity_bytes  # What it has, and what the settings ask for.
        self.arena_id = arena_id
        self.why_new = why_new
        self.short_because = ""  # Why less than `capacity_bytes` is allocated.
        self.not_grown_because = ""  # Why `capacity_bytes` is less than `wanted_bytes`.
        self.generations: Generations | None = None  # None: clients were never allowed to read in place.
        self.not_shared_because = "dram.share is off"
        self.ready_bytes = 0
        self._limit_bytes, self._limited_because = capacity_bytes, ""
        self._may_have_holes = True
        self._calls = calls
        self._lock_fd = lock_fd
        self._fd = fd
        self._map = Mapping(fd, PAGE_BYTES + capacity_bytes, writable=True)
        self.data = self._map.bytes.data[PAGE_BYTES:]
        self._refusals = 0  # Bytes in huge pages.
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def open(
        cls,
        parent: Path,
        store_id: bytes,
        capacity_bytes: int,
        *,
        calls: FileCalls | None = None,
        has_index: Callable[[bytes], bool] | None = None,
    ) -> Arena:
        """Open the store's arena, or create one. An arena of another store or version is replaced.

        `capacity_bytes` is the maximum size of the file, with its header. A smaller arena grows. A larger one keeps
        its size, because blocks may be beyond `wanted_bytes`: see `create_smaller`. `has_index` says whether the index
        is of the arena with this id; without it, a replacement that was interrupted is left as it is. Raises
        StoreMismatch if another daemon uses the arena, OSError if not even the first page can be allocated.
        """
        calls = calls or FileCalls()
        capacity_bytes = max(0, capacity_bytes // PAGE_BYTES * PAGE_BYTES - PAGE_BYTES)
        directory = arena_directory(parent, store_id)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreMismatch(f"another daemon uses the arena in {directory}: stop it first") from None
            if has_index is not None:
                _end_replacement(directory, store_id, has_index)
            path, not_grown = directory / ARENA_NAME, ""
            header, why_new = examine(path, store_id)
            if header is None:
                header = _create(path, store_id, capacity_bytes, calls)
            elif header.capacity_bytes < capacity_bytes:
                header, not_grown = _grow(path, header, capacity_bytes, calls)
            fd = calls.open(path, os.O_RDWR)
            try:
                arena = cls(directory, lock_fd, fd, header.capacity_bytes, header.arena_id, why_new, calls)
                arena.wanted_bytes, arena.not_grown_because = capacity_bytes, not_grown
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            os.close(lock_fd)
            raise
        if not why_new:
            arena._find_allocated()
            if header.has_generations:
                arena.generations = Generations(directory, arena.capacity_bytes, calls)
        return arena

    def share(self) -> None:
        """Allow clients to read in place, if there is space for the generations; else set `not_shared_because`."""
        try:
            (self.directory / WRITERS_NAME).mkdir(mode=0o700, exist_ok=True)
            if self.generations is None:
                Generations.create(self.directory, self.arena_id, self.capacity_bytes, self._calls)
                header = ArenaHeader.decode(os.pread(self._fd, HEADER_BYTES, 0))
                os.pwrite(self._fd, header._replace(has_generations=True).encode(), 0)
                self.generations = Generations(self.directory, self.capacity_bytes, self._calls)
            self.not_shared_because = ""
        except OSError as error:
            self.not_shared_because = f"{error.strerror}: no space for the generations in {self.directory}"
            log.warning("clients cannot read in place: %s", self.not_shared_because)

    @property
    def is_too_large(self) -> bool:
        return self.wanted_bytes < self.capacity_bytes

    def create_smaller(self) -> Arena:
        """Create a second, empty arena of the wanted size in the same folder. It takes this one's place with
        `replace_old`; until then a start deletes it, unless the index is of it. Both hold the folder's lock.

        Clients may have this arena mapped, so its file is never cut, and it has no holes: reading or writing one would
        allocate memory, and end the process with SIGBUS where there is none. Raises OSError.
        """
        store_id = ArenaHeader.decode(os.pread(self._fd, HEADER_BYTES, 0)).store_id
        header = _create(self.directory / NEW_ARENA_NAME, store_id, self.wanted_bytes, self._calls)
        fd = self._calls.open(self.directory / NEW_ARENA_NAME, os.O_RDWR)
        lock_fd = os.dup(self._lock_fd)
        try:
            return Arena(self.directory, lock_fd, fd, header.capacity_bytes, header.arena_id, "", self._calls)
        except BaseException:
            os.close(fd)
            os.close(lock_fd)
            raise

    def allocate(self, size_bytes: int) -> None:
        """Allocate the first `size_bytes`, or as many as there is memory for: see `ready_bytes`. Before `prepare`."""
        end = self.ready_bytes
        while end < size_bytes and (grown := self._allocate(end, min(end + _STEP_BYTES, size_bytes))) > end:
            end = grown
        self.short_because = ""  # `prepare` tries again.

    def replace_old(self) -> None:
        """Take the place of the arena that created this one. Its file stays valid for those that have it mapped."""
        _replace(self.directory)

    def discard(self) -> None:
        """Close and delete an arena that `create_smaller` made."""
        (self.directory / NEW_ARENA_NAME).unlink(missing_ok=True)
        self.close()

    def _find_allocated(self) -> None:
        """Set `ready_bytes` of an arena that existed before."""
        # It is allocated from its start on, so its number of pages shows how much was allocated.
        allocated = os.fstat(self._fd).st_blocks * 512 // PAGE_BYTES * PAGE_BYTES - PAGE_BYTES
        allocated = min(max(allocated, 0), self.capacity_bytes)
        self._may_have_holes = allocated < self.capacity_bytes
        if self._may_have_holes and self._has_data_after(allocated):  # A client wrote where nothing was allocated.
            self.allocate(allocated)
        else:
            self.ready_bytes = allocated

    def _has_data_after(self, offset_bytes: int) -> bool:
        try:
            os.lseek(self._fd, PAGE_BYTES + offset_bytes, os.SEEK_DATA)
        except OSError:  # ENXIO: there is none. EINVAL: the file system does not say.
            return False
        return True

    def limit(self, size_bytes: int, why: str) -> None:
        """Allocate at most `size_bytes`, for the reason `why`; pages that are allocated already stay.

        Call it before the arena is prepared. The file keeps its size, so a later start can continue the allocation.
        """
        self._limit_bytes = max(self.ready_bytes, size_bytes // PAGE_BYTES * PAGE_BYTES)
        self._limited_because = why

    @property
    def missing_bytes(self) -> int:
        """Bytes of memory that it will still allocate, as far as the file system has them."""
        return max(0, min(self._target_bytes - self.ready_bytes, self.free_bytes))

    def prepare_first_step(self) -> None:
        """Allocate a first part that takes little time, so that the tier always has space.

        Leaves half of the file system's free space, because the index of the arena's blocks needs some.
        """
        half_free = self.free_bytes // 2 // PAGE_BYTES * PAGE_BYTES
        if (size := min(_STEP_BYTES, self._target_bytes - self.ready_bytes, half_free)) > 0:
            self._allocate(self.ready_bytes, self.ready_bytes + size)
            self.short_because = ""  # `prepare` tries again.

    def prepare(self, on_more: Callable[[int], None]) -> None:
        """Allocate and fault in on a thread, which calls `on_more` with the number of ready bytes."""
        thread = threading.Thread(target=self._prepare, args=(on_more,), name="arena", daemon=True)
        thread.start()
        self._thread = thread

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self._fd)
        os.close(self._lock_fd)
        # Tests and tracebacks may still have views of the map; it is unmapped with the last of them.
        del self.data, self._map

    @property
    def _target_bytes(self) -> int:
        return min(self.capacity_bytes, self._limit_bytes)

    @property
    def free_bytes(self) -> int:
        """The free space of its file system."""
        file_system = os.fstatvfs(self._fd)
        return file_system.f_bavail * file_system.f_frsize

    def _prepare(self, on_more: Callable[[int], None]) -> None:
        start, target = 0, self._target_bytes
        while start < target and not self._stopping.is_set():
            end = min(start + _STEP_BYTES, target)
            if self._may_have_holes:
                end = self._allocate(start, end)
                self._join_pages(start, end)
                on_more(self.ready_bytes)
            else:
                self._join_pages(start, end)
            if end == start:
                log.warning("the DRAM tier stays smaller than configured: %s", self.short_because)
                return
            self._fault_in(start, end)
            start = end
        if start == target < self.capacity_bytes:
            self.short_because = self._limited_because
            on_more(self.ready_bytes)  # Wakes saves that wait for more space: there will be none.

    def _allocate(self, start: int, end: int) -> int:
        """Make the kernel allocate the pages after `start`, which is ready at most. Returns the end of the allocated
        part.

        Live blocks among them are not changed.
        """
        while True:
            try:
                self._calls.posix_fallocate(self._fd, PAGE_BYTES + start, end - start)
            except OSError as error:
                half = (end - start) // 2 // PAGE_BYTES * PAGE_BYTES
                if half < _STEP_BYTES_MIN:
                    self.short_because = (
                        f"{error.strerror}: {self.directory} had space for {self.ready_bytes} of "
                        f"{self.capacity_bytes} bytes"
                    )
                    return start
                end = start + half
            else:
                self.ready_bytes = max(self.ready_bytes, end)
                return end

    def _join_pages(self, start: int, end: int) -> None:
        """Collapse these bytes to huge pages, where they fill whole ones. Their content does not change."""
        # Offsets in the file, with the header. The first one was not filled by the bytes before these.
        first = (PAGE_BYTES + start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        for offset in range(first, PAGE_BYTES + end - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
            if self._stopping.is_set() or self._refusals == _REFUSALS_MAX:
                return
            self._refusals += not self._map.collapse(offset)

    def _fault_in(self, start: int, end: int) -> None:
        """Map the pages, for reading and writing, without changing them, to avoid later page faults."""
        for offset in range(start, end, _FAULT_IN_BYTES):
            if not self._map.fault_in(PAGE_BYTES + offset, PAGE_BYTES + min(offset + _FAULT_IN_BYTES, end)):
                return  # Kernels before 5.14 do not support it; the pages are then faulted in at their first use.


def without_generations(size_bytes: int) -> int:
    """The arena's part of `size_bytes`, which are for it and its generations."""
    arena_bytes = size_bytes * PAGE_BYTES // (PAGE_BYTES + 4) // PAGE_BYTES * PAGE_BYTES
    while arena_bytes > 0 and arena_bytes + generations_file_bytes(arena_bytes - PAGE_BYTES) > size_bytes:
        arena_bytes -= PAGE_BYTES
    return max(0, arena_bytes)


def examine(path: Path, store_id: bytes) -> tuple[ArenaHeader | None, str]:
    """The arena's header, or why the arena cannot be used."""
    try:
        header, size = _read_header(path), path.stat().st_size
    except FileNotFoundError:
        return None, "there is no arena"
    except ValueError as error:
        return None, str(error)
    if header.store_id != store_id:
        return None, "it belongs to another store"
    expected = PAGE_BYTES + header.capacity_bytes
    if size < expected:  # It is longer where a growth was interrupted.
        return None, f"it has {size} bytes instead of {expected}"
    if header.has_generations and (why := Generations.examine(path.parent, header.arena_id, header.capacity_bytes)):
        return None, why
    return header, ""


def store_of_arena(directory: Path) -> bytes:
    """The id of the store that the arena in a folder belongs to; empty if there is no arena, or of another version.

    Raises OSError.
    """
    try:
        return _read_header(directory / ARENA_NAME).store_id
    except (FileNotFoundError, ValueError):
        return b""


def _read_header(path: Path) -> ArenaHeader:
    with path.open("rb") as file:
        return ArenaHeader.decode(file.read(HEADER_BYTES))


def _replace(directory: Path) -> None:
    os.replace(directory / NEW_ARENA_NAME, directory / ARENA_NAME)
    (directory / GENERATIONS_NAME).unlink(missing_ok=True)  # The old arena's. `share` makes new ones.


def _end_replacement(directory: Path, store_id: bytes, has_index: Callable[[bytes], bool]) -> None:
    """Finish what a start began that was killed, or undo it: the commit of the index decides."""
    path = directory / NEW_ARENA_NAME
    header, _ = examine(path, store_id)
    if header is not None and has_index(header.arena_id):
        _replace(directory)
    else:
        path.unlink(missing_ok=True)


def _grow(path: Path, header: ArenaHeader, capacity_bytes: int, calls: FileCalls) -> tuple[ArenaHeader, str]:
    """The header after the growth, or why there was none. It is written last, so that a crash leaves the arena with
    its old size. Clients have mapped no more than that, so the new part is only the daemon's.
    """
    grown = header._replace(capacity_bytes=capacity_bytes)
    try:
        if header.has_generations:
            Generations.grow(path.parent, capacity_bytes, calls)
        fd = calls.open(path, os.O_RDWR)
        try:
            os.ftruncate(fd, PAGE_BYTES + capacity_bytes)
            os.pwrite(fd, grown.encode(), 0)
        finally:
            os.close(fd)
    except OSError as error:
        why = f"{error.strerror}: the arena in {path.parent} could not grow, and keeps its size"
        log.warning("the DRAM tier stays smaller than configured: %s", why)
        return header, why
    return grown, ""


def _create(path: Path, store_id: bytes, capacity_bytes: int, calls: FileCalls) -> ArenaHeader:
    path.unlink(missing_ok=True)  # A new file, because processes may still map the old one.
    header = ArenaHeader(secrets.token_bytes(16), store_id, capacity_bytes, has_generations=False)
    fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        calls.posix_fallocate(fd, 0, PAGE_BYTES)
        os.ftruncate(fd, PAGE_BYTES + capacity_bytes)
        os.pwrite(fd, header.encode(), 0)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return header
