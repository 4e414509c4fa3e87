"""What a connection to the bulk port knows of its link."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvservice_api.errors import DeadlineExceeded
from kvservice_api.socket_buffers import BLOCKED, SocketBuffers
from kvservice_api.tls_contexts import new_context
from kvservice_client.retry import SYSTEM_CLOCK, Deadline
from kvservice_client.transports import bulk_connections
from kvservice_client.transports.bulk_connections import BulkConnection, BulkConnections, Endpoint
from tests.certificates import Authority
from tests.clock import ClientClock

ENDPOINT = Endpoint("127.0.0.1", 1, 1, None)


class SocketOfBusyHosts:
    """Its bytes wait for 5 ms in queues. The shortest round trip was of `min_rtt_us`."""

    def __init__(self, min_rtt_us: int) -> None:
        self._min_rtt_us = min_rtt_us

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        info = bytearray(232)
        struct.pack_into("=I", info, 68, 5000)  # tcpi_rtt.
        struct.pack_into("=I", info, 148, self._min_rtt_us)  # tcpi_min_rtt.
        return bytes(info[:size])

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("min_rtt_us", "rtt_s"), [(50, 50e-6), (5000, 5e-3), (2**32 - 1, 0.0)])
def test_a_link_is_as_long_as_its_shortest_round_trip_however_busy_its_hosts_are(min_rtt_us: int, rtt_s: float) -> None:
    connection = BulkConnection(socket.AF_INET, ENDPOINT)
    connection.close()
    busy: Any = SocketOfBusyHosts(min_rtt_us)
    connection._socket = busy
    assert connection.rtt_s == rtt_s


class SlowBuffers:
    """Each call moves bytes for as long as it may, and then waits as long as its last system call does."""

    is_done = False

    def __init__(self, clock: ClientClock) -> None:
        self._clock = clock

    def receive(self, connection: socket.socket, _: int, move_s: float) -> tuple[int, int]:
        seconds, micros = struct.unpack("ll", connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
        self._clock.advance(seconds=move_s + seconds + micros / 1e6)
        return BLOCKED, 1


def test_a_deadline_ends_a_wait_for_bytes_that_came_until_shortly_before() -> None:
    clock, connection = ClientClock(), BulkConnection(socket.AF_INET, ENDPOINT)
    slow: Any = SlowBuffers(clock)
    began_s = clock.now_s()
    with pytest.raises(DeadlineExceeded):
        connection.receive(slow, Deadline(0.6, clock))
    assert clock.now_s() - began_s < 0.61, "the kernel rounds its time limits up"
    connection.close()


def test_a_connection_knows_its_round_trip_once_it_is_connected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = BulkConnection(socket.AF_INET, ENDPOINT)
        connection.connect(listener.getsockname(), None, Deadline(10.0))
        assert 0 < connection.rtt_s < 10.0
        connection.close()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("sent", ["nothing", "a byte that was not requested", "the end"])
def test_an_idle_connection_with_tls_is_stale_if_anything_has_come(sent: str, tmp_path: Path) -> None:
    """Also if OpenSSL has read it together with the last message, so that the socket is not readable."""
    of_daemon = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of_daemon.load_cert_chain(*Authority().issue().write(tmp_path))
    of_client = new_context(ssl.PROTOCOL_TLS_CLIENT)
    of_client.check_hostname, of_client.verify_mode = False, ssl.CERT_NONE
    has_sent, is_over = threading.Event(), threading.Event()

    def serve() -> None:
        accepted, _ = listener.accept()
        with of_daemon.wrap_socket(accepted, server_side=True) as daemon:
            daemon.recv(100)
            daemon.sendall(b"last")
            if sent == "a byte that was not requested":
                daemon.sendall(b"x")
            if sent == "the end":
                daemon.shutdown(socket.SHUT_RDWR)
            has_sent.set()
            is_over.wait(30.0)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        tls: Any = (None, "localhost")
        connection = BulkConnection(socket.AF_INET, ENDPOINT._replace(tls=tls))
        connection.connect(listener.getsockname(), of_client, Deadline(10.0))
        assert has_sent.wait(30.0)
        connection.receive(SocketBuffers([memoryview(bytearray(4))]), Deadline(10.0))
        assert connection.is_stale == (sent != "nothing")
        connection.close()
        is_over.set()
        serving.join()


@pytest.mark.parametrize(
    ("at_first_s", "later_s", "is_limited"),
    [(5e-6, 5e-6, (True, True)), (50e-6, 5e-6, (False, True)), (50e-6, 50e-6, (False, False))],
)
def test_a_daemon_on_the_same_host_is_sent_half_a_mib_ahead_of_what_it_has_received(
    monkeypatch: pytest.MonkeyPatch, at_first_s: float, later_s: float, is_limited: tuple[bool, bool]
) -> None:
    """A busy host may show its round trip only after a transfer."""

    def is_now_limited() -> bool:
        return connection._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 512 << 10

    client: Any = SimpleNamespace(clock=SYSTEM_CLOCK)
    pool = BulkConnections(client, lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(bulk_connections, "shortest_rtt_s", lambda connected: at_first_s)
        connection = BulkConnection(socket.AF_INET, ENDPOINT)
        connection.connect(listener.getsockname(), None, Deadline(10.0))
        after_connect = is_now_limited()
        monkeypatch.setattr(bulk_connections, "shortest_rtt_s", lambda connected: later_s)
        pool.put_back(connection)
        assert (after_connect, is_now_limited()) == is_limited
        pool.close()
