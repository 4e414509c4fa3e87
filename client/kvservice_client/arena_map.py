"""The daemon's arena, mapped into this process: the bytes, and the generations that show their replacement."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvservice_api.arena import (
    ARENA_NAME,
    GENERATIONS_NAME,
    HEADER_BYTES,
    WRITERS_NAME,
    ArenaHeader,
    are_generations_of,
    generations_file_bytes,
)
from kvservice_api.errors import NotShared
from kvservice_api.image import PAGE_BYTES
from kvservice_api.mapping import Mapping
from kvservice_client import forks
from kvservice_client.buffers import Bytes

# Each step holds the lock of the process's memory map, and other threads that allocate memory wait.
_FAULT_IN_BYTES = 2 << 20

_GROWS_EVERY_S = 0.1
_GROWS_WITHIN_S = 2.0  # The daemon allocates a new arena in the background. It ends after this time without growth.


class ArenaMap:
    """One arena, as long as an object uses it. Its files may be deleted meanwhile; the memory stays valid.

    `data` has the bytes after the arena's header, read-only.
    """

    def __init__(self, directory: Path, arena_id: bytes, capacity_bytes: int) -> None:
        """Raises NotShared if that arena cannot be mapped here."""
        self.directory = directory
        self.arena_id = arena_id
        self._capacity_bytes = capacity_bytes
        self._faulting_in = _FaultingIn()
        self._lock = threading.Lock()
        self._writable: Bytes | None = None
        try:
            with _opened(directory / GENERATIONS_NAME, os.O_RDONLY) as fd:
                size_bytes = generations_file_bytes(capacity_bytes)
                if os.fstat(fd).st_size < size_bytes or not are_generations_of(os.pread(fd, PAGE_BYTES, 0), arena_id):
                    raise ValueError("its generations are another arena's")
                generations = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
            self.data = self._map(writable=False)
        except (OSError, ValueError) as error:
            raise NotShared(f"the arena in {directory} cannot be mapped: {error}") from error
        self._words: NDArray[np.uint32] = np.frombuffer(generations, "<u4", capacity_bytes // PAGE_BYTES, PAGE_BYTES)
        weakref.finalize(self, self._faulting_in.end)

    def is_of(self, arena_id: bytes, capacity_bytes: int) -> bool:
        """Whether this is the whole of that arena: a restarted daemon may have resized it."""
        return (self.arena_id, self._capacity_bytes) == (arena_id, capacity_bytes)

    def generations(self, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The current generations of the extents that begin at `offsets`."""
        found: NDArray[np.uint32] = self._words[offsets // PAGE_BYTES]
        return found

    def writable(self) -> Bytes:
        """As `data`, but writable; write only into extents that the daemon has reserved. Raises NotShared."""
        with self._lock:
            if self._writable is None:
                try:
                    self._writable = self._map(writable=True)
                except (OSError, ValueError) as error:
                    raise NotShared(f"the arena in {self.directory} cannot be written: {error}") from error
            return self._writable

    def _map(self, *, writable: bool) -> Bytes:
        """The bytes after the header. A background thread faults them in, because first accesses are slow."""
        with _opened(self.directory / ARENA_NAME, os.O_RDWR if writable else os.O_RDONLY) as fd:
            _check(fd, self.arena_id, self._capacity_bytes)
            mapping = Mapping(fd, PAGE_BYTES + self._capacity_bytes, writable=writable)
            self._faulting_in.start(mapping, fd)
        return mapping.bytes[PAGE_BYTES:]


class _FaultingIn:
    """The threads that map an arena's pages in the background, and the files that they have open."""

    def __init__(self) -> None:
        self._files: set[int] = set()
        self._closing = threading.Event()
        forks.register(self)

    def reset_in_child(self) -> None:
        """The threads exist only in the parent. A child closes the files, which would keep the memory allocated."""
        for file in self._files:
            with suppress(OSError):
                os.close(file)
        self._files = set()
        self._closing = threading.Event()

    def start(self, mapping: Mapping, fd: int) -> None:
        """`fd` may be closed afterwards."""
        file = os.dup(fd)
        self._files.add(file)
        thread = threading.Thread(target=self._run, args=(mapping, file), name="kvservice-arena", daemon=True)
        thread.start()

    def end(self) -> None:
        self._closing.set()

    def _run(self, mapping: Mapping, file: int) -> None:
        try:
            _fault_in(mapping, file, self._closing)
        finally:
            self._files.remove(file)
            os.close(file)


class WriterLock:
    """The lock by which the daemon knows that this process may be writing. The kernel releases it with the process.

    A forked child inherits the open file, and with it the lock. It closes the file at once, without unlocking, because
    the lock is its parent's. Otherwise the daemon would see the lock as long as the child runs.
    """

    def __init__(self, directory: Path, client_id: bytes) -> None:
        """Raises NotShared if the file cannot be created."""
        self._path = directory / WRITERS_NAME / client_id.hex()
        self._fd: int | None = None
        try:
            with forks.held_off():  # A child closes all registered files.
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                forks.register(self)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as error:
            self._close()
            raise NotShared(f"{self._path} cannot be locked: {error.strerror}") from error

    def reset_in_child(self) -> None:
        self._close()

    def release(self) -> None:
        """Release the lock: this client writes no more, and the daemon reuses its reservations. No effect in a
        child.
        """
        if self._fd is None:
            return
        with suppress(OSError):  # The arena and its folder may have been removed.
            self._path.unlink(missing_ok=True)
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # Closing is not enough where another process has the file open.
        self._close()

    def _close(self) -> None:
        with forks.held_off():  # So that a child never closes a number that has become another file's.
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)


@contextmanager
def _closed_after(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _opened(path: Path, flags: int) -> AbstractContextManager[int]:
    return _closed_after(os.open(path, flags | os.O_CLOEXEC))


def _check(fd: int, arena_id: bytes, capacity_bytes: int) -> None:
    """Raises ValueError if the file is not that arena: it is of another host, container, or daemon."""
    header = ArenaHeader.decode(os.pread(fd, HEADER_BYTES, 0))
    if header.arena_id != arena_id or header.capacity_bytes != capacity_bytes:
        raise ValueError("it is another arena than the daemon's")
    if os.fstat(fd).st_size < PAGE_BYTES + capacity_bytes:
        raise ValueError("it is shorter than its header says")


def _fault_in(mapping: Mapping, fd: int, closing: threading.Event) -> None:
    """Fault in the allocated pages, in small steps.

    Only pages that the daemon has allocated: an access to others would allocate memory beyond the limit.
    """
    done, idle_s = 0, 0.0
    while done < mapping.size_bytes and idle_s < _GROWS_WITHIN_S:
        allocated = min(os.fstat(fd).st_blocks * 512, mapping.size_bytes)
        for start in range(done, allocated, _FAULT_IN_BYTES):
            if closing.is_set() or not mapping.fault_in(start, min(start + _FAULT_IN_BYTES, allocated)):
                return  # Kernels before 5.14 do not support it; the pages are then faulted in at their first use.
        idle_s = 0.0 if allocated > done else idle_s + _GROWS_EVERY_S
        done = max(done, allocated)
        if done < mapping.size_bytes and closing.wait(_GROWS_EVERY_S):
            return
