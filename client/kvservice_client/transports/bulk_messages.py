"""Messages on one connection of the bulk port, as the client sends and receives them: `kvservice_api/bulk.py`.

Without a deadline only `BulkConnection.shut_down` ends a wait. All raise OSError if the connection breaks.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from kvservice_api.bulk import (
    CALL_BYTES_MAX,
    CALLS,
    HEADER_BYTES,
    MessageHeader,
    MessageKind,
    pack_header,
    pack_hello,
    unpack_header,
)
from kvservice_api.errors import InvalidFrame
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_api.status import from_status
from kvservice_client.retry import Deadline
from kvservice_client.transports.bulk_connections import BulkConnection

M = TypeVar("M", bound=Message)


def send_hello(connection: BulkConnection, ticket: bytes, client_id: bytes, deadline: Deadline | None = None) -> None:
    """Have it join a transfer."""
    connection.send(SocketBuffers([memoryview(pack_hello(ticket, client_id))]), deadline)
    connection.has_joined = True


def receive_header(connection: BulkConnection, deadline: Deadline | None) -> MessageHeader:
    """Raises the daemon's error if it is one, InvalidFrame."""
    header = _next_header(connection, deadline)
    if header.kind is MessageKind.ERROR:
        raise from_status(parsed(status_pb2.Status, receive_bytes(connection, header.size_bytes, deadline)))
    return header


def _next_header(connection: BulkConnection, deadline: Deadline | None) -> MessageHeader:
    data = memoryview(bytearray(HEADER_BYTES))
    connection.receive(SocketBuffers([data]), deadline)
    return unpack_header(data)


def receive_bytes(connection: BulkConnection, size: int, deadline: Deadline | None) -> bytes:
    """Of a message whose size the codec bounds."""
    data = bytearray(size)
    connection.receive(SocketBuffers([memoryview(data)]), deadline)
    return bytes(data)


def parsed(kind: type[M], data: bytes) -> M:
    """Raises InvalidFrame."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidFrame(f"a message of the bulk port is not a {kind.__name__}: {error}") from error


def carries_call(connection: BulkConnection, request: Message) -> bool:
    """Whether the daemon knows the caller of this connection, and the request is not too large for it."""
    return connection.has_joined and request.ByteSize() <= CALL_BYTES_MAX


def call(connection: BulkConnection, method: str, request: Message, deadline: Deadline) -> tuple[MessageHeader, bytes]:
    """Make one of `CALLS`, on a connection that `carries_call`: the message that answers it. After an error the
    connection cannot be used again. Raises InvalidFrame, DeadlineExceeded.
    """
    data = request.SerializeToString()
    head = pack_header(MessageKind.CALL, len(data), layer=CALLS.index(method))
    connection.send(SocketBuffers([memoryview(head + data)]), deadline)
    header = _next_header(connection, deadline)
    if header.kind not in (MessageKind.ANSWER, MessageKind.ERROR):
        raise InvalidFrame(f"a call is not answered by the message {header.kind.name}")
    return header, receive_bytes(connection, header.size_bytes, deadline)


def answer_of(kind: type[M], header: MessageHeader, data: bytes) -> M:
    """What `call` has returned, as an answer. Raises the daemon's error if it is one, InvalidFrame."""
    if header.kind is MessageKind.ERROR:
        raise from_status(parsed(status_pb2.Status, data))
    return parsed(kind, data)
