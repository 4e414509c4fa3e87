"""The daemon's programs, as processes of their own: a daemon to measure, and ``python -m benchmarks.daemon``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvservice_api.errors import DaemonUnavailable


class RunningDaemon(NamedTuple):
    address: str
    pid: int


@contextmanager
def daemon(directory: Path, dram_path: Path, dram_bytes: int) -> Iterator[RunningDaemon]:
    """A daemon with a store of its own, gone with everything it stored when the block ends."""
    with (
        tempfile.TemporaryDirectory(prefix="kvctl-bench-", dir=dram_path) as arena,
        _process(directory, arena, dram_bytes) as process,
    ):
        try:
            yield RunningDaemon(f"127.0.0.1:{_port(process)}", process.pid)
        finally:
            process.terminate()
            assert process.stderr is not None
            process.stderr.read()
            process.wait()


def _process(directory: Path, arena: str, dram_bytes: int) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "kvservice", "serve"),
        f"--store.path={directory / 'store'}",
        f"--dram.path={arena}",
        f"--dram.capacity_bytes={dram_bytes}",
        f"--ssd.capacity_bytes={dram_bytes}",
        "--server.address=127.0.0.1:0",
        "--server.unix_socket=off",
        "--server.metrics_address=",
        "--log.format=json",
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    last_line = ""
    for line in process.stderr:
        last_line = line.strip() or last_line
        if '"serving"' in line:
            return int(json.loads(line)["port"])
    raise DaemonUnavailable(f"no daemon could be started here: {last_line}")


class Parts:
    """``python -m benchmarks.daemon``: one measure at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, name: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(name, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise DaemonUnavailable(f"`python -m benchmarks.daemon` ended while it measured {name}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def parts(directory: Path, *, quick: bool) -> Iterator[Parts]:
    command = [sys.executable, "-m", "benchmarks.daemon", str(directory), *(["--quick"] if quick else [])]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield Parts(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
