"""Tests and benchmarks on a machine with one GPU and no network: `make gpu-wheels`, `gpu-test` and `gpu-bench`.

    python tools/gpu_machine.py wheels --python-version 3.12 FOLDER    # where there is a network
    python tools/gpu_machine.py test --wheels FOLDER [-- ARGUMENT...]  # where there is the GPU
    python tools/gpu_machine.py bench --wheels FOLDER [-- ARGUMENT...]

`test` and `bench` run with this interpreter's packages, CuPy and torch among them, in an environment ``.venv-gpu``;
there those wheels are installed whose packages the interpreter lacks or has in an older version. All of it takes at
most eight minutes. Without a GPU they print one sentence and end with code 0.

This file needs the standard library and pip only. As a plugin of pytest it prints each failure when it occurs: what
hangs later cannot hide it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import site
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-gpu"
LIMIT_S = 480  # For everything: the environment, the run, and its end.
_LAST_ROUND_S = 40  # The benchmark begins no round so shortly before it is interrupted.
_HANGING_S = 90  # Of one test: then pytest prints where each thread is.
# How a run is ended, and for how long each is waited. At SIGINT pytest says what has failed; at SIGABRT faulthandler
# prints where each thread is, also where one hangs in CUDA.
_ENDING = ((signal.SIGINT, 20), (signal.SIGABRT, 5), (signal.SIGKILL, 5))
_ENDING_S = sum(patience_s for _, patience_s in _ENDING)
# What the tests import beside the packages of the daemon and the adapter. Each machine with CuPy has NumPy.
TEST_PACKAGES = ("hypothesis", "pytest", "pytest-asyncio", "psutil")
NOT_CARRIED = ("numpy",)
GLIBC_MINORS = (17, 24, 27, 28, 31, 34)  # pip takes a platform's name as it is, not as "this or older".
LINES = {
    # Warnings of other versions of packages than ours are no errors there.
    "test": [
        *("-m", "pytest", "-m", "gpu", "-v", "-rfEs", "-W", "default", "-p", "tools.gpu_machine"),
        *("-o", f"faulthandler_timeout={_HANGING_S}", "tests/gpu"),
    ],
    "bench": ["-X", "faulthandler", "-m", "benchmarks.gpu"],
}


def requirements() -> list[str]:
    """Of the daemon, the client and the adapter without torch, and of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["daemon"], *TEST_PACKAGES]
    return [each for each in needed if not each.startswith(NOT_CARRIED)]


def download_command(folder: Path, python_version: str) -> list[str]:
    """pip's command that fetches the requirements and theirs, as wheels for x86-64 Linux."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"),
        *("--implementation", "cp", "--python-version", python_version),
        *(option for name in platforms for option in ("--platform", name)),
        *("--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder)),
        *requirements(),
    ]


def why_no_gpu() -> str:
    """Why nothing can run on a GPU here; empty if there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    count = ctypes.c_int()
    if (error := driver.cuInit(0)) or (error := driver.cuDeviceGetCount(ctypes.byref(count))):
        return f"the NVIDIA driver reports error {error}"
    return "" if count.value else "the NVIDIA driver has no device"


def wheels_to_install(folder: Path) -> Iterator[Path]:
    """The wheels whose package this interpreter lacks, or has in an older version."""
    from pip._vendor.packaging.utils import parse_wheel_filename
    from pip._vendor.packaging.version import Version

    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        try:
            if Version(metadata.version(name)) >= version:
                continue
        except metadata.PackageNotFoundError:
            pass
        yield wheel


def environment_with(wheels: Sequence[Path], end_s: float) -> Path:
    """The interpreter of a new environment: these wheels, and behind them this interpreter's packages.

    Processes that tests start run with it too. Raises CalledProcessError where pip cannot install a wheel, and
    TimeoutExpired where it has not at `end_s` of the monotonic clock.
    """
    venv.create(ENVIRONMENT, clear=True, symlinks=True)
    python = ENVIRONMENT / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    behind = [*site.getsitepackages(), site.getusersitepackages()]
    lines = "; ".join(f"site.addsitedir({each!r})" for each in behind)
    (packages / "behind.pth").write_text(f"import site; {lines}\n")
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        pip += ["--no-deps", "--no-compile", "--target", str(packages), *map(str, wheels)]
        subprocess.run(pip, check=True, timeout=end_s - time.monotonic())
    return python


def run(what: str, wheels: Path, arguments: Sequence[str]) -> int:
    """The exit code of the run, and not 0 if it had to be ended."""
    end_s = time.monotonic() + LIMIT_S - _ENDING_S
    if reason := why_no_gpu():
        print(f"Nothing was run on a GPU: {reason}.")
        return 0
    if util.find_spec("cupy") is None:
        print(f"{sys.executable} has no CuPy: run `make gpu-{what} PYTHON=...` with an interpreter that has it.")
        return 1
    python = environment_with(list(wheels_to_install(wheels)), end_s)
    paths = [ROOT, ROOT / "proto", ROOT / "client", ROOT / "engine_adapter"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
    left_s = end_s - time.monotonic()
    seconds = ["--seconds", f"{left_s - _LAST_ROUND_S:.0f}"] if what == "bench" else []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGABRT would write one as large as the GPU's mapped memory.
    # A group of its own: tests start daemons, and all of them are killed with it.
    process = subprocess.Popen(
        [str(python), *LINES[what], *seconds, *arguments], cwd=ROOT, env=environment, process_group=0
    )
    try:
        return process.wait(left_s)
    except subprocess.TimeoutExpired:
        print(f"It did not end in {LIMIT_S - _ENDING_S} s, and is interrupted.", file=sys.stderr, flush=True)
        return ended(process)
    except KeyboardInterrupt:
        return ended(process)


def ended(process: subprocess.Popen[Any], ending: Sequence[tuple[signal.Signals, float]] = _ENDING) -> int:
    """End a process that leads a group, and kill what is left of the group. Its exit code, and never 0.

    `ending` are signals, and for how many seconds each is waited for. A process that even SIGKILL does not end, because
    it is in the kernel's driver, is left.
    """
    try:
        for number, patience_s in ending:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                return process.wait(patience_s) or 1
            print(f"{number.name} has not ended it in {patience_s} s.", file=sys.stderr, flush=True)
        return 1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def pytest_runtest_logreport(report: Any) -> None:
    """pytest calls it after each phase of a test."""
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}) has failed:\n{report.longreprtext}", file=sys.__stderr__, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching = verbs.add_parser("wheels", help="fetch the wheels that such a machine lacks")
    fetching.add_argument("--python-version", required=True, help="of the machine: 3.12")
    fetching.add_argument("folder", type=Path)
    for verb, what in (("test", "run tests/gpu"), ("bench", "run benchmarks.gpu")):
        running = verbs.add_parser(verb, help=f"{what} on this machine's GPU")
        running.add_argument("--wheels", type=Path, required=True, help="a folder; it may be missing")
        running.add_argument("arguments", nargs="*", help="for pytest, or for benchmarks.gpu")
    given = parser.parse_args()
    if given.verb == "wheels":
        return subprocess.run(download_command(given.folder, given.python_version)).returncode
    return run(given.verb, given.wheels, given.arguments)


if __name__ == "__main__":
    sys.exit(main())
