"""The bulk port: KV bytes on sockets of their own, straight between the daemon's arena and the caller's memory.

gRPC opens a transfer and returns a ticket for each of its connections (`OpenTransfer`); `kvservice_api.bulk` has the
messages on them. The next transport carries small orders, the rest of a load whose connection broke, and all orders
while the port cannot be reached.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate, pairwise
from typing import TypeVar
from weakref import ref

import numpy as np
from google.protobuf.message import Message

from kvservice_api.bulk import MessageHeader, MessageKind, pack_header, unit_bytes
from kvservice_api.byte_ranges import ByteRanges
from kvservice_api.copying import STREAMED_BYTES_MIN
from kvservice_api.errors import BulkUnavailable, DeadlineExceeded, InvalidFrame, KVError, TransferEnded
from kvservice_api.malloc import keep_large_buffers
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.buffers import Bytes
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import LoadOrder, Mismatch, SaveOrder, SaveResult, Transport
from kvservice_client.transports.bulk_caller import BulkCaller
from kvservice_client.transports.bulk_connections import BulkConnection, BulkConnections
from kvservice_client.transports.bulk_messages import (
    parsed,
    receive_bytes,
    receive_header,
)
from kvservice_client.transports.bulk_transfer import END_S, BulkTransfer, NotNeeded, connections_of
from kvservice_client.transports.grpc import save_header, save_results

M = TypeVar("M", bound=Message)

BULK_BYTES_MIN = 2 * 2**20
_AHEAD_BYTES = 64 * 2**20  # Of layers without a buffer of the caller that arrive before it asks for them.
_KEPT_FREE_BYTES = 256 * 2**20
_Range = tuple[int, int, int]  # Bytes of one layer: the layer, and their begin and end in it.
_REFUSAL_S = 1.0  # For the message that says why the daemon closed a connection. It came before the end.


class BulkTransport(Transport):
    """Offered if the daemon has a bulk port, the client uses TCP, and the port could be reached when last tried."""

    name = "bulk"

    def __init__(self, connection: Connection) -> None:
        self.bytes_min = BULK_BYTES_MIN
        self._connection = connection
        itself = ref(self)  # Without a cycle: a client that is dropped ends at once.
        self._pool = BulkConnections(connection, lambda: (made := itself()) is not None and not made.bytes_min)
        self.calls = BulkCaller(connection, self._pool)

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
            for ticket in others[: sending.connections - 1]:
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
        self._begins = list(accumulate(self._missing, initial=0))  # Of each layer, in the order of all bytes.
        self._missing[: order.first_layer] = [0] * order.first_layer
        self._streamed = self.missing_bytes >= STREAMED_BYTES_MIN
        self._begun = ByteRanges()
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
        """The header of a DATA or SUMMED_DATA. None at the end."""
        header = receive_header(connection, deadline)
        if header.kind not in (MessageKind.SUMMED_DATA, MessageKind.DATA, MessageKind.END):
            raise InvalidFrame(f"a load does not have the message {header.kind.name}")
        return None if header.kind is MessageKind.END else header

    def _fill(self, connection: BulkConnection, header: MessageHeader, deadline: Deadline | None = None) -> None:
        """The rest of that message."""
        at, size_bytes = (header.layer, header.first_block), header.size_bytes
        if header.kind is MessageKind.DATA:
            ranges = self._ranges(*at, header.offset_bytes, size_bytes)
            connection.receive(SocketBuffers(self._places(ranges, deadline)), deadline)
        else:
            ranges = self._ranges(*at, 0, header.offset_bytes)
            self._fill_summed(connection, ranges, size_bytes - header.offset_bytes, deadline)
        with self._changed:
            self._transfer.progress += 1
            for layer, begin, end in ranges:
                self._missing[layer] -= end - begin
            if not self._missing[ranges[-1][0]] or len(ranges) > 1:
                self._changed.notify_all()

    def _fill_summed(
        self, connection: BulkConnection, ranges: list[_Range], sums_bytes: int, deadline: Deadline | None
    ) -> None:
        """The slices, and their checksums. Raises Mismatch."""
        slices: list[memoryview] = []
        layers: list[int] = []  # Of each slice.
        for (layer, begin, end), place in zip(ranges, self._places(ranges, deadline), strict=True):
            starts = self._order.block_starts(layer)
            first, last = bisect_left(starts, begin), bisect_left(starts, end)
            if starts[first] != begin or starts[last] != end:
                raise InvalidFrame(f"bytes {begin}..{end} of layer {layer} have checksums, and are not whole slices")
            slices += [place[start - begin : stop - begin] for start, stop in pairwise(starts[first : last + 1])]
            layers += [layer] * (last - first)
        if sums_bytes != 8 * len(slices):
            raise InvalidFrame(f"{len(slices)} slices have {sums_bytes} bytes of checksums")
        expected = bytearray(sums_bytes)
        buffers = SocketBuffers([*slices, memoryview(expected)], summed=True, streamed=self._streamed)
        connection.receive(buffers, deadline)
        found = buffers.sums[:-1]
        if found.tobytes() != expected:  # First without NumPy, whose code is not in the caches.
            wrong = np.frombuffer(expected, "<u8") != np.frombuffer(found, np.uint64)
            if wrong.any():
                layer = layers[int(wrong.argmax())]
                raise Mismatch(f"bytes of layer {layer} that arrived are not what their checksums say")

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

    def _ranges(self, layer: int, first_block: int, offset_bytes: int, size_bytes: int) -> list[_Range]:
        """The bytes of a message, by layer."""
        order = self._order
        if not (order.first_layer <= layer < order.layer_count and first_block < order.block_count):
            raise InvalidFrame(f"the load has no layer {layer} with a block {first_block}")
        begin = order.block_starts(layer)[first_block] + offset_bytes
        end = begin + size_bytes
        if not begin < end <= self._begins[-1] - self._begins[layer] or begin >= order.block_starts(layer)[-1]:
            raise InvalidFrame(f"the load has no bytes {begin}..{end} from layer {layer} on")
        ranges = []
        while end > 0:
            size = order.block_starts(layer)[-1]
            ranges.append((layer, begin, min(end, size)))
            layer, begin, end = layer + 1, 0, end - size
        return ranges

    def _places(self, ranges: list[_Range], deadline: Deadline | None) -> list[memoryview]:
        """The caller's memory for these ranges. A thread of ours waits while too much has arrived ahead of the caller.
        The caller's thread, which has a deadline, cannot wait for itself.
        """
        order, (first, begin, _), (last, _, end) = self._order, ranges[0], ranges[-1]
        with self._changed:
            while first > self._taken + self._ahead:
                if deadline is not None:
                    raise InvalidFrame(f"layer {first} arrived while layer {self._taken} was not complete")
                self._transfer.check_not_over()
                self._changed.wait()
            self._begun.add(self._begins[first] + begin, self._begins[last] + end)
            for layer in range(first, last + 1):
                if layer not in self._targets:
                    self._targets[layer] = order.buffer(layer)
            return [self._targets[layer][begin:end].data for layer, begin, end in ranges]


class _Sending:
    """The slices of one save that the daemon wants, in units, for all of its connections. Thread-safe."""

    def __init__(self, order: SaveOrder, wanted: Sequence[int], transfer: BulkTransfer) -> None:
        """Raises InvalidFrame if the save has no such blocks."""
        if max(wanted, default=0) >= len(order.layers[0]):
            raise InvalidFrame(f"the daemon wants block {max(wanted)} of a save of {len(order.layers[0])} blocks")
        self._order = order
        self._wanted = list(wanted)
        self._transfer = transfer
        self.size_bytes = sum(slices[block].size for slices in order.layers for block in self._wanted)
        self.connections = transfer.connections(self.size_bytes)
        units = _units(order, self._wanted, unit_bytes(self.connections))
        self._units = iter(units)  # A list's iterator: `next` may be called by any thread.

    def send_all(self, connection: BulkConnection, deadline: Deadline | None = None) -> None:
        """Units as long as there are any. Raises the daemon's error, if it sent one, or OSError."""
        try:
            for unit in self._units:
                if self._transfer.error is not None:
                    return
                self._send(connection, unit, deadline)
        except OSError:
            with suppress(OSError, DeadlineExceeded):  # Else another transport carries the save.
                receive_header(connection, Deadline(_REFUSAL_S))  # Raises what the daemon sent before it closed.
            raise

    def _send(self, connection: BulkConnection, unit: list[tuple[int, int]], deadline: Deadline | None) -> None:
        """These slices as one message."""
        slices = [self._order.layers[layer][block].data for layer, block in unit]
        layer, first_block = unit[0]
        head = pack_header(MessageKind.DATA, sum(map(len, slices)), layer=layer, first_block=first_block)
        buffers = SocketBuffers([memoryview(head), *slices], summed=True)
        connection.send(buffers, deadline)
        self._order.keep_checksums(unit, buffers.sums[1:])

    def commit(self, connection: BulkConnection, deadline: Deadline) -> pb.SaveBlocksResponse:
        sums = self._order.checksums(self._wanted)
        connection.send(SocketBuffers([memoryview(pack_header(MessageKind.COMMIT, len(sums)) + sums)]), deadline)
        header = receive_header(connection, deadline)
        if header.kind is not MessageKind.RESULT:
            raise InvalidFrame(f"a save does not end with the message {header.kind.name}")
        return parsed(pb.SaveBlocksResponse, receive_bytes(connection, header.size_bytes, deadline))


def _units(order: SaveOrder, wanted: Sequence[int], size_bytes: int) -> list[list[tuple[int, int]]]:
    """Layers and blocks of the wanted slices, in their order, in units of at most `size_bytes` or one slice."""
    units: list[list[tuple[int, int]]] = []
    room = 0
    for layer, slices in enumerate(order.layers):
        for block in wanted:
            size = slices[block].size
            if size > room:
                units.append([])
                room = size_bytes
            units[-1].append((layer, block))
            room -= size
    return units


def receive_end(connection: BulkConnection) -> None:
    header = receive_header(connection, None)
    if header.kind is not MessageKind.END:
        raise InvalidFrame(f"a connection of a save does not end with the message {header.kind.name}")
