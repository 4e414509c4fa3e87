"""What is said on a connection of the bulk port: its preface, and then one transfer after the other."""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable

from kvservice.bulk.connection import FINAL_S, READABLE, BulkConnection, Steps
from kvservice.bulk.tickets import TicketRefused, TransferTickets
from kvservice.bulk.transfers import Transfer
from kvservice.clock import Clock
from kvservice_api.bulk import HELLO_BYTES, PREFACE, MessageHeader, MessageKind, pack_header, unpack_hello
from kvservice_api.errors import InvalidFrame, KVError, TransferEnded
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_api.status import to_status

_POOLED_S = 60.0  # From one transfer to the next.
_CALL_S = 60.0  # For one call: with its request and its answer.


class Dialogue:
    """Of all connections of a port. `count` is called with the reason of each refused ticket."""

    def __init__(
        self,
        tickets: TransferTickets[Transfer],
        clock: Clock,
        context: Callable[[], ssl.SSLContext] | None,
        count: Callable[[str], None],
        talk_of_call: Callable[[BulkConnection, MessageHeader], Steps],
    ) -> None:
        self._open_tickets, self._clock, self._context, self._count = tickets, clock, context, count
        self._talk_of_call = talk_of_call

    def talk(self, connection: BulkConnection) -> Steps:
        yield READABLE
        if self._context is not None:
            yield from connection.handshake(self._context())
        preface = bytearray(len(PREFACE))
        yield from connection.read(SocketBuffers([memoryview(preface)]))
        if preface != PREFACE:
            raise InvalidFrame("the connection does not begin with the preface of the bulk port")
        hello = bytearray(HELLO_BYTES)
        while True:
            header = yield from connection.read_header()
            if header.kind is MessageKind.CALL:
                connection.deadline_s = self._clock.monotonic_s() + _CALL_S
                yield from self._talk_of_call(connection, header)
                yield from connection.rest(self._clock.monotonic_s() + _POOLED_S)
                continue
            if header.kind is not MessageKind.HELLO or header.size_bytes != HELLO_BYTES:
                raise InvalidFrame(f"a message {header.kind.name} of {header.size_bytes} bytes comes before HELLO")
            yield from connection.read(SocketBuffers([memoryview(hello)]))
            connection.limit_bytes_ahead()
            try:
                transfer, number = self._open_tickets.use(
                    *unpack_hello(hello), connection.certificate, self._clock.monotonic_s()
                )
            except TicketRefused as refusal:
                self._count(refusal.reason)
                connection.is_counted = True
                yield from connection.leave_loop()
                yield from self._refuse(
                    connection, TransferEnded("no transfer waits for this ticket", refused="ticket")
                )
                return
            transfer.join(connection, number)
            connection.has_joined, connection.is_pooled = True, False
            connection.moves, connection.caller = transfer.moves, transfer.caller
            try:
                # A client that leaves answers unread keeps a worker from continuing it: until then it has an end.
                connection.deadline_s = self._clock.monotonic_s() + _POOLED_S
                yield from connection.leave_loop()
                connection.deadline_s = math.inf
                yield from transfer.talk(connection)
            finally:
                connection.moves = None
                transfer.left(connection)
            connection.is_interrupted = False
            if transfer.closes_connections:
                yield from self._linger(connection)
                return
            yield from connection.rest(self._clock.monotonic_s() + _POOLED_S)

    def _refuse(self, connection: BulkConnection, error: KVError) -> Steps:
        data = to_status(error).SerializeToString()
        yield from connection.write(SocketBuffers([memoryview(pack_header(MessageKind.ERROR, len(data)) + data)]))
        yield from self._linger(connection)

    def _linger(self, connection: BulkConnection) -> Steps:
        connection.deadline_s = self._clock.monotonic_s() + FINAL_S
        yield from connection.linger()
