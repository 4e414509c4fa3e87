"""The daemon's arena, mapped into this process: the bytes, and the generations that show their replacement."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

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

log = logging.getLogger(__name__)

# Each step holds the lock of the process's memory map, and other threads that allocate memory wait.
_FAULT_IN_BYTES = 2 << 20

_REGISTERED_BYTES = 256 << 20  # At a time: what is allocated is of use while the rest is registered.

_GROWS_EVERY_S = 0.1
_GROWS_WITHIN_S = 2.0  # The daemon allocates a new arena in the background. It ends after this time without growth.


class ArenaObserver(Protocol):
    """What follows an arena's mappings in this process, such as to register them for DMA.

    Called on a thread of its own for each arena, whose mappings exist until `forget` has returned. Nothing that it
    raises is caught.
    """

    def alias(self, memory: Bytes, of: Bytes) -> None:
        """`memory` is a read-only mapping of the same bytes as `of`, which is writable. Called first."""

    def register(self, memory: Bytes, begin: int, end: int) -> None:
        """These bytes of the writable mapping are allocated. Called with one part after another, in order."""

    def forget(self, memory: Bytes) -> None:
        """The writable mapping is not used any more: the daemon has replaced the arena, or the client has ended.

        Not called when the process ends.
        """


class _Mapped(NamedTuple):
    """A mapping of an arena's file, with its header."""

    mapping: Mapping
    data: Bytes  # The bytes after the header.


class ArenaMap:
    """One arena, as long as an object uses it. Its files may be deleted meanwhile; the memory stays valid.

    `data` has the bytes after the arena's header, read-only.
    """

    def __init__(self, directory: Path, arena_id: bytes, capacity_bytes: int) -> None:
        """Raises NotShared if that arena cannot be mapped here."""
        self.directory = directory
        self.arena_id = arena_id
        self._capacity_bytes = capacity_bytes
        self._threads = _Threads()
        self._lock = threading.Lock()
        self._writable: _Mapped | None = None
        try:
            with _opened(directory / GENERATIONS_NAME, os.O_RDONLY) as fd:
                size_bytes = generations_file_bytes(capacity_bytes)
                if os.fstat(fd).st_size < size_bytes or not are_generations_of(os.pread(fd, PAGE_BYTES, 0), arena_id):
                    raise ValueError("its generations are another arena's")
                generations = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
            self._readable = self._map(writable=False)
            self.data = self._readable.data
        except (OSError, ValueError) as error:
            raise NotShared(f"the arena in {directory} cannot be mapped: {error}") from error
        self._words: NDArray[np.uint32] = np.frombuffer(generations, "<u4", capacity_bytes // PAGE_BYTES, PAGE_BYTES)
        weakref.finalize(self, self._threads.end)
        unused = weakref.finalize(self, self._threads.forget)
        unused.atexit = False  # CUDA ends with the process too: calls of a thread beside that may crash it.

    def is_of(self, arena_id: bytes, capacity_bytes: int) -> bool:
        """Whether this is the whole of that arena: a restarted daemon may have resized it."""
        return (self.arena_id, self._capacity_bytes) == (arena_id, capacity_bytes)

    def generations(self, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The current generations of the extents that begin at `offsets`."""
        found: NDArray[np.uint32] = self._words[offsets // PAGE_BYTES]
        return found

    def writable(self) -> Bytes:
        """As `data`, but writable; write only into extents that the daemon has reserved. Raises NotShared."""
        return self._writable_map().data

    def observe(self, observer: ArenaObserver) -> None:
        """Have it follow this arena's mappings, if the arena can be written here."""
        try:
            writable = self._writable_map().mapping
            with _opened(self.directory / ARENA_NAME, os.O_RDONLY) as fd:
                self._threads.start(_observe, writable, fd, self._readable.mapping, observer)
        except (NotShared, OSError) as error:
            log.info("the daemon's memory is not registered for DMA: %s", error)

    def _writable_map(self) -> _Mapped:
        with self._lock:
            if self._writable is None:
                try:
                    self._writable = self._map(writable=True)
                except (OSError, ValueError) as error:
                    raise NotShared(f"the arena in {self.directory} cannot be written: {error}") from error
            return self._writable

    def _map(self, *, writable: bool) -> _Mapped:
        """A background thread faults the mapping in, because first accesses are slow."""
        with _opened(self.directory / ARENA_NAME, os.O_RDWR if writable else os.O_RDONLY) as fd:
            _check(fd, self.arena_id, self._capacity_bytes)
            mapping = Mapping(fd, PAGE_BYTES + self._capacity_bytes, writable=writable)
            self._threads.start(_fault_in, mapping, fd)
        return _Mapped(mapping, mapping.bytes[PAGE_BYTES:])


class _Threads:
    """An arena's threads, which follow its file as its memory is allocated, and the files that they have open."""

    def __init__(self) -> None:
        self._files: set[int] = set()
        self._closing, self._unused = threading.Event(), threading.Event()
        forks.register(self)

    def reset_in_child(self) -> None:
        """The threads exist only in the parent. A child closes the files, which would keep the memory allocated."""
        for file in self._files:
            with suppress(OSError):
                os.close(file)
        self._files = set()
        self._closing, self._unused = threading.Event(), threading.Event()

    def start(self, work: Callable[..., None], mapping: Mapping, fd: int, *given: object) -> None:
        """Call `work(mapping, file, closing, unused, *given)` on a thread, if there is one. `fd` may be closed
        afterwards.
        """
        with forks.held_off():  # A child closes all registered files.
            file = os.dup(fd)
            self._files.add(file)
        run = partial(self._run, work, mapping, file, *given)
        try:
            threading.Thread(target=run, name="kvservice-arena", daemon=True).start()
        except RuntimeError as error:
            self._close(file)
            log.info("the daemon's memory is used without a thread that prepares it: %s", error)

    def end(self) -> None:
        """The arena is not used any more, or the process ends."""
        self._closing.set()

    def forget(self) -> None:
        """The arena is not used any more."""
        self._unused.set()

    def _run(self, work: Callable[..., None], mapping: Mapping, file: int, *given: object) -> None:
        try:
            work(mapping, file, self._closing, self._unused, *given)
        finally:
            self._close(file)

    def _close(self, file: int) -> None:
        with forks.held_off():  # So that a child never closes a number that has become another file's.
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


def _fault_in(mapping: Mapping, fd: int, closing: threading.Event, unused: threading.Event) -> None:
    """Fault in the allocated pages, in small steps."""
    for begin, end in _allocated_parts(mapping, fd, closing):
        for start in range(begin, end, _FAULT_IN_BYTES):
            if closing.is_set() or not mapping.fault_in(start, min(start + _FAULT_IN_BYTES, end)):
                return  # Kernels before 5.14 do not support it; the pages are then faulted in at their first use.


def _observe(
    mapping: Mapping,
    fd: int,
    closing: threading.Event,
    unused: threading.Event,
    readable: Mapping,
    observer: ArenaObserver,
) -> None:
    """Keeps the mapping until the observer has forgotten it, or the process ends."""
    memory = mapping.bytes
    observer.alias(readable.bytes, memory)
    for begin, end in _allocated_parts(mapping, fd, closing):
        for start in range(begin, end, _REGISTERED_BYTES):
            if closing.is_set():
                break
            observer.register(memory, start, min(start + _REGISTERED_BYTES, end))
    unused.wait()
    observer.forget(memory)


def _allocated_parts(mapping: Mapping, fd: int, closing: threading.Event) -> Iterator[tuple[int, int]]:
    """The parts [begin, end) of the file that the daemon has allocated, as it allocates them, until all are.

    An access to other pages would allocate memory beyond the limit.
    """
    done, idle_s = 0, 0.0
    while done < mapping.size_bytes and idle_s < _GROWS_WITHIN_S:
        allocated = min(os.fstat(fd).st_blocks * 512, mapping.size_bytes)
        if allocated > done:
            yield done, allocated
        idle_s = 0.0 if allocated > done else idle_s + _GROWS_EVERY_S
        done = max(done, allocated)
        if done < mapping.size_bytes and closing.wait(_GROWS_EVERY_S):
            return
