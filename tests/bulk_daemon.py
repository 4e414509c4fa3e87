"""The daemon's end of the bulk port, in threads of the test: for what no real daemon does on demand.

    with BulkDaemon(layers) as daemon:
        transport = BulkTransport(daemon.connection(clock))

It serves one load of `layers` after another, and keeps what saves send. `before_unit` is called before each DATA of a
load with its number and its socket, and may break it.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Self, cast

from kvservice_api import bulk
from kvservice_api.bulk import MessageKind
from kvservice_api.errors import ChecksumMismatch, KVError, TransferEnded
from kvservice_api.image import checksum
from kvservice_api.status import to_status
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.background import Background
from kvservice_client.connection import Connection
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline, Watchdog

Unit = tuple[int, int, bytes]  # Layer, first block, bytes, which may run on into the next layers.


def no_fault(number: int, connection: socket.socket) -> None:
    """Serve the unit."""


class BulkDaemon:
    """A context manager. Leaving it closes all connections."""

    def __init__(self, units: Sequence[Unit] = (), *, context: ssl.SSLContext | None = None) -> None:
        """`units` are what a load sends, in order. For a save set `wanted` and `slices`."""
        self.units = list(units)
        self.checksums: dict[int, bytes] = {}  # By the unit's number: those of its slices, sent with it.
        self.wanted: list[int] = []
        self.slices: list[list[bytearray]] = []  # Of the last save: by layer, of each of its blocks.
        self.before_unit: Callable[[int, socket.socket], None] = no_fault
        self.opened: list[pb.OpenTransferRequest] = []
        self.answer: Callable[[bytes], tuple[MessageKind, bytes]] = lambda opened: (MessageKind.ANSWER, opened)
        self.accepted = 0
        self.boot_epoch = 1
        self.forgets_tickets = False
        self._context = context
        self._tickets: dict[bytes, tuple[_Served, int]] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop_listening()
        self.drop_connections()
        for each in self._threads:
            each.join(10)

    def stop_listening(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def drop_connections(self) -> None:
        for each in self._connections:
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def connection(self, clock: Clock = SYSTEM_CLOCK, tls: Any = None) -> Connection:
        """What the transport needs of the client's connection to this daemon."""
        return cast(Connection, _Client(self, clock, tls))

    def open(self, request: pb.OpenTransferRequest) -> pb.OpenTransferResponse:
        self.opened.append(request)
        served = _Served(self, request)
        tickets = [secrets.token_bytes(32) for _ in range(request.connections)]
        if not self.forgets_tickets:
            self._tickets |= {ticket: (served, number) for number, ticket in enumerate(tickets)}
        return pb.OpenTransferResponse(tickets=tickets, ttl_ms=10_000, blocks=self.wanted)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.accepted += 1
                self._connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, KVError, IndexError), connection:  # The client left, or a test wants it to fail.
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                self._connections.append(connection)
            with connection:
                assert receive(connection, len(bulk.PREFACE)) == bulk.PREFACE
                while True:
                    header = bulk.unpack_header(receive(connection, bulk.HEADER_BYTES))
                    if header.kind is MessageKind.CALL:
                        self._answer(connection, header)
                        continue
                    assert header.kind is MessageKind.HELLO
                    ticket, _ = bulk.unpack_hello(receive(connection, header.size_bytes))
                    found = self._tickets.pop(ticket, None)
                    if found is None:
                        send(connection, MessageKind.ERROR, REFUSED)
                        return
                    served, number = found
                    (served.load if served.is_load else served.save)(connection, number)

    def _answer(self, connection: socket.socket, header: bulk.MessageHeader) -> None:
        assert bulk.CALLS[header.layer] == "OpenTransfer"
        opened = self.open(pb.OpenTransferRequest.FromString(receive(connection, header.size_bytes)))
        kind, data = self.answer(opened.SerializeToString())
        send(connection, kind, data)


class _Served:
    """One transfer, on all of its connections."""

    def __init__(self, daemon: BulkDaemon, request: pb.OpenTransferRequest) -> None:
        self._daemon = daemon
        self.is_load = request.HasField("load")
        self._units: Iterator[tuple[int, Unit]] = iter(list(enumerate(daemon.units)))
        self._others: list[socket.socket] = []  # Of a save: all of its connections but the first.
        self._is_done = False
        self._changed = threading.Condition()
        self._missing = sum(len(slices[block]) for slices in daemon.slices for block in daemon.wanted)

    def load(self, connection: socket.socket, _: int) -> None:
        for number, (layer, first_block, data) in self._units:
            self._daemon.before_unit(number, connection)
            sums = self._daemon.checksums.get(number, b"")
            kind = MessageKind.SUMMED_DATA if sums else MessageKind.DATA
            offset_bytes = len(data) if sums else 0
            send(connection, kind, data + sums, layer=layer, first_block=first_block, offset_bytes=offset_bytes)
        send(connection, MessageKind.END, b"")

    def save(self, connection: socket.socket, number: int) -> None:
        if number:
            with self._changed:
                self._others.append(connection)
                if self._is_done:
                    send(connection, MessageKind.END, b"")
        while (header := bulk.unpack_header(receive(connection, bulk.HEADER_BYTES))).kind is MessageKind.DATA:
            self._keep(header, receive(connection, header.size_bytes))
        assert header.kind is MessageKind.COMMIT and not number
        self._commit(connection, receive(connection, header.size_bytes))

    def _keep(self, header: bulk.MessageHeader, data: bytes) -> None:
        wanted, layer, offset = self._daemon.wanted, header.layer, header.offset_bytes
        at = wanted.index(header.first_block)
        while data:
            target = self._daemon.slices[layer][wanted[at]]
            part, data = data[: len(target) - offset], data[len(target) - offset :]
            target[offset : offset + len(part)] = part
            at, offset = at + 1, 0
            if at == len(wanted):
                layer, at = layer + 1, 0
        with self._changed:
            self._missing -= header.size_bytes
            self._changed.notify_all()

    def _commit(self, connection: socket.socket, given: bytes) -> None:
        daemon = self._daemon
        with self._changed:
            assert self._changed.wait_for(lambda: not self._missing, 10)
            self._is_done = True
            for each in self._others:
                send(each, MessageKind.END, b"")
        sums = [checksum(bytes(slices[block])) for block in daemon.wanted for slices in daemon.slices]
        if given != b"".join(each.to_bytes(8, "little") for each in sums):
            send(connection, MessageKind.ERROR, error_bytes(ChecksumMismatch("it is not what was sent")))
            return
        answer = pb.SaveBlocksResponse(stored=len(daemon.wanted), stored_blocks=daemon.wanted)
        send(connection, MessageKind.RESULT, answer.SerializeToString())


class _Client:
    """The part of `Connection` and `Channel` that the transport uses."""

    def __init__(self, daemon: BulkDaemon, clock: Clock, tls: Any) -> None:
        self._daemon = daemon
        self.clock = clock
        self.watchdog = Watchdog(clock)
        self.channel = self.attach_stream = self
        self.latest = None  # It is not attached, so no connection is made for calls.
        self.background = Background()
        self.host = "127.0.0.1"
        self.tls = tls

    def limits(self, deadline: Deadline) -> pb.GetCapabilitiesResponse:
        daemon = self._daemon
        return pb.GetCapabilitiesResponse(
            transports=["bulk", "grpc"], bulk_port=daemon.port, boot_epoch=daemon.boot_epoch
        )

    def stream(self, method: str, request: pb.OpenTransferRequest, answer: type, deadline: Deadline) -> Iterator[Any]:
        yield self._daemon.open(request)


def send(connection: socket.socket, kind: MessageKind, data: bytes, **fields: int) -> None:
    connection.sendall(bulk.pack_header(kind, len(data), **fields) + data)


def error_bytes(error: KVError) -> bytes:
    data: bytes = to_status(error).SerializeToString()
    return data


REFUSED = error_bytes(TransferEnded("no transfer waits for it", refused="ticket"))


def receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("the client closed it")
        data += piece
    return bytes(data)
