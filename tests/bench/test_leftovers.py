"""A measuring program that is ended leaves nothing behind: no process, no folder, no shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import leftovers
from benchmarks.leftovers import SHARED_MEMORY
from tests.daemon import until

KVCTL = [sys.executable, "-c", "from kvctl import main; main()"]


def arena_of(process: subprocess.Popen[bytes]) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"kvbench-{process.pid}-*/*/arena"))


def session_of(process: subprocess.Popen[bytes]) -> list[str]:
    """Processes of its session that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if session == str(process.pid) and state != "Z":
            found.append(stat.parent.name)
    return found


PROGRAMS = {
    "kvctl bench": [*KVCTL, "bench", "--quick", "--directory"],
    "cold": [sys.executable, "-m", "benchmarks.client.cold"],
}


@pytest.mark.parametrize(("name", "number"), [("kvctl bench", signal.SIGTERM), ("cold", signal.SIGKILL)])
def test_a_program_that_is_ended_ends_its_daemon_and_removes_what_it_stored(
    tmp_path: Path, name: str, number: signal.Signals
) -> None:
    with subprocess.Popen(
        [*PROGRAMS[name], str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        until(lambda: bool(arena_of(process)))  # A daemon has begun.
        process.send_signal(number)
        assert process.wait(60) == (128 + number if number == signal.SIGTERM else -number)
    until(lambda: not session_of(process))
    if number == signal.SIGKILL:  # The next program does it.
        before = signal.getsignal(signal.SIGTERM)
        leftovers.begin(tmp_path)
        signal.signal(signal.SIGTERM, before)
    assert not list(SHARED_MEMORY.glob(f"kvbench-{process.pid}-*"))
    assert not list(tmp_path.iterdir())


def test_what_running_programs_have_is_not_removed(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with leftovers.own_folder(tmp_path) as folder:
        (folder / "file").touch()
        leftovers.begin(tmp_path)
        signal.signal(signal.SIGTERM, before)
        assert (folder / "file").exists()
        assert folder.name.startswith(f"kvbench-{os.getpid()}-")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("kvctl bench --dram-path /none", "/none is no folder"),
        ("benchmarks.client.cold /none", "DIRECTORY: /none is no folder"),
        ("benchmarks.client.cold /tmp --runs 0", "--runs must be at least 1"),
        ("benchmarks.client.cold /tmp --block-tokens 0", "--block-tokens must be at least 1"),
        ("benchmarks.peers --directory /none", "--directory: /none is no folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments: str, problem: str) -> None:
    program, *rest = arguments.split()
    command = [*KVCTL, *rest] if program == "kvctl" else [sys.executable, "-m", program, *rest]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert problem in " ".join(done.stderr.replace("│", " ").split())
