"""What a connection to the bulk port knows of its link."""

from __future__ import annotations

import socket
import struct
from typing import Any

from kvservice_client.retry import Deadline
from kvservice_client.transports.bulk_connections import BulkConnection, Endpoint

ENDPOINT = Endpoint("127.0.0.1", 1, 1, None)


class SocketOfBusyHosts:
    """Its bytes wait 5 ms at either end of a link of 50 us."""

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        info = bytearray(232)
        struct.pack_into("=I", info, 68, 5000)  # tcpi_rtt.
        struct.pack_into("=I", info, 148, 50)  # tcpi_min_rtt.
        return bytes(info[:size])


def test_a_link_is_as_long_as_its_shortest_round_trip_however_busy_its_hosts_are() -> None:
    connection = BulkConnection(socket.AF_INET, ENDPOINT)
    connection.close()
    busy: Any = SocketOfBusyHosts()
    connection._socket = busy
    assert connection.rtt_s == 50e-6


def test_a_connection_knows_its_round_trip_once_it_is_connected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = BulkConnection(socket.AF_INET, ENDPOINT)
        connection.connect(listener.getsockname(), None, Deadline(10.0))
        assert 0 < connection.rtt_s < 10.0
        connection.close()
