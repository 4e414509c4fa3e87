"""A client of the bulk port without the library: blocking sockets, and messages that the library never sends."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from itertools import accumulate
from typing import Self

import numpy as np
from google.rpc import status_pb2

from kvservice_api.bulk import (
    CALLS,
    HEADER_BYTES,
    PREFACE,
    MessageHeader,
    MessageKind,
    pack_header,
    pack_hello,
    unpack_header,
)
from kvservice_api.errors import KVError
from kvservice_api.image import checksum
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout
from kvservice_api.status import from_status
from kvservice_api.v1 import blocks_pb2
from tests.integration.known_blocks import layers_of
from tests.integration.wire import Upload, Wire


class BulkSocket:
    """One connection. A context manager that closes it."""

    def __init__(self, wire: Wire, preface: bytes = PREFACE, timeout_s: float = 30.0) -> None:
        self.wire = wire
        self.socket = socket.create_connection(("127.0.0.1", wire.capabilities().bulk_port), timeout_s)
        if wire.bulk_tls is not None:
            self.socket = wire.bulk_tls.wrap_socket(self.socket, server_hostname="localhost")
        self.socket.sendall(preface)
        self.checksums: list[int] = []  # Of the slices of the last message, if the client is to verify them.

    def hello(self, ticket: bytes, client_id: bytes = b"") -> Self:
        self.socket.sendall(pack_hello(ticket, client_id or self.wire.client_id))
        return self

    def receive(self, size_bytes: int) -> bytes:
        """Raises ConnectionError if the daemon closes the connection before."""
        data = b""
        while len(data) < size_bytes:
            if not (more := self.socket.recv(size_bytes - len(data))):
                raise ConnectionError(f"closed after {len(data)} of {size_bytes} bytes")
            data += more
        return data

    def message(self) -> tuple[MessageHeader, bytes]:
        """The next one. SUMMED_DATA is returned as DATA, and its checksums are kept in `checksums`."""
        header = unpack_header(self.receive(HEADER_BYTES))
        payload, size_bytes = self.receive(header.size_bytes), header.size_bytes
        if header.kind is MessageKind.SUMMED_DATA:
            size_bytes = header.offset_bytes
            header = header._replace(kind=MessageKind.DATA, offset_bytes=0, size_bytes=size_bytes)
        self.checksums = np.frombuffer(payload[size_bytes:], "<u8").tolist()
        return header, payload[:size_bytes]

    def error(self) -> KVError:
        """The error that the daemon sends, after other messages or none."""
        while True:
            header, payload = self.message()
            assert header.kind in (MessageKind.DATA, MessageKind.ERROR)
            if header.kind is MessageKind.ERROR:
                return from_status(status_pb2.Status.FromString(payload))

    def call(self, method: str, request: bytes) -> bytes | KVError:
        """What the daemon answers."""
        self.socket.sendall(pack_header(MessageKind.CALL, len(request), layer=CALLS.index(method)) + request)
        header, payload = self.message()
        if header.kind is MessageKind.ERROR:
            return from_status(status_pb2.Status.FromString(payload))
        assert header.kind is MessageKind.ANSWER
        return payload

    def is_closed(self) -> bool:
        """Wait until the daemon has closed the connection."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except (ConnectionError, ssl.SSLError):
            pass
        return True

    def put(self, layer: int, first_block: int, data: bytes, offset_bytes: int = 0) -> None:
        header = pack_header(
            MessageKind.DATA, len(data), layer=layer, first_block=first_block, offset_bytes=offset_bytes
        )
        self.socket.sendall(header + data)

    def commit(self, checksums: bytes) -> None:
        self.socket.sendall(pack_header(MessageKind.COMMIT, len(checksums)) + checksums)

    def result(self) -> blocks_pb2.SaveBlocksResponse:
        header, payload = self.message()
        assert header.kind is MessageKind.RESULT, header
        return blocks_pb2.SaveBlocksResponse.FromString(payload)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


def open_load(wire: Wire, layout: Layout, chain: BlockChain, connections: int = 1) -> Sequence[bytes]:
    """Lease the chain, and open a load of it: the tickets."""
    hit = wire.lookup(layout, chain)
    assert hit.hit_blocks == len(chain)
    load = blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=hit.lease_id)
    request = blocks_pb2.OpenTransferRequest(load=load, connections=connections)
    answer: blocks_pb2.OpenTransferResponse = wire.blocks.OpenTransfer(request)
    return answer.tickets


def open_save(wire: Wire, layout: Layout, chain: BlockChain, connections: int = 1) -> blocks_pb2.OpenTransferResponse:
    header = Upload.of(wire, layout, chain).header
    request = blocks_pb2.OpenTransferRequest(save=header, connections=connections)
    answer: blocks_pb2.OpenTransferResponse = wire.blocks.OpenTransfer(request)
    return answer


def checksums_of(layout: Layout, chain: BlockChain, blocks: Sequence[int]) -> bytes:
    """As in a COMMIT of these blocks."""
    slices = layers_of(layout, chain)
    return np.array([[checksum(layer[block].data) for layer in slices] for block in blocks], "<u8").tobytes()


class Received:
    """The bytes of a load, as they come on any connection."""

    def __init__(self, layout: Layout, chain: BlockChain) -> None:
        slices = [data.tobytes() for layer in layers_of(layout, chain) for data in layer]
        self._expected = b"".join(slices)
        self._starts = [0, *accumulate(map(len, slices))]
        self._block_count = len(chain)
        self._missing = len(self._expected)
        self.is_right_so_far = True

    def add(self, header: MessageHeader, payload: bytes) -> None:
        start = self._starts[header.layer * self._block_count + header.first_block] + header.offset_bytes
        self.is_right_so_far &= self._expected[start : start + len(payload)] == payload
        self._missing -= len(payload)

    def is_right(self) -> bool:
        return self.is_right_so_far and not self._missing


def read_load(connection: BulkSocket, into: Received) -> None:
    """Until END."""
    layer = 0
    while True:
        header, payload = connection.message()
        if header.kind is MessageKind.END:
            return
        assert header.kind is MessageKind.DATA, header
        assert header.layer >= layer, "layers never decrease"
        layer = header.layer
        into.add(header, payload)
