"""One connection of the bulk port: how much of a thread's time it takes at once."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

from kvservice.bulk.connection import NOW, READABLE, WRITABLE, BulkConnection, Steps
from kvservice_api.bulk import MessageKind, pack_header
from kvservice_api.socket_buffers import SocketBuffers
from tests.certificates import Authority


def test_small_messages_end_a_turn_as_many_bytes_do() -> None:
    client, accepted = socket.socketpair()
    accepted.setblocking(False)
    connection = BulkConnection(accepted, 0.0, 0.0, -1)
    messages = 0

    def read() -> Steps:
        nonlocal messages
        while True:
            yield from connection.read_header()
            messages += 1

    with client, accepted:
        client.sendall(pack_header(MessageKind.END, 0) * 100)
        steps = read()
        assert next(steps) == NOW
        assert messages < 100
        connection.turn_bytes = 0
        assert next(steps) == READABLE
        assert messages == 100


def test_bytes_on_tls_count_before_a_large_slice_is_written_whole(tmp_path: Path) -> None:
    certificate, key = Authority().issue().write(tmp_path)
    of_daemon = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of_daemon.load_cert_chain(certificate, key)
    of_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    of_client.check_hostname, of_client.verify_mode = False, ssl.CERT_NONE
    plain, accepted = socket.socketpair()
    accepted.setblocking(False)
    connection = BulkConnection(accepted, 0.0, 0.0, -1)

    is_done = threading.Event()

    def read_some() -> None:
        with of_client.wrap_socket(plain) as client:
            rest = 192 << 10  # The kernel keeps as much for it as it has not read of 256 KiB.
            while rest > 0:
                rest -= len(client.recv(rest))
            is_done.wait(30.0)

    reader = threading.Thread(target=read_some)
    reader.start()
    for _ in connection.handshake(of_daemon):
        pass
    writing = connection.write(SocketBuffers([memoryview(bytes(64 << 20))]))
    while not connection.sent_bytes and reader.is_alive():
        assert next(writing) in (WRITABLE, NOW)
    assert connection.sent_bytes
    assert connection.sent_bytes < 8 << 20
    is_done.set()
    reader.join()
    connection.close()
