"""Starts, calls and kills the daemon and the engine as child processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from examples.demo.protocol import InMemory, Loaded, Turn, WindowedTurn
from examples.demo.script import Message
from kvservice_client import Client, KVError

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0


class ProcessFailed(Exception):
    """A child process did not start, or ended. The message has the last lines that it wrote."""


class Process:
    """A child process. Leaving it as a context manager stops it."""

    def __init__(self, name: str, command: Sequence[str], log: Path | None, **options: Any) -> None:
        self.name = name
        self._log = log
        if log is not None:
            options["stderr"] = log.open("ab")
        self._child: subprocess.Popen[str] = subprocess.Popen(command, text=True, **options)
        if log is not None:
            options["stderr"].close()

    @property
    def pid(self) -> int:
        return self._child.pid

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        with contextlib.suppress(BrokenPipeError), self._child:  # Closes its pipes, and waits.
            self._child.kill()

    def stop(self) -> None:
        """Send SIGTERM; send SIGKILL if the process does not end in time."""
        self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_STOP_TIMEOUT_S)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _failed(self, what: str) -> ProcessFailed:
        last = self._log.read_text(errors="replace").strip().splitlines()[-5:] if self._log else []
        return ProcessFailed("\n".join([f"the {self.name} {what}", *last]))


class DaemonProcess(Process):
    """`kvservice serve` on a UNIX socket."""

    @staticmethod
    def address_in(folder: Path) -> str:
        return str(folder / "kvservice.sock")

    def __init__(self, folder: Path, dram_folder: Path, dram_bytes: int, ssd_bytes: int) -> None:
        self.address = self.address_in(folder)
        settings = {
            "store.path": folder / "store",
            "dram.path": dram_folder,
            "dram.capacity_bytes": dram_bytes,
            "ssd.capacity_bytes": ssd_bytes,
            "server.address": "127.0.0.1:0",
            "server.unix_socket": self.address,
            "server.metrics_address": "",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "kvservice", "serve", *flags]
        super().__init__("daemon", command, folder / "daemon.log", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            self._await_serving()
        except BaseException:
            self.stop()
            raise

    def _await_serving(self) -> None:
        give_up_s = time.monotonic() + _START_TIMEOUT_S
        with Client(self.address, name="demo", timeout_s=1.0) as client:
            while True:
                if self._child.poll() is not None:
                    raise self._failed(f"ended with exit code {self._child.returncode}")
                try:
                    client.capabilities()
                    return
                except KVError as error:
                    if time.monotonic() > give_up_s:
                        raise self._failed(f"did not answer within {_START_TIMEOUT_S:g} s: {error}") from error


class EngineProcess(Process):
    """``engine.py`` as a child process, called over its standard input and output."""

    def __init__(self, address: str, model: str, wait_s: float | None = None) -> None:
        """With `wait_s` the engine loads all stored KV, even if computing is faster, and waits this long per call."""
        command = [sys.executable, "-m", "examples.demo.engine", "--address", address, "--model", model]
        command += [] if wait_s is None else ["--wait-s", str(wait_s)]
        environment = {
            **os.environ,
            "TQDM_DISABLE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            # Threads that spin slow down other threads on the same cores, and the daemon.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        super().__init__("engine", command, None, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def loaded(self) -> Loaded:
        """Wait until the engine can answer. Call it once, before any other call."""
        return Loaded(**self._read())

    def count_tokens(self, conversations: Sequence[Sequence[Message]]) -> list[int]:
        counts: list[int] = self._call({"count": conversations})
        return counts

    def answer(self, messages: Sequence[Message], *, session_id: str, compare: bool) -> Turn:
        """The answer to the last message; with `compare` computed a second time without KVService."""
        return Turn(**self._call({"messages": messages, "session_id": session_id, "compare": compare}))

    def answer_in_window(
        self, messages: Sequence[Message], *, session_id: str, window: int, state: str
    ) -> WindowedTurn:
        """As `answer`, in a window that the conversation may overflow. `state` is what the last turn returned."""
        reply = self._call({"messages": messages, "session_id": session_id, "window": window, "state": state})
        return WindowedTurn(Turn(**reply["turn"]), reply["answer_ids"], reply["state"])

    def answer_in_memory(self, messages: Sequence[Message], *, window: int) -> InMemory:
        """The same without the daemon. Call it from the first turn on: this process keeps the history itself."""
        return InMemory(**self._call({"messages": messages, "window": window}))

    def _call(self, request: Any) -> Any:
        assert self._child.stdin is not None
        # If the process has ended, `_read` raises with its exit code.
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._failed(f"ended with exit code {self._child.wait()}")
        return json.loads(line)
