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
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from kvservice_api.copying import STREAMED_BYTES_MIN, copy_slices
from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError, NotShared
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.arena_map import ArenaMap, ArenaObserver, WriterLock
from kvservice_client.buffers import Bytes
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline, TransferDeadline
from kvservice_client.transports.base import LoadOrder, SaveOrder, SaveResult, SaveSet, Transport
from kvservice_client.transports.copying import HELPED_BYTES_MIN, Batch, Copiers, Group
from kvservice_client.transports.grpc import save_header
from kvservice_client.transports.in_place import InPlace, InPlaceMismatch, View
from kvservice_client.transports.reservation import Reservation

M = TypeVar("M", bound=Message)

_GROUPS_AHEAD = 3  # Groups of layers whose copies have begun.
# How much is copied at a time. Each piece costs 0.1 ms of Python. The last ones of a load are small, so that no thread
# waits long for another.
_PIECE_BYTES_MIN, _PIECE_BYTES_MAX = 1 << 20, 4 << 20
_ABANDON_S = 1.0  # Time of one attempt to abandon a reservation at the daemon.
_ABANDON_PAUSE_S = 0.2


class ShmTransport(Transport):
    """Offered if the daemon shares its arena and this process can map it. Also an InPlaceReader and InPlaceWriter."""

    name = "shm"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._copiers = Copiers()
        self._arenas = _Arenas()
        self._writers = _Writers(connection.attach_stream.is_attached_as)
        connection.attach_stream.on_change(self._writers.release_ended)
        self._abandoned = _AbandonQueue(connection, self._writers)
        self._close = weakref.finalize(self, self._writers.close)

    def close(self) -> None:
        self._close()

    def observe_arenas(self, observer: ArenaObserver) -> None:
        self._arenas.observe(observer)

    def check_offered(self, deadline: Deadline) -> None:
        self._arenas.get(self._connection.limits(deadline))

    # Loading

    def load(self, order: LoadOrder, deadline: Deadline) -> Generator[Bytes, None, None]:
        """As `Transport.load`. Each layer is copied and verified while the daemon prepares the next ones."""
        began_s = self._connection.clock.now_s()
        started: deque[tuple[list[Bytes], Group]] = deque()
        layer = next_layer = order.first_layer
        left_bytes = order.size_bytes
        with self._located(order, deadline) as blocks:
            try:
                with self._copiers.begin(left_bytes) as batch:
                    while layer < order.layer_count:
                        blocks.wait_for_layer(layer)
                        while next_layer < blocks.layers_ready and len(started) <= _GROUPS_AHEAD:
                            piece_bytes = min(_PIECE_BYTES_MAX, max(_PIECE_BYTES_MIN, left_bytes // 3))
                            until = min(_end_of_group(order, next_layer, piece_bytes), blocks.layers_ready)
                            started.append(_start_copy(blocks, order, range(next_layer, until), batch, piece_bytes))
                            left_bytes -= sum(target.size for target in started[-1][0])
                            next_layer = until
                        targets, group = started.popleft()
                        batch.finish(group, deadline)
                        blocks.check_with_reason()
                        layer += len(targets)
                        if layer == order.layer_count:
                            self._note(order, blocks, began_s)  # A caller that has all layers may ask for no more.
                        for target in targets:
                            deadline.check()
                            yield target
            except InPlaceMismatch:
                blocks.check_with_reason()  # The blocks may have been replaced, which is not damage.
                raise

    def _note(self, order: LoadOrder, blocks: InPlace, began_s: float) -> None:
        """A load from known places, of which the daemon learns from the client."""
        if order.places is not None and not blocks.are_held:
            order.places.note_load(self._connection.clock.now_s() - began_s)

    @property
    def is_mapped(self) -> bool:
        return self._arenas.is_mapped

    def view(
        self, order: LoadOrder, deadline: TransferDeadline, have_verified: Callable[[int, int], None] | None = None
    ) -> View:
        blocks = self._located(order, deadline, verify=have_verified is None)
        if not deadline.is_per_layer:
            with blocks:  # From then on only the lease keeps the blocks in their place.
                blocks.wait_for_layer(order.layer_count - 1)
                blocks.check()
        if order.places is not None and not blocks.are_held:
            order.places.note_load(0.0)
        return View(blocks, deadline, have_verified)

    def _located(self, order: LoadOrder, deadline: Deadline, *, verify: bool = False) -> InPlace:
        """Raises NotShared if the blocks are not in place, or not for this client."""
        arena = self._arenas.get(self._connection.limits(deadline))
        places = order.places
        if places is not None and (places.are_verified or not verify):
            blocks = InPlace(arena, order, places.located)
            if not blocks.are_replaced:
                return blocks
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

    def reserve(self, saved: SaveSet, deadline: Deadline) -> Reservation:
        limits = self._connection.limits(deadline)
        arena = self._arenas.get(limits)
        if not limits.arena_writable:
            raise NotShared("the daemon does not allow clients to write into its arena")
        client_id, reservation_id = saved.client_id, secrets.randbits(63) | 1
        self._writers.acquire(arena.directory, client_id, reservation_id)
        end = partial(self._end, client_id, reservation_id, forks.generation)
        try:
            target = arena.writable()
            request = pb.ReserveBlocksRequest(header=save_header(saved), reservation_id=reservation_id)
            answer = self._call("ReserveBlocks", request, pb.ReserveBlocksResponse, deadline)
            if answer.arena_id != arena.arena_id:
                raise NotShared("the daemon has replaced its arena")
            commit = partial(self._commit, client_id, reservation_id)
            return Reservation(saved, answer, target, commit, end, self._connection.deadline)
        except BaseException:
            end(is_abandoned=True)
            raise

    def save(self, order: SaveOrder, deadline: Deadline) -> tuple[list[SaveResult], int]:
        with self.reserve(order, deadline) as reservation:
            self._write(order, reservation, deadline)
            return reservation.commit_sealed(deadline), reservation.size_bytes

    def _write(self, order: SaveOrder, reservation: Reservation, deadline: Deadline) -> None:
        """Copy the reserved blocks to their places, and compute their checksums."""
        begins, ends = reservation.ranges.reshape(-1, 2).T  # Layer after layer, as all that follows.
        sizes, streamed = ends - begins, (size_bytes := reservation.size_bytes) >= STREAMED_BYTES_MIN
        sources = [slices[position] for slices in order.layers for position in reservation.positions]
        sums = np.empty(len(sources), np.uint64)

        def write(part: range) -> None:
            some, count = slice(part.start, part.stop), len(part)
            slices, runs = np.zeros((count, 4), np.int64), np.zeros((count, 6), np.int64)
            slices[:, 0], slices[:, 2], slices[:, 3] = np.arange(count), sizes[some], 1
            runs[:, 1], runs[:, 3], runs[:, 4] = begins[some], 1, sizes[some]
            sums[some] = copy_slices(sources[some], [reservation.memory], slices, runs, streamed=streamed)

        with self._copiers.begin(size_bytes) as batch:
            piece_bytes = min(_PIECE_BYTES_MAX, max(_PIECE_BYTES_MIN, size_bytes // 8))
            batch.finish(batch.start(write, sizes, piece_bytes), deadline)
        reservation.sums[:] = sums.reshape(len(order.layers), -1).T

    def _commit(
        self, client_id: bytes, reservation_id: int, checksums: bytes, deadline: Deadline
    ) -> pb.SaveBlocksResponse:
        commit = pb.CommitBlocksRequest(client_id=client_id, reservation_id=reservation_id, checksums=checksums)
        return self._call("CommitBlocks", commit, pb.SaveBlocksResponse, deadline)

    def _end(self, client_id: bytes, reservation_id: int, generation: int, is_abandoned: bool) -> None:
        """No thread writes any more. An abandoned one ends on another thread: the daemon may not answer, and the
        garbage collector may call this on a thread that holds any lock.
        """
        if generation != forks.generation:
            return  # It is the parent's.
        if is_abandoned:
            self._abandoned.add(pb.AbandonBlocksRequest(client_id=client_id, reservation_id=reservation_id))
        else:
            self._writers.release(client_id, reservation_id)

    def _call(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M:
        return self._connection.channel.call(BLOCKS + method, request, answer, deadline)


def _end_of_group(order: LoadOrder, layer: int, piece_bytes: int) -> int:
    """The end of the layers from `layer` on that are copied together: all of a small order, and else a first layer
    alone, because it is waited for.
    """
    if order.size_bytes < HELPED_BYTES_MIN:
        return order.layer_count
    return layer + 1 if layer == order.first_layer else order.layers_within(layer, piece_bytes)


def _start_copy(
    blocks: InPlace, order: LoadOrder, layers: range, batch: Batch, piece_bytes: int
) -> tuple[list[Bytes], Group]:
    targets = [order.buffer(layer) for layer in layers]
    slices, runs = blocks.copies(layers)
    each = len(runs) // len(slices)
    expected, streamed = blocks.checksums(layers), order.size_bytes >= STREAMED_BYTES_MIN

    def copy(part: range) -> None:
        some, its_runs = slices[part.start : part.stop], runs[part.start * each : part.stop * each]
        found = copy_slices([blocks.memory], targets, some, its_runs, streamed=streamed)
        right = found == expected[part.start : part.stop]
        if not right.all():
            layer, block = divmod(part.start + int(right.argmin()), blocks.block_count)
            raise InPlaceMismatch(f"layer {layers[layer]} of block {block} is not what its checksum says")

    return targets, batch.start(copy, slices[:, 2], piece_bytes)


class _AbandonQueue:
    """Reservations to abandon at the daemon. Until then no other client can save their blocks.

    A thread ends their use of the writer's lock. It sends each one until the daemon has answered, or until the
    attachment ends, which abandons them too.
    """

    def __init__(self, connection: Connection, writers: _Writers) -> None:
        self._connection = connection
        self._writers = writers
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.RLock()  # Re-entrant: the garbage collector may end a reservation at any place.
        self._waiting: deque[pb.AbandonBlocksRequest] = deque()
        self._is_running = False

    def add(self, request: pb.AbandonBlocksRequest) -> None:
        with self._lock:
            self._waiting.append(request)
            if self._is_running:
                return
            self._is_running = True
        try:
            threading.Thread(target=self._run, name="kvservice-abandon", daemon=True).start()
        except RuntimeError:  # The interpreter exits, or there are too many threads: the next request starts one.
            self._is_running = False

    def _run(self) -> None:
        while True:
            with self._lock:
                self._is_running = False  # Before the check: a request that the garbage collector adds after it, runs.
                if not self._waiting:
                    return
                self._is_running = True
                request = self._waiting.popleft()
            self._writers.release(request.client_id, request.reservation_id)
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
        self._observers: list[ArenaObserver] = []
        self._refusal: tuple[tuple[bytes, int], str] = ((b"", 0), "")

    def observe(self, observer: ArenaObserver) -> None:
        with self._lock:
            if observer not in self._observers:
                self._observers.append(observer)
                if self._mapped is not None:
                    self._mapped.observe(observer)

    @property
    def is_mapped(self) -> bool:
        return self._mapped is not None

    def get(self, limits: pb.GetCapabilitiesResponse) -> ArenaMap:
        """Raises NotShared if it cannot be mapped here. Tried once per arena and size."""
        if "shm" not in limits.transports:
            raise NotShared(f"the daemon does not share its arena: {limits.arena_not_shared_because}")
        with self._lock:
            arena = limits.arena_id, limits.arena_capacity_bytes
            if self._mapped is not None and self._mapped.is_of(*arena):
                return self._mapped
            if self._refusal[0] == arena:
                raise NotShared(self._refusal[1])
            self._mapped = None
            try:
                self._mapped = ArenaMap(Path(limits.arena_directory), *arena)
            except NotShared as error:
                self._refusal = (arena, error.message)
                raise
            for observer in self._observers:
                self._mapped.observe(observer)
            return self._mapped


class _Writers:
    """This client's writer locks: one per attachment, held until it and its reservations have ended.

    While the lock is held, the daemon does not reuse the space that the attachment had reserved, also after a restart.
    So the lock is released as soon as the attachment's end is detected, or with the last reservation that exists then.
    """

    def __init__(self, is_attached_as: Callable[[bytes], bool]) -> None:
        self._is_attached_as = is_attached_as
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[bytes, tuple[WriterLock, set[int]]] = {}  # Client id -> the lock, and its reservations.
        self._closed = False

    def acquire(self, directory: Path, client_id: bytes, reservation_id: int) -> None:
        """Lock for this attachment, at least until `release`. Raises NotShared."""
        with self._lock:
            if client_id not in self._held:
                self._held[client_id] = (WriterLock(directory, client_id), set())
            self._held[client_id][1].add(reservation_id)
            self._release_unused()

    def release(self, client_id: bytes, reservation_id: int) -> None:
        with self._lock:
            self._held[client_id][1].discard(reservation_id)
            self._release_unused()

    def close(self) -> None:
        self._closed = True
        self.release_ended()

    def release_ended(self) -> None:
        """Called when an attachment has begun or ended."""
        with self._lock:
            self._release_unused()

    def _release_unused(self) -> None:
        for client_id, (lock, reservations) in list(self._held.items()):
            if not reservations and (self._closed or not self._is_attached_as(client_id)):
                del self._held[client_id]
                lock.release()
