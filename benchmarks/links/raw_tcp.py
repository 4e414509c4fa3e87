"""What plain sockets reach on a link, as the limit: one process sends bytes, or receives them, as it is asked.

Run as a module with an address to listen on: prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading

_REQUEST = struct.Struct(">?Q")  # Whether this end is to send, and how many bytes.
_PIECE_BYTES = 1 << 20


def load(address: tuple[str, int], size_bytes: int, connections: int) -> None:
    """Receive so many bytes in all, over new connections."""
    _at_once(address, size_bytes, connections, is_load=True)


def save(address: tuple[str, int], size_bytes: int, connections: int) -> None:
    """Send so many bytes in all, and wait until the other end has received them."""
    _at_once(address, size_bytes, connections, is_load=False)


def _at_once(address: tuple[str, int], size_bytes: int, connections: int, *, is_load: bool) -> None:
    failed: list[OSError] = []

    def move() -> None:
        try:
            with socket.create_connection(address) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(_REQUEST.pack(is_load, size_bytes // connections))
                (_receive if is_load else _send)(connection, size_bytes // connections)
                if not is_load:
                    connection.recv(1)
        except OSError as error:
            failed.append(error)

    running = [threading.Thread(target=move) for _ in range(connections)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]


def _receive(connection: socket.socket, size_bytes: int) -> None:
    into = memoryview(bytearray(_PIECE_BYTES))
    while size_bytes:
        count = connection.recv_into(into[: min(size_bytes, _PIECE_BYTES)])
        if not count:
            raise ConnectionError("the other end of the plain connection went away")
        size_bytes -= count


def _send(connection: socket.socket, size_bytes: int) -> None:
    piece = memoryview(bytearray(_PIECE_BYTES))
    while size_bytes:
        size_bytes -= connection.send(piece[:size_bytes])


def _serve(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = connection.recv(_REQUEST.size, socket.MSG_WAITALL)
        if not request:
            return  # It was only connected.
        sends, size_bytes = _REQUEST.unpack(request)
        if sends:
            _send(connection, size_bytes)
        else:
            _receive(connection, size_bytes)
            connection.sendall(b".")


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    listening = socket.create_server((sys.argv[1], 0))
    print(listening.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listening,), daemon=True).start()
    sys.stdin.read()
