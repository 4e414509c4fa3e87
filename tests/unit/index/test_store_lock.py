"""The store's lock: one process at a time, freed by the kernel when that process dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvservice.index.errors import StoreLocked
from kvservice.index.store_lock import StoreLock

HOLD = """
import sys, pathlib
from kvservice.index.store_lock import StoreLock
lock = StoreLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_holder_is_refused_and_the_error_names_the_first(tmp_path: Path) -> None:
    lock = StoreLock(tmp_path / "lock")

    with pytest.raises(StoreLocked, match=f"{tmp_path} is in use by process {os.getpid()}"):
        StoreLock(tmp_path / "lock")

    lock.release()
    StoreLock(tmp_path / "lock").release()


def test_a_killed_holder_leaves_the_store_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreLocked, match=f"process {holder.pid}"):
            StoreLock(tmp_path / "lock")
        holder.kill()
        holder.wait()

    StoreLock(tmp_path / "lock").release()
