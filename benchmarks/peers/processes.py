"""A driver as a process: requests and answers, and its end with all of its children."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.leftovers import SHARED_MEMORY, own_name, remove
from benchmarks.peers.environments import python_of
from benchmarks.peers.systems import System

ROOT = Path(__file__).parents[2]
_START_S = 200.0
_STOP_S = 15.0


class Skipped(Exception):
    """A system cannot be measured here. The message is the reason."""


class Driver:
    """One system's driver. Used as a context manager: leaving it kills the session, and removes its files."""

    def __init__(self, system: System, directory: Path | None) -> None:
        """`directory` is a folder on the disk to measure. Raises Skipped if the environment is missing."""
        self.system = system
        python = sys.executable if system.environment is None else str(python_of(system.environment))
        self._folder = Path(tempfile.mkdtemp(prefix=own_name(), dir=directory))
        self._shared = own_name(system.name)  # The beginning of its names in /dev/shm.
        (SHARED_MEMORY / self._shared).mkdir()
        self._log = (self._folder / "driver.log").open("wb")
        ours = [] if system.environment else [ROOT / part for part in ("proto", "client", "engine_adapter")]
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.drivers.{system.driver}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            # With their bytecode kept, LMCache's programs start in a third of the time.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *ours])), "PYTHONDONTWRITEBYTECODE": ""},
            cwd=self._folder,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self, bytes_max: int) -> None:
        options = {
            **self.system.options,
            "dram_path": str(SHARED_MEMORY / self._shared),
            "shm_name": f"{self._shared}-pool",
        }
        self.ask("start", _START_S, options=options, folder=str(self._folder), bytes_max=bytes_max)

    def ask(self, what: str, timeout_s: float, **fields: Any) -> Any:
        """Raises Skipped if the driver fails, ends, or does not answer in time."""
        self._signal(signal.SIGCONT)
        try:
            return self._answer(what, timeout_s, fields)
        finally:
            if self.system.is_stopped_between_turns:
                self._signal(signal.SIGSTOP)

    def _answer(self, what: str, timeout_s: float, fields: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": what, **fields}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Skipped(f"its driver ended: {self._last_line()}") from None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise Skipped(f"no answer to `{what}` within {timeout_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise Skipped(f"its driver ended: {self._last_line()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Skipped(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        """Ask it to end, then kill what is left of its session. May be called twice."""
        if self._log.closed:
            return
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        deadline = time.monotonic() + _STOP_S
        while self._signal(signal.SIGKILL) and time.monotonic() < deadline:
            self._process.poll()
            time.sleep(0.02)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
        if keep := os.environ.get("PEERS_BENCH_LOGS"):
            for log in self._folder.glob("*.log"):
                shutil.copy(log, Path(keep) / f"{self.system.name}-{log.name}")
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in (SHARED_MEMORY / self._shared, *SHARED_MEMORY.glob(f"{self._shared}-pool*")):
            remove(path)

    def _signal(self, number: int) -> bool:
        """Signal all of its processes. Returns whether there was one."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _last_line(self) -> str:
        lines = (self._folder / "driver.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "without a message"
