"""A real daemon process, as users run it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from kvservice_client import Client
from tests import process_starter
from tests.process_starter import StartedProcess, python_path

MIB = 2**20

_TIMEOUT_S = 120.0  # On a busy machine an operation of one second may take this long.

# Tests that check the bound of a wait use this bound, and make a wrong wait much longer. So they fail because of a
# wrong wait, and not because the machine is slow.
SOON_S = 30.0
NEVER_S = 600.0


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> float:
    """Poll until it is true: for work of another process that reports no end. Returns the seconds waited."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "it did not come about"
        time.sleep(0.002)
    return time.monotonic() - start_s


class DaemonProcess:
    """``kvservice serve`` on a store. Can be killed, and started again on the same store, arena and port.

    A context manager: entering starts the daemon; leaving kills it and removes its store and its shared memory.
    """

    def __init__(
        self, folder: Path, *, port: int = 0, program: Sequence[str] = ("-m", "kvservice"), **settings: object
    ) -> None:
        """`settings` are the daemon's, with two underscores for the dot: ``ssd__capacity_bytes=0``.

        `program` runs instead of the daemon, with the daemon's arguments. ``-m MODULE`` is started with its imports
        done (see ``process_starter``); give ``-c ...`` where the time or the memory of the imports matters.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.store = folder / "store"
        self.shared_memory = Path(tempfile.mkdtemp(prefix="kvservice-test-", dir="/dev/shm"))
        self.port = port
        self.lines: list[str] = []  # Standard error of the running daemon, or of the last one.
        self.program = tuple(program)  # May be changed between two starts, as the settings.
        self.settings: dict[str, object] = {  # May be changed between two starts.
            "store.path": self.store,
            "server.metrics_address": "",
            "dram.path": self.shared_memory,
            "dram.capacity_bytes": 64 * MIB,
            "ssd.capacity_bytes": 256 * MIB,
            "log.format": "json",
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        self._process: StartedProcess | subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._log_ended = True
        self._more_lines = threading.Condition()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def socket_path(self) -> Path:
        return self.store / "kvservice.sock"

    @property
    def arena_folder(self) -> Path:
        """The folder of the arena and the volatile index. It exists once the daemon has run."""
        (folder,) = self.shared_memory.glob("kvservice-*")
        return folder

    @property
    def process(self) -> StartedProcess | subprocess.Popen[str]:
        assert self._process is not None, "the daemon was never started"
        return self._process

    @property
    def log(self) -> list[dict[str, Any]]:
        """The JSON log lines so far, as objects."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def start(self, *, environment: dict[str, str] | None = None, pass_fds: Sequence[int] = ()) -> Self:
        """Returns once the daemon serves. A restart takes the same port again."""
        self.launch(environment=environment, pass_fds=pass_fds)
        self.port = self.wait_for_log("serving")["port"]
        return self

    def launch(
        self,
        *,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        more_flags: Sequence[str] = (),
    ) -> None:
        """Start the process, and do not wait for it to serve."""
        assert self._process is None or self._process.poll() is not None, "it runs already"
        self._join_reader()
        settings = {"server.address": self.address, **self.settings}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        self.lines, self._log_ended = [], False
        variables = {**os.environ, "PYTHONPATH": python_path(), **(environment or {})}
        arguments = ["serve", *flags, *more_flags]
        if self.program[0] == "-m" and process_starter.can_start(variables):
            self._process = process_starter.start(self.program[1], arguments, environment=variables, pass_fds=pass_fds)
        else:
            self._process = subprocess.Popen(
                [sys.executable, *self.program, *arguments],
                stderr=subprocess.PIPE,
                text=True,
                env=variables,
                pass_fds=pass_fds,
            )
        self._reader = threading.Thread(target=self._read, args=(self._process, self.lines), name="daemon log")
        self._reader.start()

    def wait_for_log(self, event: str, timeout_s: float = _TIMEOUT_S, **fields: object) -> dict[str, Any]:
        """The first log line of this event, with these fields, since the start; waits for it."""
        end_s = time.monotonic() + timeout_s
        with self._more_lines:
            while not (found := self.logged(event, **fields)):
                text = "".join(self.lines)
                assert not self._log_ended, f"ended without {event!r}:\n{text}"
                assert self._more_lines.wait(end_s - time.monotonic()), f"no {event!r} in {timeout_s:g} s:\n{text}"
        return found[0]

    def logged(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The log lines so far of this event, with any reason after it, that have these fields."""
        return [
            line
            for line in self.log
            if (line["event"] == event or line["event"].startswith(f"{event}:")) and fields.items() <= line.items()
        ]

    def serves(self) -> bool:
        """Wait until the daemon serves or has ended. Returns whether it serves."""
        with self._more_lines:
            assert self._more_lines.wait_for(lambda: self._log_ended or self.logged("serving"), _TIMEOUT_S)
        if found := self.logged("serving"):
            self.port = found[0]["port"]
        return bool(found)

    def wait_for_end(self, timeout_s: float = _TIMEOUT_S) -> int:
        """Wait for the process to end by itself. Returns its exit code."""
        code = self.process.wait(timeout_s)
        self._join_reader()
        return code

    def kill(self) -> None:
        """SIGKILL: nothing of the daemon runs after this."""
        self.process.kill()
        self.wait_for_end()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The daemon does nothing until the block is left, and its connections stay open."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.process.terminate()

    def stop(self, timeout_s: float = _TIMEOUT_S) -> int:
        """SIGTERM, and wait. Returns the exit code."""
        self.terminate()
        return self.wait_for_end(timeout_s)

    def remove(self) -> None:
        """Kill the daemon, if it runs, and remove its store and its shared memory."""
        if self._process is not None:
            self.kill()
        # pytest keeps the folders of fixtures of a whole file, and of tests that fail: a quarter of a gigabyte each.
        for folder in (self.store, self.shared_memory):
            shutil.rmtree(folder, ignore_errors=True)

    def client(self, name: str = "test", **options: Any) -> Client:
        """A client of this daemon. Close it, or use it as a context manager.

        Its calls may take longer than an engine's: a test that wants an engine's timeout names it.
        """
        return Client(self.address, name=name, **{"timeout_s": SOON_S, **options})

    def check(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``kvservice check`` on the stopped store."""
        return self.command("check", *arguments, str(self.store))

    @staticmethod
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        """``kvservice`` with these arguments, until it ends. Its standard input is no terminal."""
        return process_starter.run(
            "kvservice",
            list(arguments),
            environment={**os.environ, "PYTHONPATH": python_path()},
            timeout=_TIMEOUT_S,
        )

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.remove()
            raise

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _read(self, process: StartedProcess | subprocess.Popen[str], lines: list[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                with self._more_lines:
                    lines.append(line)
                    self._more_lines.notify_all()
        with self._more_lines:
            self._log_ended = True
            self._more_lines.notify_all()

    def _join_reader(self) -> None:
        if self._reader is not None:
            self._reader.join(_TIMEOUT_S)
