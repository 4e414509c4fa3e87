"""The real file calls, under a test's control: they fail or transfer less on demand, and are recorded."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kvservice.tiers.files import FileCalls
from kvservice_api.image import PAGE_BYTES


class Call(NamedTuple):
    """One call that returned, or failed with `errno`."""

    name: str
    fd: int
    offset: int
    size: int
    errno: int = 0


class FaultyCalls(FileCalls):
    """Give it to a tier in place of `FileCalls`. Threads may call it while a test changes it."""

    def __init__(self) -> None:
        self.made: list[Call] = []
        self.failing: dict[str, int] = {}  # Name of a call -> the errno it fails with.
        self.failing_once: dict[str, int] = {}  # The same for one call.
        self.most_bytes: int | None = None  # The most bytes that one preadv or pwritev moves.
        self._gates: dict[str, tuple[threading.Event, int | None]] = {}
        self._waiting = threading.Semaphore(0)

    def names(self) -> list[str]:
        return [call.name for call in self.made]

    @contextmanager
    def held(self, name: str, offset: int | None = None) -> Iterator[threading.Semaphore]:
        """Calls of this name wait until the block is left; with `offset`, those at that place of a file. The semaphore
        counts those that began to wait.
        """
        gate = threading.Event()
        self._gates[name] = gate, offset
        try:
            yield self._waiting
        finally:
            del self._gates[name]
            gate.set()

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        name = "open_direct" if flags & os.O_DIRECT else "open"
        self._begin(name, -1, 0, 0)
        fd = super().open(path, flags, mode)
        self.made.append(Call(name, fd, 0, 0))
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._begin("preadv", fd, offset, sum(map(len, buffers)))
        count = self._reported(super().preadv(fd, self._shortened(buffers), offset))
        self.made.append(Call("preadv", fd, offset, count))
        return count

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._begin("pwritev", fd, offset, sum(map(len, buffers)))
        count = self._reported(super().pwritev(fd, self._shortened(buffers), offset))
        self.made.append(Call("pwritev", fd, offset, count))
        return count

    def fdatasync(self, fd: int) -> None:
        self._begin("fdatasync", fd, 0, 0)
        super().fdatasync(fd)
        self.made.append(Call("fdatasync", fd, 0, 0))

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._begin("posix_fallocate", fd, offset, length)
        super().posix_fallocate(fd, offset, length)
        self.made.append(Call("posix_fallocate", fd, offset, length))

    def _begin(self, name: str, fd: int, offset: int, size: int) -> None:
        gate, held_offset = self._gates.get(name, (None, None))
        if gate is not None and held_offset in (None, offset):
            self._waiting.release()
            gate.wait()
        if number := self.failing_once.pop(name, 0) or self.failing.get(name):
            self.made.append(Call(name, fd, offset, size, number))
            raise OSError(number, os.strerror(number))

    def _shortened(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        if self.most_bytes is None:
            return buffers
        buffer, *_ = buffers
        return [buffer[: -(-self.most_bytes // PAGE_BYTES) * PAGE_BYTES]]  # O_DIRECT moves whole pages.

    def _reported(self, count: int) -> int:
        return count if self.most_bytes is None else min(count, self.most_bytes)


class HeldReads(FileCalls):
    """Reads after a place wait for the gate, except those of trailers."""

    def __init__(self) -> None:
        self.held_from = 1 << 62
        self.gate = threading.Event()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= self.held_from and len(buffers[0]) > 64 << 10:
            self.gate.wait()
        return super().preadv(fd, buffers, offset)
