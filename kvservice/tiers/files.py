"""The calls to the operating system that tiers make on their files.

Tests replace it with a subclass that makes a call fail, shortens it, or records the order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def file_system_of(path: Path) -> str:
    """The type of the path's file system, such as ``ext4``; empty if it is not known."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # 36 35 98:0 /root /mount/point options [tags ...] - kind source options
    kinds = (fields[fields.index("-") + 1] for line in mounts.splitlines() if (fields := line.split())[2] == number)
    return next(kinds, "")


class FileCalls:
    """As in ``os``, with the same errors."""

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)
