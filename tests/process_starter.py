"""Starts programs of ours as forks of a process that has done their imports, which take most of a daemon's start.

A program gets arguments, environment, folder and files as from ``subprocess``, and runs as ``__main__``. All tests of
one Python process use one such process; ``python -m tests.process_starter FD`` is its program.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

_ROOT = Path(__file__).resolve().parent.parent
_IMPORTED = ("kvservice.check", "kvservice.config_sources", "kvservice.daemon", "kvservice.host_limits", "uvloop")
_READ_BY_IMPORTS = ("CUDASIM_", "GRPC_", "LD_", "MALLOC_", "OPENBLAS_", "PYTHON")  # Beginnings of variables.
_REQUEST_BYTES_MAX, _FDS_MAX = 2**17, 16
_NUMBER = struct.Struct("=i")  # A start is answered with two: the process's id, and its exit code in the end.


class StartedProcess:
    """The part of `subprocess.Popen` that tests of daemons use. Any thread may call it."""

    def __init__(self, answers_fd: int) -> None:
        self.stderr: IO[str] | None = None
        self.returncode: int | None = None
        self._answers_fd = answers_fd
        self._lock = threading.Lock()
        self.pid = self._answer()

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises ``TimeoutExpired`` after `timeout` seconds."""
        if (code := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Does nothing if the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._answers_fd], [], [], timeout_s)[0]:
                self.returncode = self._answer()
                os.close(self._answers_fd)
            return self.returncode

    def _answer(self) -> int:
        answer = os.read(self._answers_fd, _NUMBER.size)
        assert answer, "the process that forks has ended"
        number: int = _NUMBER.unpack(answer)[0]
        return number


def can_start(environment: Mapping[str, str]) -> bool:
    """Whether the imports would be the same with this environment."""
    return all(os.environ.get(name) == environment.get(name) for name in {*os.environ, *environment} if _is_read(name))


def start(
    module: str, arguments: Sequence[str], *, environment: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> StartedProcess:
    """``python -m MODULE``, with its standard error in a pipe."""
    stderr_fd, write_fd = os.pipe()
    process = _start(module, arguments, environment, {1: 1, 2: write_fd, **{fd: fd for fd in pass_fds}})
    os.close(write_fd)
    process.stderr = os.fdopen(stderr_fd)
    return process


def run(
    module: str, arguments: Sequence[str], *, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """The same until its end, with both of its outputs."""
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        process = _start(module, arguments, environment, {1: output.fileno(), 2: errors.fileno()})
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([module, *arguments], code, output.read(), errors.read())


def _start(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], fds: Mapping[int, int]
) -> StartedProcess:
    """`fds` are this process's files by the numbers that they get in the new one."""
    request = {
        "module": module,
        "arguments": list(arguments),
        "environment": dict(environment),
        "folder": os.getcwd(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "fds": list(fds),
    }
    answers_fd, answer_fd = os.pipe()
    socket.send_fds(_connection(), [json.dumps(request).encode()], [answer_fd, *fds.values()])
    os.close(answer_fd)
    return StartedProcess(answers_fd)


@functools.cache
def _connection() -> socket.socket:
    """To this process's own starter, which ends with this process."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.process_starter", str(there.fileno())],
        stdin=subprocess.DEVNULL,
        cwd=_ROOT,
        # No threads of numpy, which would not exist in a fork.
        env={**os.environ, "PYTHONPATH": python_path(), "OPENBLAS_NUM_THREADS": "1"},
        pass_fds=[there.fileno()],
    )
    there.close()

    def end() -> None:
        here.close()
        process.wait()

    atexit.register(end)
    return here


def python_path() -> str:
    return os.pathsep.join(str(_ROOT / name) for name in ("", "proto", "client", "engine_adapter"))


def _is_read(name: str) -> bool:
    return name.startswith(_READ_BY_IMPORTS) and name != "PYTHONPATH"


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request, and answer with exit codes. Returns the request in a fork, and None in the end."""
    answer_fds: dict[int, tuple[int, int]] = {}  # By the pidfd of a process that runs: its id, and where to answer.
    poll = select.poll()
    poll.register(requests.fileno(), select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != requests.fileno():
                poll.unregister(fd)
                pid, answer_fd = answer_fds.pop(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _write(answer_fd, code)
                os.close(answer_fd)
                os.close(fd)
                continue
            message, fds, _, _ = socket.recv_fds(requests, _REQUEST_BYTES_MAX, _FDS_MAX)
            if not message:
                return None
            request: dict[str, Any] = json.loads(message)
            if (pid := os.fork()) == 0:
                requests.detach()
                _take_over(request["fds"], fds[1:])
                return request
            for each in fds[1:]:
                os.close(each)
            _write(fds[0], pid)
            pidfd = os.pidfd_open(pid)
            answer_fds[pidfd] = pid, fds[0]
            poll.register(pidfd, select.POLLIN)


def _write(fd: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # The test may have ended.
        os.write(fd, _NUMBER.pack(number))


def _take_over(numbers: Sequence[int], fds: Sequence[int]) -> None:
    """Give received files the numbers that they have in the test's process, and close all others but 0."""
    above = max(*numbers, *fds) + 1
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, above) for fd in fds]
    os.closerange(1, above)
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number)
    os.closerange(above, max(copies) + 1)


def main() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    os.environ.pop("OPENBLAS_NUM_THREADS")
    gc.freeze()  # A fork's collections then leave the imports alone, whose pages it would have to copy.
    if (request := _serve(socket.socket(fileno=int(sys.argv[1])))) is None:
        return
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    sys.argv[1:] = request["arguments"]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
