"""A bulk transport with a daemon of the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvservice_client.transports import bulk_transfer
from kvservice_client.transports.bulk import BulkTransport
from tests.bulk_daemon import BulkDaemon
from tests.bulk_orders import LARGE, Large, content, order_of, units_of


@pytest.fixture(params=[1, 3], ids=["one connection", "three connections"])
def connections(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: request.param)
    count: int = request.param
    return count


@pytest.fixture
def large(connections: int) -> Iterator[Large]:
    """A load of 36 MiB: far more than the sockets hold."""
    order = order_of(LARGE, [512] * 4)
    layers = content(order)
    with BulkDaemon(units_of(order, layers)) as daemon:
        transport = BulkTransport(daemon.connection())
        yield daemon, transport, order, layers
        transport.close()
