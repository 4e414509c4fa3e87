"""Hostile use of the bulk port: refused in bounded time, counted by its reason, and without harm to anything else.

Each test uses a plain port and one with TLS. gRPC is reached by the UNIX socket, which is never encrypted.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psutil
import pytest
from google.protobuf.message import Message

from kvservice_api.bulk import CALLS, PREFACE, TICKET_BYTES, MessageKind, pack_header, pack_hello
from kvservice_api.errors import IncompleteSave, InvalidFrame, InvalidRequest, KVError, TransferEnded, UnknownClient
from kvservice_api.keys import BlockChain
from kvservice_api.v1 import blocks_pb2
from tests.certificates import Authority
from tests.daemon import DaemonProcess, until
from tests.integration.bulk_wire import (
    BulkSocket,
    Received,
    checksums_of,
    open_load,
    open_save,
    read_load,
)
from tests.integration.known_blocks import SMALL, layers_of, new_chain, slice_bytes
from tests.integration.wire import Wire, unharmed

_CONNECTIONS_MAX = 24


@pytest.fixture(scope="module", params=["plain", "TLS"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder, authority = tmp_path_factory.mktemp("d"), Authority()
    settings: dict[str, Any] = {
        "server__metrics_address": "127.0.0.1:0",
        "server__bulk_connections_max": _CONNECTIONS_MAX,
        "server__transfer_idle_s": 2,
    }
    context = None
    if request.param == "TLS":
        settings["tls__certificate"], settings["tls__key"] = authority.issue().write(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=authority.certificate.decode())
    with pytest.MonkeyPatch.context() as patch, DaemonProcess(folder, **settings) as process:
        patch.setattr(Wire, "bulk_tls", context)
        yield process


@pytest.fixture
def wire(daemon: DaemonProcess) -> Iterator[Wire]:
    with Wire(address_of(daemon)) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        yield wire


def address_of(daemon: DaemonProcess) -> str:
    return f"unix:{daemon.socket_path}"


@pytest.fixture(autouse=True)
def chain(daemon: DaemonProcess) -> Iterator[BlockChain]:
    """Stored blocks. After each test no socket, block, lease or space is left over, and they can be loaded."""
    process = psutil.Process(daemon.process.pid)
    with unharmed(address_of(daemon)) as chain, Wire(address_of(daemon)) as watcher:
        watcher.attach()
        port = watcher.capabilities().bulk_port
        yield chain
        until(lambda: [each.status for each in process.net_connections("tcp") if each.laddr.port == port] == ["LISTEN"])
        load(watcher, chain)


def load(wire: Wire, chain: BlockChain) -> None:
    received = Received(SMALL, chain)
    (ticket,) = open_load(wire, SMALL, chain)
    with BulkSocket(wire) as connection:
        read_load(connection.hello(ticket), received)
    assert received.is_right()
    release_all(wire)


def release_all(wire: Wire) -> None:
    for lease_id in wire.leases:
        wire.release(lease_id)
    wire.leases.clear()


def transfers_running(daemon: DaemonProcess) -> float:
    return sum(value for name, value in samples(daemon) if name.startswith("kvservice_transfers_running"))


def samples(daemon: DaemonProcess) -> list[tuple[str, float]]:
    port = daemon.wait_for_log("serving")["metrics_port"]
    scheme, context = ("http", None) if Wire.bulk_tls is None else ("https", Wire.bulk_tls)
    with urllib.request.urlopen(f"{scheme}://127.0.0.1:{port}/metrics", context=context) as answer:
        lines = answer.read().decode().splitlines()
    return [(name, float(value)) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")]


def connections(daemon: DaemonProcess) -> float:
    return dict(samples(daemon))["kvservice_bulk_connections"]


def refusals(daemon: DaemonProcess, reason: str) -> float:
    return dict(samples(daemon))[f'kvservice_bulk_refusals_total{{reason="{reason}"}}']


def test_a_ticket_that_no_transfer_waits_for_is_refused(daemon: DaemonProcess, wire: Wire, chain: BlockChain) -> None:
    (used,) = open_load(wire, SMALL, chain)
    with BulkSocket(wire) as connection:
        read_load(connection.hello(used), Received(SMALL, chain))
    (of_another,) = open_load(wire, SMALL, chain)
    for reason, ticket, client_id in (
        ("unknown", bytes(32), wire.client_id),
        ("used", used, wire.client_id),
        ("foreign", of_another, bytes(16)),
    ):
        before = refusals(daemon, reason)
        with BulkSocket(wire) as connection:
            assert isinstance(connection.hello(ticket, client_id).error(), TransferEnded)
            assert connection.is_closed()
        assert refusals(daemon, reason) == before + 1
    with BulkSocket(wire) as connection:  # The stranger has not used it up.
        read_load(connection.hello(of_another), Received(SMALL, chain))
    release_all(wire)


_GARBAGE: list[tuple[str, bytes]] = [
    ("another preface", b"GET / HTTP/1.1\r\n\r\n"),
    ("an unknown kind", PREFACE + bytes([77]) + bytes(23)),
    ("a HELLO of another size", PREFACE + pack_header(MessageKind.HELLO, 49) + bytes(49)),
    ("a shorter HELLO", PREFACE + pack_header(MessageKind.HELLO, 47) + bytes(47)),
    ("a HELLO of almost all memory", PREFACE + pack_header(MessageKind.HELLO, 2**63)),
    ("DATA before HELLO", PREFACE + pack_header(MessageKind.DATA, 4) + bytes(4)),
    ("END before HELLO", PREFACE + pack_header(MessageKind.END, 0)),
    ("a CALL before HELLO", PREFACE + pack_header(MessageKind.CALL, 4) + bytes(4)),
    ("a CALL of too many bytes", PREFACE + pack_header(MessageKind.CALL, (64 << 10) + 1)),
    ("an ERROR of too many bytes", PREFACE + pack_header(MessageKind.ERROR, 1 << 20)),
]


@pytest.mark.parametrize("data", [data for _, data in _GARBAGE], ids=[name for name, _ in _GARBAGE])
def test_garbage_is_counted_and_its_connection_closed(daemon: DaemonProcess, wire: Wire, data: bytes) -> None:
    before = refusals(daemon, "garbage")
    with BulkSocket(wire, data) as connection:
        assert connection.is_closed()
    assert refusals(daemon, "garbage") == before + 1


def test_a_client_may_leave_at_each_byte_of_its_first_messages(wire: Wire) -> None:
    whole = PREFACE + pack_hello(bytes(32), wire.client_id)
    for end in range(0, len(whole), 5):
        with BulkSocket(wire, whole[:end]):
            pass


@pytest.mark.parametrize("method", [len(CALLS), 2**16 - 1])
def test_a_call_of_no_method_closes_its_connection(
    daemon: DaemonProcess, wire: Wire, chain: BlockChain, method: int
) -> None:
    before = refusals(daemon, "garbage")
    with joined(wire, chain) as connection:
        connection.socket.sendall(pack_header(MessageKind.CALL, 4, layer=method) + bytes(4))
        assert connection.is_closed()
    assert refusals(daemon, "garbage") == before + 1


def test_a_call_that_is_refused_or_malformed_leaves_its_connection_as_it_is(wire: Wire, chain: BlockChain) -> None:
    with joined(wire, chain) as connection:
        assert isinstance(connection.call("LookupPrefix", b"\xff\xff"), InvalidRequest)
        unknown = blocks_pb2.LookupPrefixRequest(client_id=bytes(16), layout_fingerprint=SMALL.fingerprint)
        assert isinstance(connection.call("LookupPrefix", unknown.SerializeToString()), UnknownClient)
        foreign = blocks_pb2.ReleaseLeaseRequest(client_id=wire.client_id, lease_id=2**63)
        assert connection.call("ReleaseLease", foreign.SerializeToString()) == b""
        (ticket,) = open_load(wire, SMALL, chain)
        read_load(connection.hello(ticket), Received(SMALL, chain))
    release_all(wire)


def test_a_client_may_leave_at_each_byte_of_a_call(wire: Wire, chain: BlockChain) -> None:
    request = blocks_pb2.LookupPrefixRequest(client_id=wire.client_id, layout_fingerprint=SMALL.fingerprint)
    whole = pack_header(MessageKind.CALL, request.ByteSize()) + request.SerializeToString()
    for end in range(0, len(whole) + 1, 9):
        with joined(wire, chain) as connection:
            connection.socket.sendall(whole[:end])


def test_random_and_changed_calls_do_no_harm(daemon: DaemonProcess, wire: Wire, chain: BlockChain) -> None:
    choose = random.Random(33)
    requests: list[Message] = [
        blocks_pb2.LookupPrefixRequest(
            client_id=wire.client_id, layout_fingerprint=SMALL.fingerprint, keys=chain.packed_keys, locate=True
        ),
        blocks_pb2.OpenTransferRequest(calls=blocks_pb2.CallsHeader(client_id=wire.client_id), connections=1),
        blocks_pb2.ReleaseLeaseRequest(client_id=wire.client_id, lease_id=1),
        blocks_pb2.ExportLeaseRequest(client_id=wire.client_id, lease_id=1, ttl_ms=1000, adoptions=1),
    ]
    assert len(requests) == len(CALLS)
    with joined(wire, chain) as connection:
        for _ in range(400):
            method = choose.randrange(len(CALLS))
            request = bytearray(choose.choice([requests[method], choose.choice(requests)]).SerializeToString())
            for _ in range(choose.randrange(4)):
                request[choose.randrange(len(request))] = choose.randrange(256)
            if choose.random() < 0.2:
                request = bytearray(choose.randbytes(choose.randrange(300)))
            answer = connection.call(CALLS[method], bytes(request))
            assert isinstance(answer, bytes | KVError)
    release_all(wire)
    wire.attach()  # The tickets of exports end with the client.
    assert not daemon.logged("a handler failed")


def test_bytes_beside_tls_end_their_connection_alone(daemon: DaemonProcess, wire: Wire, chain: BlockChain) -> None:
    """Within a handshake, instead of the next record, and in the middle of a call."""
    if wire.bulk_tls is None:
        pytest.skip("a port with TLS only")
    request = pack_header(MessageKind.CALL, 100)
    for before in (b"", request, request + bytes(50)):
        with joined(wire, chain) as connection:
            connection.socket.sendall(before)
            with socket.socket(fileno=os.dup(connection.socket.fileno())) as beneath:
                beneath.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))  # A record that the key did not make.
            assert connection.is_closed()
    refused = refusals(daemon, "handshake")
    port = wire.capabilities().bulk_port
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), PREFACE, b"\x16\x03\x01\x00\x04\x01\x00\x00\x00"):
        with socket.create_connection(("127.0.0.1", port), 30.0) as plain, suppress(ConnectionError):
            plain.sendall(garbage)
            while plain.recv(4096):
                pass
    assert refusals(daemon, "handshake") == refused + 4


def joined(wire: Wire, chain: BlockChain) -> BulkSocket:
    """A connection that has carried a load."""
    (ticket,) = open_load(wire, SMALL, chain)
    connection = BulkSocket(wire).hello(ticket)
    read_load(connection, Received(SMALL, chain))
    release_all(wire)
    return connection


Sent = Callable[[BulkSocket, BlockChain], None]


def _put(layer: int, first_block: int, size_bytes: int, offset_bytes: int = 0) -> Sent:
    return lambda connection, _: connection.put(layer, first_block, bytes(size_bytes), offset_bytes)


def _twice(connection: BulkSocket, _: BlockChain) -> None:
    connection.put(0, 0, bytes(100))
    connection.put(0, 0, bytes(100), 50)


def _commit_of(size_bytes: int) -> Sent:
    return lambda connection, _: connection.commit(bytes(size_bytes))


_SLICE = slice_bytes(SMALL)
_WRONG: dict[str, Sent] = {
    "a layer beyond the last": _put(SMALL.layers, 0, 10),
    "a block beyond the last": _put(0, 3, 10),
    "the largest block": _put(0, 2**32 - 1, 10),
    "an offset after the slice": _put(0, 0, 10, _SLICE),
    "an offset near the largest": _put(0, 0, 10, 2**64 - 1),
    "no bytes": _put(0, 0, 0),
    "bytes beyond the last block": _put(0, 2, _SLICE + 1),
    "a size near the largest": lambda connection, _: connection.socket.sendall(
        pack_header(MessageKind.DATA, 2**64 - 1) + bytes(100)
    ),
    "bytes that were sent before": _twice,
    "too few checksums": _commit_of(8),
    "too many checksums": _commit_of(1 << 20),
    "checksums near the largest": lambda connection, _: connection.socket.sendall(
        pack_header(MessageKind.COMMIT, 2**64 - 8)
    ),
    "a HELLO": lambda connection, _: connection.socket.sendall(pack_hello(bytes(32), bytes(16))),
    "a CALL": lambda connection, _: connection.socket.sendall(pack_header(MessageKind.CALL, 4) + bytes(4)),
    "a RESULT": lambda connection, _: connection.socket.sendall(pack_header(MessageKind.RESULT, 0)),
}


@pytest.mark.parametrize("send", _WRONG.values(), ids=_WRONG)
def test_a_wrong_message_ends_its_save_alone(daemon: DaemonProcess, wire: Wire, send: Sent) -> None:
    new = new_chain(SMALL, 3)
    before = refusals(daemon, "frame")
    with BulkSocket(wire) as first, BulkSocket(wire) as second:
        opened = open_save(wire, SMALL, new, connections=2)
        first.hello(opened.tickets[0])
        second.hello(opened.tickets[1])
        second.put(1, 0, bytes(10))
        send(first, new)
        assert isinstance(first.error(), InvalidFrame)
        assert isinstance(second.error(), InvalidFrame)
        assert first.is_closed() and second.is_closed()
    assert refusals(daemon, "frame") == before + 1


def test_bytes_of_blocks_that_are_not_wanted_end_the_save(wire: Wire, chain: BlockChain) -> None:
    with BulkSocket(wire) as connection:
        opened = open_save(wire, SMALL, chain)
        assert not opened.blocks
        connection.hello(*opened.tickets).put(0, 0, bytes(10))
        assert isinstance(connection.error(), InvalidFrame)


def test_a_commit_on_another_connection_than_the_first_ends_the_save(wire: Wire) -> None:
    new = new_chain(SMALL, 1)
    opened = open_save(wire, SMALL, new, connections=2)
    with BulkSocket(wire) as second:
        second.hello(opened.tickets[1]).commit(checksums_of(SMALL, new, [0]))
        assert isinstance(second.error(), InvalidFrame)


@pytest.mark.parametrize("sent", ["nothing", "HELLO", "half a header", "half of the bytes", "all but the COMMIT"])
def test_a_client_that_goes_away_in_a_save_leaves_nothing(daemon: DaemonProcess, wire: Wire, sent: str) -> None:
    new = new_chain(SMALL, 3)
    opened = open_save(wire, SMALL, new)
    with BulkSocket(wire) as connection:
        connection.hello(*opened.tickets)
        if sent == "half a header":
            connection.socket.sendall(pack_header(MessageKind.DATA, 100)[:12])
        elif sent == "half of the bytes":
            connection.socket.sendall(pack_header(MessageKind.DATA, _SLICE) + bytes(_SLICE // 2))
        elif sent == "all but the COMMIT":
            for layer, slices in enumerate(layers_of(SMALL, new)):
                connection.put(layer, 0, b"".join(each.tobytes() for each in slices))
    until(lambda: wire.state()["uploads"] == 0)
    until(lambda: transfers_running(daemon) == 0)


def test_a_client_that_sends_nothing_more_is_ended_in_time(wire: Wire) -> None:
    opened = open_save(wire, SMALL, new_chain(SMALL, 1))
    with BulkSocket(wire) as connection:
        connection.hello(*opened.tickets).put(0, 0, bytes(10))
        assert isinstance(connection.error(), IncompleteSave)
        assert connection.is_closed()


def test_a_save_ends_with_the_attachment_of_its_client_while_bytes_arrive(daemon: DaemonProcess, wire: Wire) -> None:
    with Wire(address_of(daemon)) as leaving:
        leaving.attach()
        opened = open_save(leaving, SMALL, new_chain(SMALL, 200))
        connection = BulkSocket(wire)
        connection.hello(opened.tickets[0], leaving.client_id)
        connection.socket.sendall(pack_header(MessageKind.DATA, 200 * _SLICE) + bytes(_SLICE))
    with connection:
        assert isinstance(connection.error(), TransferEnded)
        assert connection.is_closed()
    until(lambda: wire.state()["uploads"] == 0)


def test_thousands_of_idle_connections_keep_no_client_out(daemon: DaemonProcess, wire: Wire, chain: BlockChain) -> None:
    before = refusals(daemon, "full")
    port = wire.capabilities().bulk_port
    with ExitStack() as idle:
        for _ in range(2000):
            idle.enter_context(socket.create_connection(("127.0.0.1", port)))
        until(lambda: refusals(daemon, "full") >= before + 1000)  # Others take the places of those that leave.
        assert connections(daemon) <= _CONNECTIONS_MAX

        def is_let_in() -> bool:  # Once the idle ones are a second old.
            with suppress(ConnectionError, ssl.SSLError), BulkSocket(wire) as connection:
                return isinstance(connection.hello(bytes(TICKET_BYTES)).error(), TransferEnded)
            return False

        until(is_let_in)
        load(wire, chain)


def test_random_bytes_and_changed_messages_do_no_harm(wire: Wire, chain: BlockChain) -> None:
    choose = random.Random(16)
    for number in range(150):
        if number % 50 == 49:  # A client may open few transfers that it never joins.
            release_all(wire)
            wire.attach()
        is_save = bool(number % 3)
        new = new_chain(SMALL, 2)
        ticket = open_save(wire, SMALL, new).tickets[0] if is_save else open_load(wire, SMALL, chain)[0]
        data = bytearray(PREFACE + pack_hello(ticket, wire.client_id))
        for layer, slices in enumerate(layers_of(SMALL, new)):
            payload = b"".join(each.tobytes() for each in slices)
            data += pack_header(MessageKind.DATA, len(payload), layer=layer) + payload
        data += pack_header(MessageKind.COMMIT, 8) + bytes(8)  # Of too few checksums: nothing is stored.
        heads = [0, 8, 24, 32, 60, *(80 + layer * (24 + 2 * _SLICE) + choose.randrange(24) for layer in range(5))]
        for _ in range(choose.randrange(1, 4)):
            data[choose.choice([*heads, choose.randrange(len(data))])] = choose.randrange(256)
        if number % 5 == 0:
            data = bytearray(choose.randbytes(choose.randrange(400)))
        with BulkSocket(wire, b"") as connection, suppress(OSError):
            connection.socket.sendall(data[: choose.randrange(len(data) + 1)])
            if choose.random() < 0.5:
                connection.socket.shutdown(socket.SHUT_WR)
                connection.is_closed()
    release_all(wire)
    until(lambda: wire.state()["uploads"] == 0)
