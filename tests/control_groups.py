"""Control groups of the kernel with a limit of memory or threads. Skips the test if none can be made."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


class ControlGroup:
    def __init__(self, folder: Path, limit_file: Path) -> None:
        self._folder = folder
        self.limit_file = limit_file

    def add(self, pid: int) -> None:
        (self._folder / "cgroup.procs").write_text(str(pid))

    def program(self) -> tuple[str, ...]:
        """A program to run instead of ``-m kvservice``: the daemon, in this group from its first line on."""
        join = f"import os; open({str(self._folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        return ("-c", f"{join}; import sys; from kvservice.__main__ import main; sys.exit(main())")

    @property
    def peak_bytes(self) -> int:
        """The peak memory of its processes."""
        names = ("memory.max_usage_in_bytes", "memory.peak")
        return int(next(file for name in names if (file := self._folder / name).exists()).read_text())

    @property
    def threads(self) -> int:
        """Of its processes, at this moment."""
        return int((self._folder / "pids.current").read_text())


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[ControlGroup]:
    with _group("memory", ("memory.limit_in_bytes", "memory.max"), limit_bytes) as group:
        yield group


@contextlib.contextmanager
def threads_group(limit: int | str) -> Iterator[ControlGroup]:
    """`limit` is a number of threads, or ``max``."""
    with _group("pids", ("pids.max", "pids.max"), limit) as group:
        yield group


@contextlib.contextmanager
def _group(controller: str, names: tuple[str, str], limit: int | str) -> Iterator[ControlGroup]:
    """`names` are those of the file with the limit, in versions 1 and 2 of control groups."""
    if (_ROOT / controller / "cgroup.procs").exists():
        root, name = _ROOT / controller, names[0]
    elif (_ROOT / "cgroup.controllers").exists():
        root, name = _ROOT, names[1]
    else:
        pytest.skip("no control groups are mounted here")
    folder = root / f"kvservice-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (folder / name).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"the control group takes no such limit: {error}")
        yield ControlGroup(folder, folder / name)
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
