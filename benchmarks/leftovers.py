"""What a measuring program leaves behind, however it ends: nothing.

It unwinds at SIGTERM as it does at Ctrl-C. What it starts is killed with it. Its folders bear its process id, so that
the next program removes those of one that was killed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "kvbench-"
_SET_PARENT_DEATH_SIGNAL = 1  # <linux/prctl.h>
_LIBC = ctypes.CDLL(None)
_SETPRIV = shutil.which("setpriv")

ENDS_WITH_US = (_SETPRIV, "--pdeathsig", "KILL") if _SETPRIV else ()
"""Before a command of `subprocess`, which then is killed with the thread that started it. It keeps its process id."""


def begin(*folders: Path | None) -> None:
    """For a program's main thread: unwind at SIGTERM from now on, and remove what killed ones left in these folders.

    None is the system's temporary folder; shared memory is always one of them.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for folder in {SHARED_MEMORY, *(each or Path(tempfile.gettempdir()) for each in folders)}:
        for path in folder.glob(f"{_PREFIX}*"):
            owner = path.name.removeprefix(_PREFIX).split("-")[0]
            if owner.isdigit() and not Path(f"/proc/{owner}").exists():
                remove(path)


def own_name(what: str = "") -> str:
    """The name of something that `begin` of a later program may remove once this process has ended."""
    return f"{_PREFIX}{os.getpid()}-{what}"


@contextmanager
def own_folder(parent: Path | None) -> Iterator[Path]:
    """A new folder in this one, or in the system's temporary one, gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix=own_name(), dir=parent) as folder:
        yield Path(folder)


def end_with_parent() -> None:
    """This process is killed when its parent ends, also if that was killed."""
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def remove(path: Path) -> None:
    """A file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
