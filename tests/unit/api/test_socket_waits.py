"""When a thread that reads a socket continues: others have their turn, and no byte is waited for in vain."""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvservice_api import copying
from kvservice_api.socket_buffers import BLOCKED, MOVED, SocketBuffers
from tests.certificates import Authority

LONG_S = 30.0


@pytest.fixture
def watched() -> Iterator[int]:
    descriptor = os.eventfd(0)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    """UNIX sockets take no notice of SO_RCVLOWAT."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            yield near, far


def test_a_turn_ends_while_more_bytes_are_there_if_another_connection_can_move(watched: int) -> None:
    if copying.native is None:
        pytest.skip("in Python each call is a turn")
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        queued = 0
        with suppress(BlockingIOError):
            while True:
                queued += near.send(bytes(16 << 10))
        assert queued > 600 << 10, "more than a piece"
        os.eventfd_write(watched, 1)
        received = SocketBuffers([memoryview(bytearray(16 << 10)) for _ in range(1000)], summed=True)
        why, count = received.receive(far, 1, LONG_S, watched)
        assert why == MOVED and 0 < count < queued


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("missing", [1, 24, 5000, 300 << 10])
def test_a_socket_is_readable_once_what_is_missing_has_come(
    tcp: tuple[socket.socket, socket.socket],
    watched: int,
    is_native: bool,
    missing: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also after more was missing before."""
    if not is_native:
        monkeypatch.setattr(copying, "native", None)
    elif copying.native is None:
        pytest.skip("the C extension is not built here")
    near, far = tcp
    readable = select.poll()
    readable.register(far, select.POLLIN)
    for size in (1 << 20, missing):
        received = SocketBuffers([memoryview(bytearray(size))])
        assert received.receive(far, 1, 0.0, watched) == (BLOCKED, 0)
        rest = bytes(size)
        while not received.is_done:
            rest = rest[near.send(rest[: 256 << 10]) :]
            if size == missing:
                assert readable.poll(LONG_S * 1000)
            while received.receive(far, 1, 0.0, watched)[0] != BLOCKED and not received.is_done:
                pass


def test_with_tls_a_move_ends_after_its_time_although_more_records_have_come(tmp_path: Path) -> None:
    of_daemon = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of_daemon.load_cert_chain(*Authority().issue().write(tmp_path))
    of_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    of_client.check_hostname, of_client.verify_mode = False, ssl.CERT_NONE
    near, far = socket.socketpair()

    def send() -> None:
        with of_daemon.wrap_socket(far, server_side=True) as daemon:
            for _ in range(3):
                daemon.sendall(bytes(100))

    sender = threading.Thread(target=send)
    sender.start()
    with of_client.wrap_socket(near) as client:
        sender.join()
        received = SocketBuffers([memoryview(bytearray(300))])
        assert received.receive(client, 1, 0.0) == (MOVED, 100)
        assert received.receive(client, 1, LONG_S) == (MOVED, 200)


def test_with_tls_only_the_end_of_a_large_message_sends_less_than_a_segment(
    tcp: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    """Else each record of 16 KiB would be a segment of its own."""
    of_daemon = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of_daemon.load_cert_chain(*Authority().issue().write(tmp_path))
    of_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    of_client.check_hostname, of_client.verify_mode = False, ssl.CERT_NONE
    near, far = tcp
    size = 8 << 20
    data = memoryview(bytes(size))
    corked = []

    def send() -> None:
        with of_daemon.wrap_socket(far.dup(), server_side=True) as daemon:
            for buffers in (SocketBuffers([data[:100], data[100:]]), SocketBuffers([data[:100]])):
                while not buffers.is_done:
                    buffers.send(daemon, 1, 0.0)
                    corked.append(daemon.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))

    sender = threading.Thread(target=send)
    sender.start()
    with of_client.wrap_socket(near.dup()) as client:
        received = SocketBuffers([memoryview(bytearray(size + 100))])
        while not received.is_done:
            assert received.receive(client, 1, LONG_S)[0] == MOVED
    sender.join()
    *during, at_the_end, of_a_small_one = corked
    assert all(during) and len(during) > 10
    assert not at_the_end and not of_a_small_one
