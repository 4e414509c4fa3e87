"""One process per store: a lock that the kernel releases when the holding process ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kvservice.index.errors import StoreLocked


class StoreLock:
    """Held from construction until ``release``. Raises StoreLocked, which names the holder."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise StoreLocked(
                f"{path.parent} is in use by process {holder}: stop it first, or name another folder"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)  # For people: the lock itself is the kernel's.

    def release(self) -> None:
        os.close(self._fd)
