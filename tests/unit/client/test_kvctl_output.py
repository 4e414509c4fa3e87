"""``python -m kvctl``: its name, and output that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def kvctl(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", "kvctl", *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False, env=environment,
    )  # fmt: skip


def test_as_a_module_it_is_the_program() -> None:
    done = kvctl("nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: kvctl [OPTIONS]")


def test_output_that_cannot_be_written_is_one_line_and_an_exit_code() -> None:
    with Path("/dev/full").open("wb") as full:
        done = kvctl("version", "--address", "127.0.0.1:1", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (
        1,
        "kvctl: the output cannot be written: No space left on device\n",
    )
