"""The messages of the bulk port: KV bytes on a plain or TLS socket, beside gRPC.

`BlockService.OpenTransfer` opens a transfer and returns one ticket per connection. A connection begins with `PREFACE`,
once. Then it carries messages: a header of 24 bytes, little-endian, and `size_bytes` bytes::

    kind u8 | 0 | layer u16 | first_block u32 | offset_bytes u64 | size_bytes u64 | payload ...

    a load: HELLO ->  <- DATA or SUMMED_DATA ... <- END    or <- ERROR, instead of any message
    a save: HELLO ->  DATA -> ... COMMIT ->  <- RESULT     or <- ERROR, at any time; on other connections than its first
                                                           there is no COMMIT, and END instead of RESULT
    a call: CALL ->  <- ANSWER                              or <- ERROR

Both sides set TCP_NODELAY. After END, RESULT, ANSWER, or the ERROR of a load or a call, the connection may carry
another HELLO or a CALL. After any other ERROR (of a save, or for a ticket) the daemon closes it. A client gives up a
transfer or a call by closing a connection: that ends all of it.

A CALL is of one of `CALLS`: methods of BlockService, as over gRPC. It counts as made by the caller that has opened the
transfer which the connection has joined last, so a connection begins with HELLO.

The bytes of a transfer are in this order: layer by layer, and within a layer block by block. Layers count from the
start of the shard, blocks from the request's first block; for a save, from the header's first key, and only blocks that
the daemon wants have bytes. DATA is bytes in that order, from `offset_bytes` of the slice of `layer` and `first_block`
on: it runs on into the next blocks, and from a layer's last block into the next layer's first. One that the daemon
sends has whole slices of one layer, or several whole layers. On one connection layers never decrease. With several
connections, each next DATA goes to whichever can take it. A load ends if its client reads less than `UNIT_BYTES` in the
daemon's `transfer_idle_s`. A save may have 16 gaps while it arrives, one more per slice, and one more per 4 KiB.

SUMMED_DATA is DATA whose slices the client verifies. Its bytes begin with a whole slice. After the slices, at
`offset_bytes` of the payload, come the checksums that they had when they were stored. The daemon has verified the
slices of a DATA before its first byte: parts of stored slices, and what it has just read from a slower tier.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from kvservice_api.errors import InvalidFrame

PREFACE: Final = b"KVBULK1\n"
TICKET_BYTES: Final = 32
CLIENT_ID_BYTES: Final = 16
HELLO_BYTES: Final = TICKET_BYTES + CLIENT_ID_BYTES
CONNECTIONS_MAX: Final = 16  # Of one transfer.
# About as much is sent in one DATA, more if a slice is larger. A message costs Python at both ends; but of many
# connections none should be left with a large last one.
UNIT_BYTES: Final = 4 << 20
UNIT_FEW_BYTES: Final = 8 << 20  # On one or two connections.
ERROR_BYTES_MAX: Final = 64 << 10
# A CALL has the method's position here in its `layer`. Each may run twice: its answer may be lost, and
# with it a lease or an export, which then ends by its time.
CALLS: Final = ("LookupPrefix", "OpenTransfer", "ReleaseLease", "ExportLease")
CALL_BYTES_MAX: Final = 64 << 10
ANSWER_BYTES_MAX: Final = 1 << 20
RESULT_BYTES_MAX: Final = 1 << 20

_HEADER = struct.Struct("<BxHIQQ")
HEADER_BYTES: Final = _HEADER.size


class MessageKind(IntEnum):
    """The kinds of messages, and what their payload is."""

    HELLO = 1  # Client: the ticket, and the client id.
    DATA = 2
    END = 3  # Daemon: all bytes of the load were sent, on any connection; or the save has a RESULT on its first.
    COMMIT = 4  # Client: u64 xxh3-64, [wanted block, layer] flattened. After all DATA were written to their sockets.
    RESULT = 5  # Daemon: a serialized SaveBlocksResponse.
    ERROR = 6  # Daemon: a serialized google.rpc.Status.
    SUMMED_DATA = 7  # Daemon: slices, and then the u64 xxh3-64 of each.
    CALL = 8  # Client: the request of a method, serialized.
    ANSWER = 9  # Daemon: the method's response, serialized.


_KINDS: Final = {kind.value: kind for kind in MessageKind}
_BYTES_MAX: Final = {
    MessageKind.HELLO: HELLO_BYTES,
    MessageKind.END: 0,
    MessageKind.RESULT: RESULT_BYTES_MAX,
    MessageKind.ERROR: ERROR_BYTES_MAX,
    MessageKind.CALL: CALL_BYTES_MAX,
    MessageKind.ANSWER: ANSWER_BYTES_MAX,
}


class MessageHeader(NamedTuple):
    kind: MessageKind
    layer: int
    first_block: int
    offset_bytes: int
    size_bytes: int


def unit_bytes(connections: int) -> int:
    """About how much is sent in one DATA of a transfer with so many connections."""
    return UNIT_FEW_BYTES if connections <= 2 else UNIT_BYTES


def pack_header(
    kind: MessageKind, size_bytes: int, *, layer: int = 0, first_block: int = 0, offset_bytes: int = 0
) -> bytes:
    return _HEADER.pack(kind, layer, first_block, offset_bytes, size_bytes)


def unpack_header(data: bytes | bytearray | memoryview) -> MessageHeader:
    """The header in the first 24 bytes. Raises InvalidFrame for an unknown kind, or a size that it cannot have.

    The sizes of DATA, SUMMED_DATA and COMMIT depend on the transfer: the receiver checks them.
    """
    number, layer, first_block, offset_bytes, size_bytes = _HEADER.unpack_from(data)
    kind = _KINDS.get(number)
    if kind is None:
        raise InvalidFrame(f"no message of the bulk port has the kind {number}")
    if size_bytes > _BYTES_MAX.get(kind, size_bytes) or (kind is MessageKind.COMMIT and size_bytes % 8):
        raise InvalidFrame(f"a message {kind.name} has no {size_bytes} bytes")
    return MessageHeader(kind, layer, first_block, offset_bytes, size_bytes)


def pack_hello(ticket: bytes, client_id: bytes) -> bytes:
    """The whole message, with its header."""
    return pack_header(MessageKind.HELLO, HELLO_BYTES) + ticket + client_id


def unpack_hello(payload: bytes | bytearray | memoryview) -> tuple[bytes, bytes]:
    """Ticket and client id. Raises InvalidFrame for another size."""
    if len(payload) != HELLO_BYTES:
        raise InvalidFrame(f"a message HELLO has {HELLO_BYTES} bytes, not {len(payload)}")
    return bytes(payload[:TICKET_BYTES]), bytes(payload[TICKET_BYTES:])
