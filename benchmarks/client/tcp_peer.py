"""The other end of the TCP measure: a process that sends as many bytes as it is asked for.

Run as a module: prints its port, serves loopback only, and ends when its standard input does.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading

REQUEST = struct.Struct(">QQ")  # Bytes in all, bytes a send.


def _serve(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        total_bytes, piece_bytes = REQUEST.unpack(connection.recv(REQUEST.size, socket.MSG_WAITALL))
        piece = memoryview(bytearray(os.urandom(1 << 16)) * (piece_bytes >> 16))
        for start in range(0, total_bytes, piece_bytes):
            connection.sendall(piece[: total_bytes - start])


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listening,), daemon=True).start()
    sys.stdin.read()
