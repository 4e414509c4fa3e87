"""Shared memory: loads and saves are one copy between the arena and the caller's memory, views are none.

gRPC messages have only places and checksums. The next transport carries blocks that are not in place: DRAM has no
space, a block is stored as several shards, or the daemon is on another host. It also carries blocks whose checksums do
not match; the daemon then verifies them.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError, NotShared
from kvservice_api.image import BlockGeometry, block_geometry
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.arena_map import ArenaMap, WriterLock
from kvservice_client.buffers import Bytes
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline, TransferDeadline
from kvservice_client.transports.base import LoadOrder, SaveOrder, SaveResult, Transport
from kvservice_client.transports.copying import Batch, Copiers, Group, copy_and_sum, copy_runs_and_sum, sum_and_copy
from kvservice_client.transports.grpc import save_header, save_result
from kvservice_client.transports.in_place import InPlace, InPlaceMismatch, View

M = TypeVar("M", bound=Message)

_LAYERS_AHEAD = 3
_ABANDON_S = 1.0  # Time of one attempt to abandon a reservation at the daemon.
_ABANDON_PAUSE_S = 0.2


class ShmTransport(Transport):
    """Offered if the daemon shares its arena and this process can map it. Is an InPlaceReader too."""

    name = "shm"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._copiers = Copiers()
        self._arenas = _Arenas()
        self._writers = _Writers(connection.attach_stream.is_attached_as)
        connection.attach_stream.on_change(self._writers.release_ended)
        self._abandoned = _AbandonQueue(connection)
        self._close = weakref.finalize(self, self._writers.close)

    def close(self) -> None:
        self._close()

    def check_offered(self, deadline: Deadline) -> None:
        self._arenas.get(self._connection.limits(deadline))

    # Loading

    def load(self, order: LoadOrder, deadline: Deadline) -> Generator[Bytes, None, None]:
        """As `Transport.load`. Each layer is copied and verified while the daemon prepares the next ones."""
        started: deque[tuple[Bytes, Group]] = deque()
        next_layer = order.first_layer
        with self._located(order, deadline) as blocks:
            try:
                with self._copiers.begin() as batch:
                    for layer in range(order.first_layer, order.layer_count):
                        blocks.wait_for_layer(layer)
                        until = min(layer + _LAYERS_AHEAD + 1, order.layer_count, blocks.layers_ready)
                        while next_layer < until:
                            started.append(_start_copy(blocks, order, next_layer, batch))
                            next_layer += 1
                        target, group = started.popleft()
                        batch.finish(group, deadline)
                        blocks.check()
                        yield target
            except InPlaceMismatch:
                blocks.check()  # The blocks may have been replaced, which is not damage.
                raise

    def view(
        self, order: LoadOrder, deadline: TransferDeadline, have_verified: Callable[[int, int], None] | None = None
    ) -> View:
        blocks = self._located(order, deadline, verify=have_verified is None)
        if not deadline.is_per_layer:
            with blocks:  # From then on only the lease keeps the blocks in their place.
                blocks.wait_for_layer(order.layer_count - 1)
                blocks.check()
        return View(blocks, deadline, have_verified)

    def _located(self, order: LoadOrder, deadline: Deadline, *, verify: bool = False) -> InPlace:
        """Raises NotShared if the blocks are not in place, or not for this client."""
        arena = self._arenas.get(self._connection.limits(deadline))
        request = pb.LocateBlocksRequest(
            client_id=order.client_id,
            lease_id=order.lease_id,
            first_block=order.first_block,
            block_count=order.block_count,
            verify=verify,
        )
        answers = self._connection.channel.stream(BLOCKS + "LocateBlocks", request, pb.LocateBlocksResponse, deadline)
        try:
            return InPlace(arena, order, answers)
        except BaseException:
            answers.close()
            raise

    # Saving

    def save(self, order: SaveOrder, deadline: Deadline) -> tuple[SaveResult, int]:
        limits = self._connection.limits(deadline)
        arena = self._arenas.get(limits)
        if not limits.arena_writable:
            raise NotShared("the daemon does not allow clients to write into its arena")
        client_id = order.client_id
        with self._writers.lock(arena.directory, client_id):
            target = arena.writable()
            reservation_id = secrets.randbits(63) | 1
            request = pb.ReserveBlocksRequest(header=save_header(order), reservation_id=reservation_id)
            try:
                reserved = self._call("ReserveBlocks", request, pb.ReserveBlocksResponse, deadline)
                if reserved.arena_id != arena.arena_id:
                    raise NotShared("the daemon has replaced its arena")
                sums, size_bytes = self._write(order, reserved, target, deadline)
                commit = pb.CommitBlocksRequest(
                    client_id=client_id, reservation_id=reservation_id, checksums=sums.astype("<u8").tobytes()
                )
                return save_result(self._call("CommitBlocks", commit, pb.SaveBlocksResponse, deadline)), size_bytes
            except BaseException:
                # No thread writes any more. The caller does not wait, because the daemon may not answer.
                self._abandoned.add(pb.AbandonBlocksRequest(client_id=client_id, reservation_id=reservation_id))
                raise

    def _write(
        self, order: SaveOrder, reserved: pb.ReserveBlocksResponse, arena: Bytes, deadline: Deadline
    ) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.uint64]], int]:
        """Copy the reserved blocks to their places. Returns the checksums, ``[block, layer]``, and the copied bytes."""
        geometries = [block_geometry(order.layout, order.shard, order.token_counts[block]) for block in reserved.blocks]
        places = list(zip(reserved.blocks, reserved.offsets, geometries, strict=True))
        sums = np.zeros((len(places), len(order.layers)), np.uint64)
        size_bytes = 0
        with self._copiers.begin() as batch:
            running: list[Group] = []
            for layer in range(len(order.layers)):
                sizes = [geometry.slice_bytes(layer) for geometry in geometries]
                size_bytes += sum(sizes)
                running.append(batch.start(partial(_write_slice, order, places, layer, arena, sums), sizes))
                if len(running) > _LAYERS_AHEAD:
                    batch.finish(running.pop(0), deadline)
            for group in running:
                batch.finish(group, deadline)
        return sums, size_bytes

    def _call(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M:
        return self._connection.channel.call(BLOCKS + method, request, answer, deadline)


def _start_copy(blocks: InPlace, order: LoadOrder, layer: int, batch: Batch) -> tuple[Bytes, Group]:
    target, starts = order.buffer(layer), order.block_starts(layer)
    sizes = [end - start for start, end in pairwise(starts)]
    return target, batch.start(partial(_copy_slice, blocks, starts, layer, target), sizes)


def _copy_slice(blocks: InPlace, starts: list[int], layer: int, target: Bytes, block: int) -> None:
    expected = blocks.expected(block, layer)
    source, runs = blocks.slice(block, layer), blocks.runs(block, layer)
    into = target[starts[block] : starts[block + 1]]
    found = copy_and_sum(source, into) if runs is None else copy_runs_and_sum(source, runs, into)
    if found != expected:
        raise InPlaceMismatch(f"layer {layer} of block {block} is not what its checksum says")


def _write_slice(
    order: SaveOrder,
    places: list[tuple[int, int, BlockGeometry]],
    layer: int,
    arena: Bytes,
    sums: np.ndarray[tuple[int, int], np.dtype[np.uint64]],
    number: int,
) -> None:
    block, offset, geometry = places[number]
    begin, end = geometry.slice_range(layer)
    sums[number, layer] = sum_and_copy(order.layers[layer][block], arena[offset + begin : offset + end])


class _AbandonQueue:
    """Reservations to abandon at the daemon. Until then no other client can save their blocks.

    A thread sends each one until the daemon has answered, or until the attachment ends, which abandons them too.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[pb.AbandonBlocksRequest] = deque()
        self._is_running = False

    def add(self, request: pb.AbandonBlocksRequest) -> None:
        with self._lock:
            self._waiting.append(request)
            if self._is_running:
                return
            self._is_running = True
        threading.Thread(target=self._run, name="kvservice-abandon", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                request = self._waiting.popleft()
            while not self._send_abandon(request):
                self._connection.clock.sleep(_ABANDON_PAUSE_S)  # No call waits for this thread.

    def _send_abandon(self, request: pb.AbandonBlocksRequest) -> bool:
        if not self._connection.attach_stream.is_attached_as(request.client_id):
            return True
        call = self._connection.channel.call
        try:
            call(BLOCKS + "AbandonBlocks", request, pb.AbandonBlocksResponse, self._connection.deadline(_ABANDON_S))
        except KVError as error:
            return not isinstance(error, (DaemonUnavailable, DeadlineExceeded))
        return True


class _Arenas:
    """The mapping of the daemon's current arena: made once, and again if the daemon has replaced the arena."""

    def __init__(self) -> None:
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        """Begin unmapped: a child that does not use the arena must not keep the memory of a replaced one."""
        self._lock = threading.Lock()
        self._mapped: ArenaMap | None = None
        self._refusal: tuple[bytes, str] = (b"", "")

    def get(self, limits: pb.GetCapabilitiesResponse) -> ArenaMap:
        """Raises NotShared if it cannot be mapped here. Tried once per arena."""
        if "shm" not in limits.transports:
            raise NotShared(f"the daemon does not share its arena: {limits.arena_not_shared_because}")
        with self._lock:
            if self._mapped is not None and self._mapped.arena_id == limits.arena_id:
                return self._mapped
            if self._refusal[0] == limits.arena_id:
                raise NotShared(self._refusal[1])
            self._mapped = None
            try:
                self._mapped = ArenaMap(Path(limits.arena_directory), limits.arena_id, limits.arena_capacity_bytes)
            except NotShared as error:
                self._refusal = (limits.arena_id, error.message)
                raise
            return self._mapped


class _Writers:
    """This client's writer locks: one per attachment, held until the attachment has ended and no save uses the lock.

    While the lock is held, the daemon does not reuse the space that the attachment had reserved, also after a restart.
    So the lock is released as soon as the attachment's end is detected, or with the last save that runs then.
    """

    def __init__(self, is_attached_as: Callable[[bytes], bool]) -> None:
        self._is_attached_as = is_attached_as
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[bytes, tuple[WriterLock, int]] = {}  # Client id -> the lock, and how many saves use it.
        self._closed = False

    @contextmanager
    def lock(self, directory: Path, client_id: bytes) -> Iterator[None]:
        """Hold the lock of this attachment, at least while the block runs. Raises NotShared."""
        with self._lock:
            lock, users = self._held.get(client_id) or (WriterLock(directory, client_id), 0)
            self._held[client_id] = (lock, users + 1)
            self._release_unused()
        try:
            yield
        finally:
            with self._lock:
                lock, users = self._held[client_id]
                self._held[client_id] = (lock, users - 1)
                self._release_unused()

    def close(self) -> None:
        self._closed = True
        self.release_ended()

    def release_ended(self) -> None:
        """Called when an attachment has begun or ended."""
        with self._lock:
            self._release_unused()

    def _release_unused(self) -> None:
        for client_id, (lock, users) in list(self._held.items()):
            if not users and (self._closed or not self._is_attached_as(client_id)):
                del self._held[client_id]
                lock.release()
