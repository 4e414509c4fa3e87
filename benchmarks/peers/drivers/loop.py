"""What all drivers share: JSON lines with the harness, client processes, time, CPU seconds, the check of every byte.

It needs NumPy and the standard library, because each system's own environment runs it. Requests, one object a line:

* ``{"do": "start", "options": {...}, "folder": ..., "bytes_max": ...}`` starts the servers;
* ``{"do": "open", "clients": 4, "bytes": ...}`` starts client processes with so many bytes of blocks each;
* ``{"do": "turn", "name": ..., "block_bytes": ..., "blocks": ...}`` puts and gets so many fresh blocks in each client;
* the end of the input ends the driver and its children.

Each answer is ``{"ok": ...}`` or ``{"error": ...}``. A turn's has seconds and CPU seconds of the put and the get.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.leftovers import end_with_parent

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_CONTENT_BYTES = 32 << 20  # The largest block.
_SERVER_START_S = 180.0  # LMCache compiles what it imports, the first time.

Bytes = NDArray[np.uint8]


class WrongBytes(Exception):
    """What a get delivered is not what was put."""


@dataclass(frozen=True)
class Memory:
    """The memory of one client process: page-aligned, faulted in, the same for all turns. It can be registered."""

    source: Bytes
    target: Bytes

    @classmethod
    def of(cls, size_bytes: int) -> Memory:
        return cls(_pages(size_bytes), _pages(size_bytes))


class Client:
    """One client process of a system. `names` and what a subclass does outside `put` and `get` is not timed."""

    def names(self, turn: str, block_bytes: int, blocks: int) -> Any:
        """What `put` and the others get as `names`: by default a string per block that no other turn has."""
        return [f"{turn}-{block}" for block in range(blocks)]

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        """Store all blocks. Returns once the system has them: it may not read `blocks` after that."""
        raise NotImplementedError

    def get(self, names: Any, blocks: Sequence[Bytes]) -> Sequence[Any] | None:
        """Read all blocks into `blocks`, or return buffers that hold them in this process's own memory."""
        raise NotImplementedError

    def settle(self, names: Any) -> None:
        """Called between put and get: where the get is to be a cold one, drop the blocks from memory."""

    def copy_out(self, names: Any, blocks: Sequence[Bytes]) -> None:
        """Called after a get that leaves the bytes in place: copy them from there, to be verified."""

    def drop(self, names: Any) -> None:
        """Forget the blocks."""

    def close(self) -> None:
        """Release what the system holds outside this process."""


class Servers:
    """The server processes of one system. They end with the driver, also if it is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, command: Sequence[str | Path], *, port: int, env: dict[str, str] | None = None) -> int:
        """Start a program and wait until something accepts connections on `port`. Returns its process id."""
        return self._start(command, env, lambda log: accepts(port))

    def run_until_logged(self, command: Sequence[str | Path], text: str) -> str:
        """Start a program and wait for a line with `text` in what it prints. Returns that line."""
        found: list[str] = []

        def is_ready(log: Path) -> bool:
            lines = log.read_text(errors="replace").splitlines(keepends=True)
            found.extend(line for line in lines if text in line and line.endswith("\n"))
            return bool(found)

        self._start(command, None, is_ready)
        return found[0]

    def _start(
        self, command: Sequence[str | Path], env: dict[str, str] | None, is_ready: Callable[[Path], bool]
    ) -> int:
        log = self.folder / f"{Path(command[0]).name}-{len(self._running)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                preexec_fn=end_with_parent,
                cwd=self.folder,
            )
        self._running.append(process)
        deadline = time.monotonic() + _SERVER_START_S
        while not is_ready(log):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{Path(command[0]).name} did not start: {log.read_text(errors='replace')[-800:]}")
            time.sleep(0.05)
        return process.pid

    def stop(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class System:
    """One system. `options` come from the harness; `bytes_max` are those of all blocks stored at a time."""

    def __init__(self, options: dict[str, Any], bytes_max: int) -> None:
        self.options = options
        self.bytes_max = bytes_max

    def start(self, servers: Servers) -> None:
        """Start the servers. Nothing here may start threads: the clients are forked from this process."""

    def client(self, memory: Memory, number: int) -> Client:
        """Called in a client process of its own."""
        raise NotImplementedError


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def program(name: str) -> Path:
    """A program of this environment."""
    return Path(sys.executable).with_name(name)


def main(make: Callable[[dict[str, Any], int], System]) -> None:
    """Answer requests until the input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes into the log.
    coordinator = _Coordinator(make)
    try:
        for line in sys.stdin:
            try:
                answer: dict[str, Any] = {"ok": coordinator.answer(json.loads(line))}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        coordinator.close()


class _Coordinator:
    """Starts servers and client processes, and times what the clients do together."""

    def __init__(self, make: Callable[[dict[str, Any], int], System]) -> None:
        self._make = make
        self._system: System | None = None
        self._servers: Servers | None = None
        self._workers: list[tuple[Any, Connection]] = []
        self._content = np.frombuffer(np.random.default_rng(1).bytes(_CONTENT_BYTES), np.uint64)

    def answer(self, request: dict[str, Any]) -> Any:
        if request["do"] == "start":
            self._servers = Servers(Path(request["folder"]))
            self._system = self._make(request["options"], request["bytes_max"])
            return self._system.start(self._servers)
        if request["do"] == "open":
            return self._open(request["clients"], request["bytes"])
        return self._turn(request["name"], request["block_bytes"], request["blocks"])

    def close(self) -> None:
        self._close_workers()
        if self._servers is not None:
            self._servers.stop()

    def _open(self, clients: int, size_bytes: int) -> None:
        self._close_workers()
        forked = multiprocessing.get_context("fork")
        for number in range(clients):
            ours, theirs = forked.Pipe()
            arguments = (self._system, number, theirs, size_bytes, self._content)
            process = forked.Process(target=_work, args=arguments)  # It may have children of its own.
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._gathered()

    def _turn(self, name: str, block_bytes: int, blocks: int) -> dict[str, dict[str, float]]:
        self._all("prepare", name, block_bytes, blocks)
        found = {"put": self._timed("put")}
        self._all("settle")
        found["get"] = self._timed("get")
        self._all("verify")
        return found

    def _timed(self, what: str) -> dict[str, float]:
        processes = _session()
        before = [_cpu_s(process) for process in processes]
        spans = self._all(what)
        after = [_cpu_s(process) for process in processes]
        cpu_s = sum(end - begin for begin, end in zip(before, after, strict=True) if end >= begin)
        return {"seconds": max(end for _, end in spans) - min(begin for begin, _ in spans), "cpu_s": cpu_s}

    def _all(self, *command: Any) -> list[Any]:
        for _, pipe in self._workers:
            pipe.send(command)
        return self._gathered()

    def _gathered(self) -> list[Any]:
        """The answers of all client processes: all are read, so that none is taken for the next command's."""
        answers = []
        for _, pipe in self._workers:
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(("error", "a client process ended"))
        for kind, value in answers:
            if kind == "error":
                raise WrongBytes(value) if "WrongBytes" in value else RuntimeError(value)
        return [value for _, value in answers]

    def _close_workers(self) -> None:
        for process, pipe in self._workers:
            with suppress(OSError):
                pipe.send(("close",))
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []


def _work(system: System, number: int, pipe: Connection, size_bytes: int, content: NDArray[np.uint64]) -> None:
    """The main function of a client process."""
    end_with_parent()
    try:
        worker = Worker(system.client(memory := Memory.of(size_bytes), number), memory, number, content)
        pipe.send(("ok", None))
        while (command := pipe.recv())[0] != "close":
            try:
                pipe.send(("ok", getattr(worker, command[0])(*command[1:])))
            except Exception as error:
                traceback.print_exc()
                pipe.send(("error", f"{type(error).__name__}: {error}"))
        worker.client.close()
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {error}"))
    finally:
        sys.stderr.flush()
        os._exit(0)  # Some systems' libraries wait for ever for their own threads.


class Worker:
    """The turns of one client."""

    def __init__(self, client: Client, memory: Memory, number: int, content: NDArray[np.uint64]) -> None:
        self.client = client
        self._memory = memory
        self._number = number
        self._content = content
        self._turn = ""
        self._names: Any = None
        self._source: list[Bytes] = []
        self._target: list[Bytes] = []
        self._delivered: Sequence[Any] = []

    def prepare(self, turn: str, block_bytes: int, blocks: int) -> None:
        """Fill the source with what this turn puts: no two blocks of the run have a word of 8 bytes in common."""
        self._turn = f"{turn}-{self._number}"
        self._source, self._target = (
            [whole[block * block_bytes : (block + 1) * block_bytes] for block in range(blocks)]
            for whole in (self._memory.source, self._memory.target)
        )
        for block, data in enumerate(self._source):
            self._write_content(block, data)
        self._names = self.client.names(self._turn, block_bytes, blocks)

    def put(self) -> tuple[float, float]:
        begin = time.perf_counter()
        self.client.put(self._names, self._source)
        return begin, time.perf_counter()

    def settle(self) -> None:
        """Overwrite both memories, so that nothing but the system can bring the bytes back."""
        for source, target in zip(self._source, self._target, strict=True):
            source.fill(0)
            target.fill(0xEE)
        self.client.settle(self._names)

    def get(self) -> tuple[float, float]:
        begin = time.perf_counter()
        delivered = self.client.get(self._names, self._target)
        end = time.perf_counter()
        self._delivered = self._target if delivered is None else delivered
        return begin, end

    def verify(self) -> None:
        self.client.copy_out(self._names, self._target)
        if len(self._delivered) != len(self._source):
            raise WrongBytes(f"{len(self._delivered)} of {len(self._source)} blocks were delivered")
        expected = np.empty_like(self._source[0])  # Apart, for a system may have kept the source itself.
        for block, delivered in enumerate(self._delivered):
            self._write_content(block, expected)
            found = np.frombuffer(delivered, np.uint8)
            if len(found) != len(expected) or _LIBC.memcmp(found.ctypes.data, expected.ctypes.data, len(found)):
                raise WrongBytes(f"block {block} of turn {self._turn} is not what was put")
        self._delivered = []
        self.client.drop(self._names)

    def _write_content(self, block: int, into: Bytes) -> None:
        word = hashlib.blake2b(f"{self._turn}/{block}".encode(), digest_size=8).digest()
        words = into.view(np.uint64)
        np.bitwise_xor(self._content[: len(words)], np.frombuffer(word, np.uint64)[0], out=words)


def _pages(size_bytes: int) -> Bytes:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # With scattered pages of 4 KiB, O_DIRECT reaches a third of the disk's speed.
    pages = np.frombuffer(memory, np.uint8)
    pages.fill(1)
    return pages


def accepts(port: int) -> bool:
    """Whether something listens there, on loopback."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _session() -> list[int]:
    """The processes of this session: servers, clients, and what they started."""
    session, found = str(os.getsid(0)), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if (folder / "stat").read_text().rpartition(")")[2].split()[3] == session:
                    found.append(int(folder.name))
    return found


def _cpu_s(process: int) -> float:
    """User and system seconds of a process: those of /proc, but to the nanosecond, by the kernel's clock of it."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0  # It ended.
