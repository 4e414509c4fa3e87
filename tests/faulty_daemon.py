"""``python -m tests.faulty_daemon serve ...``: the real daemon, on files that fail when a test says so.

The environment variable TEST_FAULTS names a folder. A file in it that is named like one of the
file calls makes that call fail with the errno whose name it holds; ``SHORT`` makes the call
transfer less than requested, and ``HOLD`` makes it wait. ``EIO 8192`` makes only calls fail that begin at this offset
in a file, ``EIO ssd-001.kv`` only those on a file of this name. Delete the file, and the call works again. A file
``policy`` does the same to the placement policy's choice of blocks that leave DRAM, and ``loop`` to the event loop when
the daemon gets SIGUSR1.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvservice import __main__, daemon
from kvservice.placement.block_items import BlockItems
from kvservice.tiers.files import FileCalls
from kvservice_api.image import PAGE_BYTES


class FaultyFileCalls(FileCalls):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return super().preadv(fd, self._cut("preadv", fd, buffers, offset), offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return super().pwritev(fd, self._cut("pwritev", fd, buffers, offset), offset)

    def fdatasync(self, fd: int) -> None:
        self.fail("fdatasync", fd=fd)
        super().fdatasync(fd)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self.fail("posix_fallocate")
        super().posix_fallocate(fd, offset, length)

    def _cut(self, call: str, fd: int, buffers: Sequence[memoryview], offset: int) -> Sequence[memoryview]:
        if self.fail(call, offset, fd) == "SHORT" and len(buffers[0]) > PAGE_BYTES:
            return [buffers[0][:PAGE_BYTES]]
        return buffers

    def fail(self, call: str, offset: int = 0, fd: int = -1) -> str:
        try:
            while (fault := (self._folder / call).read_text()) == "HOLD":
                time.sleep(0.005)
        except FileNotFoundError:
            return ""
        fault, _, only = fault.partition(" ")
        is_meant = not only or (offset == int(only) if only.isdecimal() else _name_of(fd) == only)
        if fault != "SHORT" and is_meant:
            number = getattr(errno, fault)
            raise OSError(number, os.strerror(number))
        return fault


def _name_of(fd: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{fd}")).name if fd >= 0 else ""


def main() -> int:
    files = FaultyFileCalls(Path(os.environ.pop("TEST_FAULTS")))
    daemon.Daemon.open = functools.partial(daemon.Daemon.open, files=files)  # type: ignore[method-assign]  # Otherwise the daemon under test is the real one.
    lowest = BlockItems.lowest

    def failing(*arguments: Any) -> Any:
        files.fail("policy")
        return lowest(*arguments)

    BlockItems.lowest = failing  # type: ignore[assignment, method-assign]
    signal.signal(signal.SIGUSR1, lambda number, frame: files.fail("loop"))
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
