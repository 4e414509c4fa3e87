"""What a connection to the bulk port knows of its link."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from kvservice_api.errors import DeadlineExceeded
from kvservice_api.socket_buffers import BLOCKED
from kvservice_client.retry import Deadline
from kvservice_client.transports.bulk_connections import BulkConnection, Endpoint
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
