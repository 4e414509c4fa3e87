"""The limit between hosts: plain TCP on loopback, from the client's memory to that of a process, and back."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.leftovers import end_with_parent
from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, main

_REQUEST = struct.Struct("<BQ")  # 1: the client sends so many bytes; 0: the server does.
_PIECE = 1 << 20


class RawTcp(System):
    """`connections` per client: each has a thread and an equal share of the bytes."""

    def start(self, servers: Servers) -> None:
        import multiprocessing

        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True).start()
        listener.close()

    def client(self, memory: Memory, number: int) -> Client:
        return RawTcpClient(self.port, self.options["connections"])


class RawTcpClient(Client):
    def __init__(self, port: int, connections: int) -> None:
        self._connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        for connection in self._connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._kept: list[Bytes] = []

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        self._shared(_send, blocks)

    def get(self, names: Any, blocks: Sequence[Bytes]) -> None:
        self._shared(_receive, blocks)

    def _shared(self, work: Any, blocks: Sequence[Bytes]) -> None:
        """The shares are of the bytes, not of the blocks: one block too is moved by all connections."""
        size, count = len(blocks[0]), len(self._connections)
        shares = [
            [block[size * number // count : size * (number + 1) // count] for block in blocks]
            for number in range(count)
        ]
        threads = [
            threading.Thread(target=work, args=each) for each in list(zip(self._connections, shares, strict=True))[1:]
        ]
        for thread in threads:
            thread.start()
        work(self._connections[0], shares[0])
        for thread in threads:
            thread.join()


def _send(connection: socket.socket, blocks: Sequence[Bytes]) -> None:
    connection.sendall(_REQUEST.pack(1, sum(map(len, blocks))))
    for block in blocks:
        connection.sendall(block.data)
    connection.recv(1)


def _receive(connection: socket.socket, blocks: Sequence[Bytes]) -> None:
    connection.sendall(_REQUEST.pack(0, sum(map(len, blocks))))
    for block in blocks:
        _fill(connection, block)


def _fill(connection: socket.socket, into: Bytes) -> None:
    received = 0
    while received < len(into):
        count = connection.recv_into(into[received : received + _PIECE].data)
        if not count:
            raise ConnectionError("the other end of the TCP limit went away")
        received += count


def _serve(listener: socket.socket) -> None:
    end_with_parent()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    """Keeps what was last sent on this connection, and sends it back."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    kept = np.zeros(0, np.uint8)
    while header := connection.recv(_REQUEST.size, socket.MSG_WAITALL):
        is_put, size_bytes = _REQUEST.unpack(header)
        if is_put:
            if len(kept) != size_bytes:
                kept = np.ones(size_bytes, np.uint8)
            _fill(connection, kept)
            connection.sendall(b"1")
        else:
            connection.sendall(kept.data)


if __name__ == "__main__":
    main(RawTcp)
