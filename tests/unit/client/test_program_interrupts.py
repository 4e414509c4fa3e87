"""Ctrl-C where a program does not expect it, such as in its first second, in which it imports packages: it ends at
once, and prints nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PROGRAMS = {
    "kvctl": "import kvctl; kvctl.main()",
    "kvservice": "from kvservice import __main__; sys.exit(__main__.main())",
}
# The handler that Python has in a terminal: tests in the background ignore the signal.
AS_IN_A_TERMINAL = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"


def run(
    code: str, *arguments: str, packages: Path | None = None, starter: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`packages` is a folder whose packages hide those that are installed."""
    path = os.pathsep.join([*([str(packages)] if packages is not None else []), *sys.path])
    return subprocess.run(
        [*starter, sys.executable, "-c", f"{AS_IN_A_TERMINAL}; {code}", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def interrupting(folder: Path, package: str) -> Path:
    """The folder, with a package of this name whose import is interrupted."""
    (folder / f"{package}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    return folder


@pytest.mark.parametrize(
    ("program", "arguments", "package"),
    [
        ("kvctl", ["status"], "numpy"),
        ("kvctl", ["status"], "typer"),
        ("kvservice", ["serve"], "uvloop"),
        ("kvservice", ["config"], "pydantic"),
    ],
)
def test_an_interrupt_while_a_package_is_imported_ends_the_program(
    tmp_path: Path, program: str, arguments: list[str], package: str
) -> None:
    done = run(PROGRAMS[program], *arguments, packages=interrupting(tmp_path, package))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(("program", "package"), [("kvctl", "typer"), ("kvservice", "uvloop")])
def test_an_interrupt_ends_the_first_process_of_a_container_too(tmp_path: Path, program: str, package: str) -> None:
    """It gets no signal that it does not handle, so it cannot end by one."""
    first = ("unshare", "--pid", "--fork", "--kill-child")
    if subprocess.run([*first, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace of processes can be made here")
    done = run(PROGRAMS[program], "serve", packages=interrupting(tmp_path, package), starter=first)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_at_the_interpreters_end_ends_kvctl() -> None:
    interrupt = "import atexit, os; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    done = run(f"{interrupt}; {PROGRAMS['kvctl']}", "version", "--address", "127.0.0.1:1")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
