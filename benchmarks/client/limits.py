"""The machine's own limits: copying memory, and TCP and TLS connections to another process."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.client import tcp_peer

_SIZES = (256 << 10, 1 << 20, 4 << 20, 8 << 20)
_THREADS = (1, 2)


def memcpy(size_bytes: int) -> dict[str, float]:
    """GB/s of ``np.copyto`` between two faulted-in arrays larger than any cache, by piece and threads."""
    source = np.ones(size_bytes, np.uint8)
    target = np.zeros(size_bytes, np.uint8)

    def work(thread: int, threads: int, size: int) -> None:
        for start in range(thread * size, size_bytes, threads * size):
            np.copyto(target[start : start + size], source[start : start + size])

    return _by_setting(size_bytes, work)


class Pair(NamedTuple):
    """The files of a certificate for 127.0.0.1, which is its own authority, and of its key."""

    certificate: Path
    key: Path


def make_pair(folder: Path) -> Pair | None:
    """A new pair for measures of TLS; None without the program ``openssl``."""
    if shutil.which("openssl") is None:
        return None
    pair = Pair(folder / "bench.pem", folder / "bench.key")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost".split()
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command, *names, "-out", pair.certificate, "-keyout", pair.key], check=True, capture_output=True)
    return pair


@contextmanager
def tcp(pair: Pair | None = None, *, memory_bytes: int = 0) -> Iterator[Callable[[int], dict[str, float]]]:
    """A function that measures GB/s received from another process over loopback, by piece and connections.

    With a pair over Python's own TLS sockets. Each piece is sent from the same bytes and received into the same ones,
    which stay in the processor's caches. With `memory_bytes`, the most that may be measured, each byte has its own
    place at either end, as the bytes of a cache have.
    """
    context = None if pair is None else ssl.create_default_context(cafile=pair.certificate)
    command = [sys.executable, "-m", tcp_peer.__name__, str(memory_bytes or max(_SIZES)), *(pair or ())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None and peer.stdin is not None
        memory = np.ones(memory_bytes, np.uint8).data
        port = int(peer.stdout.readline())

        def measure(size_bytes: int) -> dict[str, float]:
            def work(thread: int, threads: int, size: int) -> None:
                share = size_bytes // threads
                into = memory[thread * share :][:share] if len(memory) else memoryview(bytearray(size))
                _receive(port, share, size, into, thread * share if len(memory) else None, context)

            return _by_setting(size_bytes, work)

        try:
            yield measure
        finally:
            peer.stdin.close()


def _receive(
    port: int, total_bytes: int, piece_bytes: int, into: memoryview, at: int | None, context: ssl.SSLContext | None
) -> None:
    """Into all of `into` again and again. `at` is where in the peer's memory the bytes are; None: all in one piece."""
    connection = socket.create_connection(("127.0.0.1", port))
    if context is not None:
        connection = context.wrap_socket(connection, server_hostname="127.0.0.1")
    with connection:
        connection.sendall(tcp_peer.REQUEST.pack(total_bytes, piece_bytes, at or 0, 0 if at is None else piece_bytes))
        received = 0
        while received < total_bytes:
            begin = received % len(into)
            count = connection.recv_into(into[begin : begin + piece_bytes])
            if not count:
                raise ConnectionError("the peer of the TCP measure went away")
            received += count


def _by_setting(size_bytes: int, work: Callable[[int, int, int], None]) -> dict[str, float]:
    found = {}
    for threads in _THREADS:
        for size in _SIZES:
            running = [threading.Thread(target=work, args=(number, threads, size)) for number in range(threads)]
            started = time.perf_counter()
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            found[f"{size >> 10} KiB x {threads}"] = size_bytes / (time.perf_counter() - started) / 1e9
    return found
