"""Calls on idle connections of the bulk port: what they raise, and when they are left to gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvservice_api.bulk import CALL_BYTES_MAX, MessageKind
from kvservice_api.errors import TierFull
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import NotCarried
from kvservice_client.transports.bulk import BulkTransport
from tests.bulk_daemon import BulkDaemon, error_bytes
from tests.bulk_orders import ODD, content, order_of, units_of, whole
from tests.daemon import SOON_S

OPEN = pb.OpenTransferRequest(load=pb.LoadBlocksRequest(lease_id=7), connections=1)


@pytest.fixture
def daemon() -> Iterator[BulkDaemon]:
    order = order_of(ODD, [96])
    with BulkDaemon(units_of(order, content(order))) as daemon:
        yield daemon


@pytest.fixture
def transport(daemon: BulkDaemon) -> Iterator[BulkTransport]:
    """With an idle connection, from a load."""
    transport, order = BulkTransport(daemon.connection()), order_of(ODD, [96])
    assert all(map(np.array_equal, transport.load(order, whole()), content(order)))
    daemon.opened.clear()
    yield transport
    transport.close()


def called(transport: BulkTransport, request: pb.OpenTransferRequest = OPEN, seconds: float = SOON_S) -> object:
    return transport.calls.call("OpenTransfer", request, pb.OpenTransferResponse, Deadline(seconds))


def test_a_call_is_answered_on_the_connection_that_is_idle(daemon: BulkDaemon, transport: BulkTransport) -> None:
    for _ in range(3):
        answer = called(transport)
        assert isinstance(answer, pb.OpenTransferResponse) and len(answer.tickets) == 1
    assert daemon.opened == [OPEN] * 3
    assert daemon.accepted == 1


def test_an_error_of_the_daemon_is_raised_and_the_connection_is_kept(
    daemon: BulkDaemon, transport: BulkTransport
) -> None:
    daemon.answer = lambda opened: (MessageKind.ERROR, error_bytes(TierFull("no space")))
    for _ in range(2):
        with pytest.raises(TierFull, match="no space"):
            called(transport)
    assert daemon.accepted == 1 and transport._pool.has_idle


def test_without_an_idle_connection_a_call_is_left_to_grpc(daemon: BulkDaemon) -> None:
    transport = BulkTransport(daemon.connection())
    assert called(transport) is None
    assert not daemon.accepted


def test_a_connection_that_has_joined_no_transfer_carries_no_call(daemon: BulkDaemon, transport: BulkTransport) -> None:
    (idle,) = transport._pool._idle
    idle.has_joined = False
    assert called(transport) is None
    assert transport._pool._idle == [idle] and not daemon.opened


def test_a_large_request_is_left_to_grpc(daemon: BulkDaemon, transport: BulkTransport) -> None:
    request = pb.OpenTransferRequest(save=pb.SaveHeader(keys=bytes(CALL_BYTES_MAX)))
    assert called(transport, request) is None
    assert transport._pool.has_idle and not daemon.opened


def test_a_call_on_a_connection_that_has_ended_is_left_to_grpc(daemon: BulkDaemon, transport: BulkTransport) -> None:
    daemon.drop_connections()
    assert called(transport) is None
    assert not transport._pool.has_idle


def test_an_answer_of_another_kind_ends_the_connection(daemon: BulkDaemon, transport: BulkTransport) -> None:
    daemon.answer = lambda opened: (MessageKind.END, b"")
    assert called(transport) is None
    assert not transport._pool.has_idle


def test_a_call_without_an_answer_leaves_half_of_its_time_to_grpc_and_no_connection_idle(
    daemon: BulkDaemon, transport: BulkTransport
) -> None:
    """The path to the port may be cut off: the next call would wait on another connection."""
    transport._pool.keep(transport._pool.connected(transport._pool._idle[0].endpoint))
    transport._pool._idle.reverse()
    released = threading.Event()

    def late(opened: bytes) -> tuple[MessageKind, bytes]:
        released.wait(SOON_S)
        return MessageKind.ANSWER, opened

    daemon.answer = late
    deadline = Deadline(1.0)
    assert transport.calls.call("OpenTransfer", OPEN, pb.OpenTransferResponse, deadline) is None
    assert deadline.remaining_s > 0.0, "for gRPC"
    assert not transport._pool.has_idle
    released.set()


def test_a_transfer_whose_call_breaks_is_carried_by_the_next_transport(
    daemon: BulkDaemon, transport: BulkTransport
) -> None:
    def broken(opened: bytes) -> tuple[MessageKind, bytes]:
        daemon.drop_connections()
        return MessageKind.ANSWER, opened

    daemon.answer = broken
    with pytest.raises(NotCarried, match="broke"):
        next(transport.load(order_of(ODD, [96]), whole()))


def test_a_transfer_stays_on_the_connection_that_opened_it_although_the_tls_files_change(
    daemon: BulkDaemon, transport: BulkTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(opened: bytes) -> tuple[MessageKind, bytes]:
        monkeypatch.setattr(transport._connection.channel, "host", "localhost")  # Another endpoint, as for other files.
        return MessageKind.ANSWER, opened

    daemon.answer = changed
    order = order_of(ODD, [96])
    assert all(map(np.array_equal, transport.load(order, whole()), content(order)))
    assert daemon.accepted == 1, "the daemon has bound the ticket to the certificate of this connection"
