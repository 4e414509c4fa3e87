"""Calls on the bulk port of clients that move no bytes there: a connection is made for them, and the event loop
answers on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvservice_api.bulk import HEADER_BYTES, MessageKind, pack_header
from kvservice_api.errors import InvalidRequest, TransferEnded, UnknownClient
from kvservice_api.v1 import blocks_pb2
from kvservice_client import BlockCache, Client
from kvservice_client.channel import Channel
from kvservice_client.transports.bulk_connections import RETRY_S, BulkConnections
from tests.clock import ClientClock
from tests.daemon import DaemonProcess, until
from tests.integration.bulk_wire import BulkSocket, checksums_of, open_save
from tests.integration.known_blocks import SMALL, layers_of, new_chain, save
from tests.integration.wire import Wire, refused

MANY = 30


@pytest.fixture
def over_grpc(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that clients have called over gRPC, in order."""
    made: list[str] = []
    call = Channel.call

    def recorded(self: Channel, method: str, *arguments: Any) -> Any:
        made.append(method.split("/")[-1])
        return call(self, method, *arguments)

    monkeypatch.setattr(Channel, "call", recorded)
    return made


@pytest.fixture(params=["auto", "shm"])
def client(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(transport=request.param) as made:
        yield made


def look_up(blocks: BlockCache, times: int) -> None:
    for _ in range(times):
        blocks.lookup(new_chain(SMALL, 1)).release()


def calls_the_port(blocks: BlockCache, over_grpc: list[str]) -> bool:
    """Whether a lookup makes no call of gRPC."""
    over_grpc.clear()
    look_up(blocks, 1)
    return not over_grpc


def test_a_client_of_shared_memory_soon_makes_its_calls_there(client: Client, over_grpc: list[str]) -> None:
    chain, blocks = new_chain(SMALL, 3), client.open_layout(SMALL)
    save(client, SMALL, chain)
    stored = [b"".join(each.tobytes() for each in layer) for layer in layers_of(SMALL, chain)]
    until(lambda: calls_the_port(blocks, over_grpc))
    for _ in range(MANY):
        with blocks.lookup(chain) as lease:
            assert [layer.data.tobytes() for layer in lease.load()] == stored
    with blocks.lookup(chain) as lease:
        ticket = lease.export(ttl_s=30, adoptions=1)
    assert not over_grpc
    blocks.adopt(ticket).release()
    assert over_grpc == ["AdoptLease"], "it must not be made twice"
    assert set(client.stats().loaded_bytes) == {"shm"}


def test_a_client_that_wants_grpc_makes_all_calls_there(daemon: DaemonProcess, over_grpc: list[str]) -> None:
    with daemon.client(transport="grpc") as client:
        look_up(client.open_layout(SMALL), MANY)
    assert over_grpc.count("LookupPrefix") == MANY and "OpenTransfer" not in over_grpc


def test_a_client_of_a_unix_socket_makes_all_calls_there(
    new_daemon: Callable[..., DaemonProcess], tmp_path_factory: pytest.TempPathFactory, over_grpc: list[str]
) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    new_daemon(server__unix_socket=path)
    with Client(str(path)) as client:
        look_up(client.open_layout(SMALL), MANY)
    assert over_grpc.count("LookupPrefix") == MANY and "OpenTransfer" not in over_grpc


def test_a_port_that_cannot_be_reached_is_tried_rarely_and_says_nothing(
    daemon: DaemonProcess,
    over_grpc: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The bytes go through shared memory, so no user misses anything."""
    tried: list[object] = []

    def refused_connection(self: BulkConnections, endpoint: object) -> None:
        tried.append(endpoint)
        raise ConnectionRefusedError

    monkeypatch.setattr(BulkConnections, "connected", refused_connection)
    clock = ClientClock()
    with caplog.at_level(logging.INFO), daemon.client(clock=clock) as client:
        blocks = client.open_layout(SMALL)

        def is_tried(times: int) -> bool:
            look_up(blocks, 1)
            return len(tried) == times

        until(lambda: is_tried(1))
        look_up(blocks, MANY)
        assert len(tried) == 1
        clock.advance(seconds=RETRY_S)
        until(lambda: is_tried(2))
    assert not caplog.records


def test_calls_survive_a_restart_of_the_daemon(new_daemon: Callable[..., DaemonProcess], over_grpc: list[str]) -> None:
    daemon = new_daemon()
    with daemon.client(reconnect_wait_s=30.0) as client:
        blocks = client.open_layout(SMALL)
        for _ in range(2):
            until(lambda: calls_the_port(blocks, over_grpc))
            daemon.kill()
            daemon.start()


def open_calls(wire: Wire, connections: int = 1) -> bytes:
    header = blocks_pb2.CallsHeader(client_id=wire.client_id)
    answer = wire.blocks.OpenTransfer(blocks_pb2.OpenTransferRequest(calls=header, connections=connections))
    (ticket,) = answer.tickets
    return bytes(ticket)


def test_a_transfer_without_blocks_ends_at_once_and_then_come_calls(wire: Wire) -> None:
    with BulkSocket(wire) as connection:
        header, _ = connection.hello(open_calls(wire)).message()
        assert header.kind.name == "END"
        request = blocks_pb2.LookupPrefixRequest(
            client_id=wire.client_id, layout_fingerprint=SMALL.fingerprint, keys=new_chain(SMALL, 1).packed_keys
        )
        for _ in range(MANY):
            answer = connection.call("LookupPrefix", request.SerializeToString())
            assert isinstance(answer, bytes)
            assert blocks_pb2.LookupPrefixResponse.FromString(answer).hit_blocks == 0


def test_a_call_is_answered_after_a_save_that_has_waited_for_many_bytes(wire: Wire) -> None:
    chain = new_chain(SMALL, 8)
    opened = open_save(wire, SMALL, chain)
    with BulkSocket(wire) as connection:
        connection.hello(opened.tickets[0])
        for layer, slices in enumerate(layers_of(SMALL, chain)):
            connection.put(layer, 0, b"".join(each.tobytes() for each in slices))
        checksums = checksums_of(SMALL, chain, opened.blocks)
        connection.socket.sendall(pack_header(MessageKind.COMMIT, len(checksums)))
        for _ in range(MANY):  # Meanwhile the daemon begins to wait for all of the checksums.
            wire.capabilities()
        connection.socket.sendall(checksums)
        assert connection.result().stored == len(chain)
        request = blocks_pb2.ReleaseLeaseRequest(client_id=wire.client_id, lease_id=1).SerializeToString()
        assert len(request) + HEADER_BYTES < len(checksums)
        assert isinstance(connection.call("ReleaseLease", request), bytes)


def test_a_ticket_for_calls_is_for_its_client(wire: Wire, daemon: DaemonProcess) -> None:
    with BulkSocket(wire) as connection:
        error = connection.hello(open_calls(wire), b"another's client").error()
        assert isinstance(error, TransferEnded)


def test_calls_are_refused_without_a_connection_or_an_attached_client(wire: Wire) -> None:
    with refused(InvalidRequest, "0 connections", field="connections"):
        open_calls(wire, connections=0)
    header = blocks_pb2.CallsHeader(client_id=bytes(16))
    with refused(UnknownClient, "attach"):
        wire.blocks.OpenTransfer(blocks_pb2.OpenTransferRequest(calls=header, connections=1))
