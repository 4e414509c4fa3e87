"""The other end of the TCP and TLS measures: a process that sends as many bytes as it is asked for.

Run as a module, with the size of the memory that it sends from: prints its port, serves loopback only, and ends when
its standard input does. With the paths of a certificate and its key too it serves TLS.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import sys
import threading

REQUEST = struct.Struct(">QQQQ")  # Bytes in all, bytes a send, where in the memory, how far from one send to the next.


def _serve(connection: socket.socket, context: ssl.SSLContext | None, memory: memoryview) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection if context is None else context.wrap_socket(connection, server_side=True) as connection:
        total_bytes, piece_bytes, at, step_bytes = REQUEST.unpack(connection.recv(REQUEST.size))  # Sent in one segment.
        for start in range(0, total_bytes, piece_bytes):
            connection.sendall(memory[at : at + min(piece_bytes, total_bytes - start)])
            at += step_bytes


def _accept(listener: socket.socket, context: ssl.SSLContext | None, memory: memoryview) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection, context, memory), daemon=True).start()


if __name__ == "__main__":
    sent_from = memoryview(bytearray(os.urandom(1 << 16)) * (int(sys.argv[1]) >> 16))
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    encryption = None
    if sys.argv[2:]:
        encryption = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        encryption.load_cert_chain(*sys.argv[2:])
    threading.Thread(target=_accept, args=(listening, encryption, sent_from), daemon=True).start()
    sys.stdin.read()
