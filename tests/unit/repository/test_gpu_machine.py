"""What runs the tests of CUDA, where there is neither a GPU nor a simulation of one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.gpu.report import Part
from tools import gpu_machine

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("what", ["test", "bench"])
def test_without_a_gpu_it_ends_with_one_sentence_and_without_an_error(what: str, tmp_path: Path) -> None:
    if not gpu_machine.why_no_gpu():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "tools" / "gpu_machine.py"), what, "--wheels", str(tmp_path / "missing")]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Nothing was run on a GPU: ")
    assert done.stdout.count("\n") == 1


def test_the_wheels_are_those_of_the_base_and_the_daemon_without_what_such_a_machine_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *project["optional-dependencies"]["daemon"]}

    carried = gpu_machine.requirements()

    assert {each.split(">")[0] for each in needed - set(carried)} == {"numpy"}
    assert not any(each.startswith(("torch", "cupy", "transformers")) for each in carried)


def test_a_wheel_is_installed_if_its_package_is_missing_or_older(tmp_path: Path) -> None:
    for name in ("numpy-1.0-py3-none-any.whl", "numpy-999.0-py3-none-any.whl", "surely_missing-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()

    found = [wheel.name for wheel in gpu_machine.wheels_to_install(tmp_path)]

    assert found == ["numpy-999.0-py3-none-any.whl", "surely_missing-1.0-py3-none-any.whl"]


HANGING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def hang_in_cuda():
    print(started.pid, flush=True)
    time.sleep(600)
hang_in_cuda()
"""


def test_a_run_that_survives_an_interrupt_prints_where_it_hangs_and_is_killed_with_what_it_started() -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", HANGING]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout is not None
    process.stdout.readline()  # It ignores SIGINT from now on.

    code = gpu_machine.ended(process, [(signal.SIGINT, 0.05), (signal.SIGABRT, 30), (signal.SIGKILL, 30)])

    assert code == -signal.SIGABRT
    _, printed = process.communicate(timeout=30)  # Its end: what it started holds the pipe no more.
    assert "in hang_in_cuda" in printed


def test_a_failure_is_printed_when_it_occurs(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_wrong():\n    assert 1 == 2\ndef test_killed():\n    os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tools.gpu_machine", str(tmp_path)]

    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == -signal.SIGKILL
    assert "test_it.py::test_wrong (call) has failed:" in done.stderr
    assert "assert 1 == 2" in done.stderr


def test_what_an_error_or_an_interrupt_ends_is_not_measured_and_only_the_interrupt_ends_the_rest() -> None:
    part = Part("Title", "About.", ("Figure",))

    def measure(error: BaseException) -> None:
        raise error

    with part.attempt("one"):
        measure(ValueError("wrong"))
    with pytest.raises(KeyboardInterrupt), part.attempt("two"):
        measure(KeyboardInterrupt())

    assert part.markdown()[-2:] == ["Not measured: one: ValueError: wrong\n", "Not measured: two: KeyboardInterrupt\n"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_without_a_simulation_its_make_target_installs_nothing_and_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", "cudasim-test", f"CUDASIM={tmp_path / 'missing'}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "were not run" in done.stdout
