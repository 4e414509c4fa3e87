"""The disk's own limit: raw O_DIRECT reads and writes of the store's own file, where its blocks were or will be.

Another file is in another state: its extents may be elsewhere or not yet written, and a virtual disk's host
may have one file in its cache and not the other.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from kvservice_api.image import PAGE_BYTES


class Setting(NamedTuple):
    piece_bytes: int
    threads: int
    parts: int = 1  # The first pieces of so many parts of the file come before the second ones, as in promotions.

    def __str__(self) -> str:
        return f"{self.piece_bytes >> 10} KiB x {self.threads}" + (f" in {self.parts} parts" if self.parts > 1 else "")


# The best of these is a good value of `ssd.read_bytes` and `ssd.io_threads`, or of `ssd.write_bytes`.
READS = (Setting(4 << 20, 4), Setting(4 << 20, 4, 8), Setting(4 << 20, 8, 8), Setting(16 << 20, 4, 4))
WRITES = (Setting(4 << 20, 4), Setting(4 << 20, 4, 4), Setting(16 << 20, 4))


class RawFile:
    """`size_bytes` of a file of the SSD tier, from the page after its header on. Raises OSError without O_DIRECT."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._size_bytes = size_bytes
        memory_bytes = max(setting.piece_bytes * setting.threads for setting in READS + WRITES)
        # A request has at most some hundred runs of memory: with scattered pages of 4 KiB it is a small one.
        self._memory = mmap.mmap(-1, memory_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory.write(os.urandom(1 << 20) * (len(self._memory) >> 20))  # Faulted in, as the daemon's.

    def __enter__(self) -> RawFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._memory.close()

    def read_gbps(self, setting: Setting) -> float:
        return self._gbps(setting, os.preadv, lambda: None)

    def write_gbps(self, setting: Setting) -> float:
        """It overwrites these bytes. Ends with a flush, as the daemon's writes do."""
        return self._gbps(setting, os.pwritev, lambda: os.fdatasync(self._fd))

    def _gbps(self, setting: Setting, call: Callable[..., int], finish: Callable[[], None]) -> float:
        size, threads, parts = setting
        part_bytes = self._size_bytes // parts
        offsets = [part * part_bytes + start for start in range(0, part_bytes, size) for part in range(parts)]
        free = deque(range(threads))  # Places in the memory.

        def work(offset: int) -> None:
            place = free.popleft() * size
            with memoryview(self._memory) as memory, memory[place : place + size] as piece:
                call(self._fd, [piece], PAGE_BYTES + offset)
            free.append(place // size)

        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, offsets))
        finish()
        return self._size_bytes / (time.perf_counter() - started) / 1e9
