"""The disk's own limit: raw O_DIRECT reads and writes of one file."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

_SIZES = (256 << 10, 1 << 20, 4 << 20, 8 << 20)
_THREADS = (1, 2)


def measure(directory: Path, size_bytes: int, way: Literal["read", "write"]) -> dict[str, float]:
    """GB/s by setting; empty if the file system has no O_DIRECT, as a tmpfs."""
    path = directory / "raw"
    try:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
    except OSError:
        return {}
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        with mmap.mmap(-1, max(_SIZES) * max(_THREADS)) as memory, memoryview(memory) as buffer:
            buffer[:] = os.urandom(1 << 20) * (len(buffer) >> 20)
            for offset in range(0, size_bytes, len(buffer)):
                os.pwritev(fd, [buffer], offset)  # The first pass converts preallocated blocks: not counted.
            os.fdatasync(fd)
            if way == "read":
                return _by_setting(fd, buffer, size_bytes, os.preadv, lambda: None)
            return _by_setting(fd, buffer, size_bytes, os.pwritev, lambda: os.fdatasync(fd))
    finally:
        os.close(fd)


def _by_setting(
    fd: int, buffer: memoryview, size_bytes: int, call: Callable[..., int], finish: Callable[[], None]
) -> dict[str, float]:
    found = {}
    for threads in _THREADS:
        for size in _SIZES:

            def work(thread: int, size: int = size, threads: int = threads) -> None:
                with buffer[thread * size : (thread + 1) * size] as part:
                    for offset in range(thread * size, size_bytes, threads * size):
                        call(fd, [part], offset)

            started = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
            finish()
            found[f"{size >> 10} KiB x {threads}"] = size_bytes / (time.perf_counter() - started) / 1e9
    return found
