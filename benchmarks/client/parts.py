"""The daemon's programs, as processes of their own: a daemon to measure, and ``python -m benchmarks.daemon``."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.leftovers import ENDS_WITH_US, own_folder
from kvservice_api.errors import DaemonUnavailable


class RunningDaemon(NamedTuple):
    address: str
    pid: int
    metrics_port: int | None  # If the settings ask for it.


class MeasureFailed(Exception):
    """A measure of `python -m benchmarks.daemon` has no figures. Says why."""


@contextmanager
def daemon(
    directory: Path,
    dram_path: Path,
    dram_bytes: int,
    ssd_bytes: int | None = None,
    *flags: str,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    log_lines: list[str] | None = None,
) -> Iterator[RunningDaemon]:
    """A daemon with a store of its own, gone with everything it stored when the block ends, or this process.

    It has as much on SSD as in DRAM, or `ssd_bytes`, and serves on `host`. `flags` are further settings. Its command
    follows `prefix`, which must run it in the same process. The lines of its log are appended to `log_lines`.
    """
    with own_folder(dram_path) as arena:
        command = [
            *(*(prefix or ENDS_WITH_US), sys.executable, "-m", "kvservice", "serve"),
            f"--store.path={directory / 'store'}",
            f"--dram.path={arena}",
            f"--dram.capacity_bytes={dram_bytes}",
            f"--ssd.capacity_bytes={dram_bytes if ssd_bytes is None else ssd_bytes}",
            f"--server.address={host}:0",
            "--server.unix_socket=off",
            "--server.metrics_address=",
            "--log.format=json",
            *flags,
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        log = process.stderr
        assert log is not None
        # With a full pipe the daemon would wait.
        lines = deque[str](maxlen=0) if log_lines is None else log_lines
        reader = threading.Thread(target=lines.extend, args=(log,), name="daemon log")
        try:
            ports = _serving(log)
            reader.start()
            yield RunningDaemon(f"{host}:{ports['port']}", process.pid, ports.get("metrics_port"))
        finally:
            process.terminate()
            process.wait()
            if reader.ident is not None:
                reader.join()
            log.close()


def _serving(log: IO[str]) -> dict[str, Any]:
    """Its log line that it serves."""
    last_line = ""
    for line in log:
        last_line = line.strip() or last_line
        if '"serving"' in line:
            found: dict[str, Any] = json.loads(line)
            return found
    raise DaemonUnavailable(f"no daemon could be started here: {last_line}")


class Parts:
    """``python -m benchmarks.daemon``: one measure at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, name: str) -> dict[str, Any]:
        """Raises MeasureFailed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(name, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise MeasureFailed("`python -m benchmarks.daemon` has ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise MeasureFailed(f"`python -m benchmarks.daemon` ended while it measured {name}")
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise MeasureFailed(found["failed"])
        return found


@contextmanager
def parts(directory: Path, dram_path: Path, *, quick: bool) -> Iterator[Parts]:
    command = [*ENDS_WITH_US, sys.executable, "-m", "benchmarks.daemon", str(directory), f"--dram-path={dram_path}"]
    command += ["--quick"] if quick else []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield Parts(process)
        finally:
            process.terminate()
