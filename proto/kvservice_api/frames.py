"""The codec of the messages that carry tensor bytes.

A frame is a protobuf message (``LoadBlocksResponse``, or ``SaveBlocksRequest`` with neither header
nor commit) whose payload is its last field. The encoder joins a small head and the payload's pieces
in one copy. The decoder parses the head and uses the payload without a copy::

    | 08 layer | 10 first_block | 18 first_offset_bytes | 7a len | payload ... |

As in protobuf, fields with the value 0 are left out. Any protobuf library can decode a frame, and this
decoder accepts any legal protobuf encoding of one (an unusual order of fields costs a copy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from kvservice_api.errors import InvalidFrame
from kvservice_api.v1 import blocks_pb2 as pb

HEAD_BYTES_MAX = 32  # Three varints with tags, the payload's tag and its length.

_LAYER, _FIRST_BLOCK, _FIRST_OFFSET, _PAYLOAD = 0x08, 0x10, 0x18, 0x7A
_HEADER, _COMMIT = 0x22, 0x2A


class Frame(NamedTuple):
    """Consecutive bytes of one layer, from one block into the next, in the order of the request."""

    layer: int
    first_block: int
    first_offset_bytes: int
    payload: memoryview


def encode_frame(layer: int, first_block: int, first_offset_bytes: int, pieces: Sequence[memoryview | bytes]) -> bytes:
    """One encoded message. Its payload is the concatenation of `pieces`, which is the only copy.

    From 1 MiB on the copy does not hold the GIL, if all pieces are contiguous buffers.
    """
    size = sum(len(piece) for piece in pieces)
    head = bytearray()
    for tag, value in ((_LAYER, layer), (_FIRST_BLOCK, first_block), (_FIRST_OFFSET, first_offset_bytes)):
        if value:
            head.append(tag)
            _put_varint(head, value)
    if size:
        head.append(_PAYLOAD)
        _put_varint(head, size)
    return b"".join((head, *pieces))


def decode_frame(data: bytes) -> Frame:
    """The frame in a message. Its payload is a view of `data`, not a copy. Raises InvalidFrame.

    `data` must be a frame. For a save stream, which also has a header and a commit, use `decode_save`.
    """
    frame = _borrowed(data)
    if frame is not None:
        return frame
    message = _parsed(data)
    return Frame(message.layer, message.first_block, message.first_offset_bytes, memoryview(message.payload))


def decode_save(data: bytes) -> Frame | pb.SaveHeader | pb.SaveCommit:
    """The frame, header or commit in one message of a save stream. Raises InvalidFrame for several in one message."""
    frame = _borrowed(data)
    if frame is not None:
        return frame
    message = _parsed(data)
    is_frame = bool(message.payload or message.layer or message.first_block or message.first_offset_bytes)
    kinds = message.HasField("header") + message.HasField("commit") + is_frame
    if kinds > 1:
        raise InvalidFrame("a message must have exactly one of a header, a frame and a commit")
    if message.HasField("header"):
        return message.header
    if message.HasField("commit"):
        return message.commit
    return Frame(message.layer, message.first_block, message.first_offset_bytes, memoryview(message.payload))


def _borrowed(data: bytes) -> Frame | None:
    """The frame, if its fields are in order and the payload ends the message; else None."""
    values = [0, 0, 0]
    position, end = 0, len(data)
    try:
        for slot, tag in enumerate((_LAYER, _FIRST_BLOCK, _FIRST_OFFSET)):
            if data[position] == tag:
                values[slot], position = _get_varint(data, position + 1)
        if data[position] != _PAYLOAD:
            return None
        size, position = _get_varint(data, position + 1)
    except IndexError:
        return None
    if position + size != end or max(values[:2]) >= 2**32 or values[2] >= 2**64:
        return None
    return Frame(values[0], values[1], values[2], memoryview(data)[position:])


def _parsed(data: bytes) -> pb.SaveBlocksRequest:
    try:
        return pb.SaveBlocksRequest.FromString(data)
    except DecodeError as error:
        raise InvalidFrame("the message is cut off or not a frame") from error


def _put_varint(out: bytearray, value: int) -> None:
    assert value >= 0
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _get_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError  # Longer than any varint: the protobuf parser will refuse it.
