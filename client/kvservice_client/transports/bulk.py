"""The bulk port: KV bytes on sockets of their own, straight between the daemon's arena and the caller's memory.

gRPC opens a transfer and returns a ticket for each of its connections (`OpenTransfer`); `kvservice_api.bulk` has the
messages on them. The next transport carries small orders, the rest of a load whose connection broke, and all orders
while the port cannot be reached.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import TypeVar
from weakref import ref

import numpy as np
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from kvservice_api.bulk import (
    HEADER_BYTES,
    UNIT_BYTES,
    MessageHeader,
    MessageKind,
    pack_header,
    unpack_header,
)
from kvservice_api.copying import STREAMED_BYTES_MIN
from kvservice_api.errors import BulkUnavailable, InvalidFrame, KVError, TransferEnded
from kvservice_api.malloc import keep_large_buffers
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_api.status import from_status
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.buffers import Bytes
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import LoadOrder, Mismatch, SaveOrder, SaveResult, Transport
from kvservice_client.transports.bulk_connections import BulkConnection, BulkConnections
from kvservice_client.transports.bulk_transfer import END_S, BulkTransfer, NotNeeded, connections_of
from kvservice_client.transports.grpc import save_header, save_results

M = TypeVar("M", bound=Message)

BULK_BYTES_MIN = 2 * 2**20
_AHEAD_BYTES = 64 * 2**20  # Of layers without a buffer of the caller that arrive before it asks for them.
_KEPT_FREE_BYTES = 256 * 2**20
_REFUSAL_S = 1.0  # For the message that says why the daemon closed a connection. It came before the end.


class BulkTransport(Transport):
    """Offered if the daemon has a bulk port, the client uses TCP, and the port could be reached when last tried."""

    name = "bulk"

    def __init__(self, connection: Connection) -> None:
        self.bytes_min = BULK_BYTES_MIN
        self._connection = connection
        itself = ref(self)  # Without a cycle: a client that is dropped ends at once.
        self._pool = BulkConnections(connection, lambda: (made := itself()) is not None and not made.bytes_min)

    def check_offered(self, deadline: Deadline) -> None:
        self._pool.endpoint(self._connection.limits(deadline))

    def check_reachable(self, deadline: Deadline) -> None:
        """Make a connection of its own, with TLS as others have it. Raises BulkUnavailable with the reason."""
        self._pool.check_reachable(self._connection.limits(deadline))

    def close(self) -> None:
        self._pool.close()

    def offered_connections(self, size_bytes: int, deadline: Deadline) -> int:
        """How many connections a load of so many bytes would use; 0 if it would not come by this transport, or before
        the first transfer, which finds out how far the daemon is. Makes no call.
        """
        if size_bytes < self.bytes_min:
            return 0
        try:
            endpoint = self._pool.endpoint(self._connection.limits(deadline))
        except BulkUnavailable:
            return 0
        rtt_s = self._pool.rtt_s(endpoint)
        return 0 if rtt_s is None else connections_of(size_bytes, rtt_s, endpoint)

    def load(self, order: LoadOrder, deadline: Deadline) -> Generator[Bytes, None, None]:
        """As `Transport.load`. The caller's thread reads the first layer, or all if there is one connection, because a
        busy processor wakes it up late. Several connections are then read by threads.
        """
        if order.into is None:
            keep_large_buffers(_KEPT_FREE_BYTES)
        request = pb.LoadBlocksRequest(
            client_id=order.client_id,
            lease_id=order.lease_id,
            first_block=order.first_block,
            block_count=order.block_count,
            first_layer=order.first_layer,
        )
        with BulkTransfer(self._connection, self._pool, order.client_id, deadline) as transfer:
            arrivals = _Arrivals(order, transfer)
            tickets = transfer.take_up(order, arrivals.missing_bytes)
            if not tickets:
                tickets = transfer.open(pb.OpenTransferRequest(load=request), arrivals.missing_bytes).tickets
            first, *others = tickets
            transfer.greet(first)
            threads_from = order.first_layer + (not transfer.is_far) if others else order.layer_count
            for layer in range(order.first_layer, order.layer_count):
                if layer == threads_from:
                    transfer.start(None, arrivals.receive_first)
                    for ticket in others:
                        transfer.start(ticket, arrivals.receive_more)
                if layer >= threads_from:
                    transfer.wait_until(arrivals.completion(layer))
                while not arrivals.is_complete(layer):
                    with transfer.answer():
                        if not arrivals.receive(transfer.first, deadline):
                            raise InvalidFrame(f"the load ended within layer {layer}")
                yield arrivals.take(layer)
            if threads_from >= order.layer_count:
                with suppress(KVError, OSError):
                    if not arrivals.receive(transfer.first, Deadline(END_S)):
                        transfer.release(transfer.first)
            transfer.finish()

    def save(self, order: SaveOrder, deadline: Deadline) -> tuple[list[SaveResult], int]:
        with BulkTransfer(self._connection, self._pool, order.client_id, deadline) as transfer:
            opened = transfer.open(pb.OpenTransferRequest(save=save_header(order)), order.size_bytes)
            sending = _Sending(order, opened.blocks, transfer)
            first, *others = opened.tickets
            transfer.greet(first)
            for ticket in others[: transfer.connections(sending.size_bytes) - 1]:
                transfer.start(ticket, sending.send_all, receive_end)
            with transfer.answer():
                sending.send_all(transfer.first, deadline)
            transfer.wait_until(lambda: not transfer.working)
            transfer.check()
            with transfer.answer():
                answer = sending.commit(transfer.first, deadline)
            transfer.release(transfer.first)
            transfer.finish()
        return save_results(answer, order.chains), sending.size_bytes


class _Arrivals:
    """Where the bytes of one load go, and which have arrived. Thread-safe."""

    def __init__(self, order: LoadOrder, transfer: BulkTransfer) -> None:
        self._order = order
        self._transfer = transfer
        self._changed = transfer.changed
        self._missing = [order.block_starts(layer)[-1] for layer in range(order.layer_count)]
        self._missing[: order.first_layer] = [0] * order.first_layer
        self._streamed = self.missing_bytes >= STREAMED_BYTES_MIN
        self._begun: list[list[tuple[int, int]]] = [[] for _ in self._missing]  # Ascending ranges of each layer.
        self._targets: dict[int, Bytes] = {}
        self._taken = order.first_layer  # Layers before it are the caller's.
        self._ahead = len(self._missing) if order.into is not None else _AHEAD_BYTES // max(self._missing)

    @property
    def missing_bytes(self) -> int:
        return sum(self._missing)

    def is_complete(self, layer: int) -> bool:
        return not self._missing[layer]

    def completion(self, layer: int) -> Callable[[], bool]:
        return partial(self.is_complete, layer)

    def take(self, layer: int) -> Bytes:
        """A complete layer. Nothing is written into it any more."""
        with self._changed:
            self._taken = layer + 1
            self._changed.notify_all()  # Threads that wait until they may use more memory.
            return self._targets.pop(layer)

    def receive(self, connection: BulkConnection, deadline: Deadline | None = None) -> bool:
        """One message. Whether it was not the last one. Raises the daemon's error, InvalidFrame, OSError."""
        header = self._next(connection, deadline)
        if header is None:
            return False
        self._fill(connection, header, deadline)
        return True

    def _next(self, connection: BulkConnection, deadline: Deadline | None = None) -> MessageHeader | None:
        """The header of a DATA, or of its CHECKSUMS. None at the end."""
        header = receive_header(connection, deadline)
        if header.kind not in (MessageKind.CHECKSUMS, MessageKind.DATA, MessageKind.END):
            raise InvalidFrame(f"a load does not have the message {header.kind.name}")
        return None if header.kind is MessageKind.END else header

    def _fill(self, connection: BulkConnection, header: MessageHeader, deadline: Deadline | None = None) -> None:
        """The rest of that message, and of its DATA."""
        sums = None
        if header.kind is MessageKind.CHECKSUMS:
            # With the next header: a call less.
            data = receive_bytes(connection, header.size_bytes + HEADER_BYTES, deadline)
            sums = np.frombuffer(data, "<u8", header.size_bytes // 8).tolist()
            announced, header = header, unpack_header(data[header.size_bytes :])
            if header.kind is not MessageKind.DATA or header[1:4] != (*announced[1:3], 0):
                raise InvalidFrame("CHECKSUMS are not followed by their DATA")
        into = self._place(header)
        if sums is None:
            connection.receive(SocketBuffers([into]), deadline)
        else:
            buffers = SocketBuffers(self._slices(header, into, len(sums)), summed=True, streamed=self._streamed)
            connection.receive(buffers, deadline)
            if buffers.sums.tolist() != sums:
                raise Mismatch(f"bytes of layer {header.layer} that arrived are not what their checksums say")
        with self._changed:
            self._transfer.progress += 1
            self._missing[header.layer] -= header.size_bytes
            if not self._missing[header.layer]:
                self._changed.notify_all()

    def receive_first(self, connection: BulkConnection) -> None:
        while self.receive(connection):
            pass

    def receive_more(self, connection: BulkConnection) -> None:
        """On a connection that may come after all bytes were sent on others."""
        is_needed = False
        try:
            while (header := self._next(connection)) is not None:
                is_needed = True
                self._fill(connection, header)
        except (OSError, TransferEnded):
            if is_needed:
                raise
            raise NotNeeded from None

    def _slices(self, header: MessageHeader, into: memoryview, count: int) -> list[memoryview]:
        """Of a message that has so many whole slices."""
        first, starts = header.first_block, self._order.block_starts(header.layer)
        bounds = starts[first : first + count + 1]
        if len(bounds) != count + 1 or bounds[-1] - bounds[0] != len(into):
            raise InvalidFrame(f"there are {count} checksums for {len(into)} bytes of layer {header.layer}")
        return [into[begin - bounds[0] : end - bounds[0]] for begin, end in pairwise(bounds)]

    def _place(self, header: MessageHeader) -> memoryview:
        """The caller's memory for this message. Waits while too much has arrived ahead of the caller."""
        order, layer = self._order, header.layer
        if not (order.first_layer <= layer < order.layer_count and header.first_block < order.block_count):
            raise InvalidFrame(f"the load has no layer {layer} with a block {header.first_block}")
        starts = order.block_starts(layer)
        begin = starts[header.first_block] + header.offset_bytes
        end = begin + header.size_bytes
        with self._changed:
            while layer > self._taken + self._ahead:
                self._transfer.check_not_over()
                self._changed.wait()
            ranges = self._begun[layer]
            at = bisect_right(ranges, (begin, end))
            is_free = (not at or ranges[at - 1][1] <= begin) and (at == len(ranges) or end <= ranges[at][0])
            if not begin < end <= starts[-1] or not is_free:
                raise InvalidFrame(f"bytes {begin}..{end} of layer {layer} do not exist, or came twice")
            ranges.insert(at, (begin, end))
            if layer not in self._targets:
                self._targets[layer] = order.buffer(layer)
            return self._targets[layer][begin:end].data


class _Sending:
    """The slices of one save that the daemon wants, in units, for all of its connections. Thread-safe."""

    def __init__(self, order: SaveOrder, wanted: Sequence[int], transfer: BulkTransfer) -> None:
        self._order = order
        self._wanted = list(wanted)
        self._transfer = transfer
        self._units = _units(order, self._wanted)  # A list's iterator: `next` may be called by any thread.
        self.size_bytes = sum(slices[block].size for slices in order.layers for block in self._wanted)

    def send_all(self, connection: BulkConnection, deadline: Deadline | None = None) -> None:
        """Units as long as there are any. Raises the daemon's error, if it sent one, or OSError."""
        try:
            for layer, blocks in self._units:
                if self._transfer.error is not None:
                    return
                self._send(connection, layer, blocks, deadline)
        except OSError:
            with suppress(OSError):
                receive_header(connection, Deadline(_REFUSAL_S))  # Raises what the daemon sent before it closed.
            raise

    def _send(self, connection: BulkConnection, layer: int, blocks: range, deadline: Deadline | None) -> None:
        """The slices of consecutive blocks, as one message."""
        slices = [self._order.layers[layer][block].data for block in blocks]
        head = pack_header(MessageKind.DATA, sum(map(len, slices)), layer=layer, first_block=blocks.start)
        buffers = SocketBuffers([memoryview(head), *slices], summed=True)
        connection.send(buffers, deadline)
        self._order.keep_checksums(layer, blocks, buffers.sums[1:].tolist())

    def commit(self, connection: BulkConnection, deadline: Deadline) -> pb.SaveBlocksResponse:
        sums = self._order.checksums(self._wanted)
        connection.send(SocketBuffers([memoryview(pack_header(MessageKind.COMMIT, len(sums)) + sums)]), deadline)
        header = receive_header(connection, deadline)
        if header.kind is not MessageKind.RESULT:
            raise InvalidFrame(f"a save does not end with the message {header.kind.name}")
        return _parsed(pb.SaveBlocksResponse, receive_bytes(connection, header.size_bytes, deadline))


def _units(order: SaveOrder, wanted: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Layer and consecutive wanted blocks, of about `UNIT_BYTES` or one slice."""
    units = []
    for layer, slices in enumerate(order.layers):
        begin = end = size = 0
        for block in wanted:
            if size and (block != end or size + slices[block].size > UNIT_BYTES):
                units.append((layer, range(begin, end)))
                size = 0
            if not size:
                begin = block
            end = block + 1
            size += slices[block].size
        if size:
            units.append((layer, range(begin, end)))
    return iter(units)


def receive_header(connection: BulkConnection, deadline: Deadline | None) -> MessageHeader:
    """Raises the daemon's error if it is one, InvalidFrame, OSError."""
    data = memoryview(bytearray(HEADER_BYTES))
    connection.receive(SocketBuffers([data]), deadline)
    header = unpack_header(data)
    if header.kind is MessageKind.ERROR:
        raise from_status(_parsed(status_pb2.Status, receive_bytes(connection, header.size_bytes, deadline)))
    return header


def receive_bytes(connection: BulkConnection, size: int, deadline: Deadline | None) -> bytes:
    """Of a message whose size the codec bounds."""
    data = bytearray(size)
    connection.receive(SocketBuffers([memoryview(data)]), deadline)
    return bytes(data)


def _parsed(kind: type[M], data: bytes) -> M:
    """Raises InvalidFrame."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidFrame(f"a message of the bulk port is not a {kind.__name__}: {error}") from error


def receive_end(connection: BulkConnection) -> None:
    header = receive_header(connection, None)
    if header.kind is not MessageKind.END:
        raise InvalidFrame(f"a connection of a save does not end with the message {header.kind.name}")
