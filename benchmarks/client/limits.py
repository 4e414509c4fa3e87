"""The machine's own limits: copying memory, and a plain TCP connection to another process."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def tcp() -> Iterator[Callable[[int], dict[str, float]]]:
    """A function that measures GB/s received from another process over loopback, by piece and connections."""
    with subprocess.Popen(
        [sys.executable, "-m", tcp_peer.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as peer:
        assert peer.stdout is not None and peer.stdin is not None
        port = int(peer.stdout.readline())

        def measure(size_bytes: int) -> dict[str, float]:
            def work(thread: int, threads: int, size: int) -> None:
                _receive(port, size_bytes // threads, size)

            return _by_setting(size_bytes, work)

        try:
            yield measure
        finally:
            peer.stdin.close()


def _receive(port: int, total_bytes: int, piece_bytes: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection, memoryview(bytearray(piece_bytes)) as into:
        connection.sendall(tcp_peer.REQUEST.pack(total_bytes, piece_bytes))
        received = 0
        while received < total_bytes:
            count = connection.recv_into(into[received % piece_bytes :])
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
