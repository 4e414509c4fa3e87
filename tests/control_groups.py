"""Control groups of the kernel with a memory limit. Skips the test if none can be made."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryGroup:
    def __init__(self, folder: Path, limit: str, peak: str) -> None:
        self._folder = folder
        self.limit_file = folder / limit
        self._peak_file = folder / peak

    @property
    def peak_bytes(self) -> int:
        """The peak memory of its processes."""
        return int(self._peak_file.read_text())

    def program(self) -> tuple[str, ...]:
        """A program to run instead of ``-m kvservice``: the daemon, in this group from its first line on."""
        join = f"import os; open({str(self._folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        return ("-c", f"{join}; import sys; from kvservice.__main__ import main; sys.exit(main())")


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    if (_V1 / "cgroup.procs").exists():
        root, limit, peak = _V1, "memory.limit_in_bytes", "memory.max_usage_in_bytes"
    elif (_V2 / "cgroup.controllers").exists():
        root, limit, peak = _V2, "memory.max", "memory.peak"
    else:
        pytest.skip("no control groups are mounted here")
    folder = root / f"kvservice-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (folder / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"the control group takes no memory limit: {error}")
        yield MemoryGroup(folder, limit, peak)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Waits: the kernel removes a process from its group shortly after the parent has learned of its end."""
    end_s = time.monotonic() + 30
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.01)  # The kernel reports no event for it.
        else:
            return
