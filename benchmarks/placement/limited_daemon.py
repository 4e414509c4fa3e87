"""``python -m benchmarks.placement.limited_daemon serve ...``: the real daemon, on an SSD of a known bandwidth.

The environment variable BENCH_SSD_BYTES_PER_S gives the bytes per second that reads and writes share. The files, their
contents and the calls are the real ones: each call of a read or a write returns no sooner than the channel would allow.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from kvservice import __main__, daemon
from kvservice.tiers.files import FileCalls


class LimitedFileCalls(FileCalls):
    """One channel that reads and writes take in turns, in the order of their calls."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return self._ends_in_time(super().preadv, fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return self._ends_in_time(super().pwritev, fd, buffers, offset)

    def _ends_in_time(
        self, call: Callable[[int, Sequence[memoryview], int], int], fd: int, buffers: Sequence[memoryview], offset: int
    ) -> int:
        size = sum(len(each) for each in buffers)
        with self._lock:
            self._free_at_s = max(self._free_at_s, time.monotonic()) + size / self._bytes_per_s
            ends_s = self._free_at_s
        count = call(fd, buffers, offset)
        time.sleep(max(0.0, ends_s - time.monotonic()))  # As long as such an SSD would take.
        return count


def main() -> int:
    files = LimitedFileCalls(float(os.environ.pop("BENCH_SSD_BYTES_PER_S")))
    daemon.Daemon.open = functools.partial(daemon.Daemon.open, files=files)  # type: ignore[method-assign]  # Otherwise the measured daemon is the real one.
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
