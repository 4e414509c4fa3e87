"""Shared memory: loads and saves are one copy between the arena and the caller's memory, views are none.

gRPC carries places and checksums only. What does not lie in place (no room in DRAM, several shards
make up a block, another host) goes over the other transport, and so does whatever is in doubt: the
daemon verifies it then.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError, NotShared, NoWriterLock
from kvservice_api.image import BlockGeometry, block_geometry
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.arena_map import ArenaMap, WriterLock
from kvservice_client.buffers import Bytes
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import Deadline
from kvservice_client.traffic import Traffic
from kvservice_client.transports.base import LoadOrder, SaveOrder, Transport, Verify
from kvservice_client.transports.copying import Copiers, Group, copy_and_sum, copy_runs_and_sum, sum_and_copy
from kvservice_client.transports.in_place import InDoubt, InPlace, View

M = TypeVar("M", bound=Message)

log = logging.getLogger(__name__)

_LAYERS_AHEAD = 3
_ABANDON_S = 1.0  # One attempt to tell the daemon that a reservation is given up.
_ABANDON_PAUSE_S = 0.2


class ShmTransport:
    name = "shm"

    def __init__(self, connection: Connection, fallback: Transport, traffic: Traffic, *, insists: bool = False) -> None:
        """`fallback` moves what shared memory cannot. With `insists` a daemon that cannot be reached so is an error."""
        self._connection = connection
        self._fallback = fallback
        self._traffic = traffic
        self._insists = insists
        self._log = RateLimitedLog(log)
        self._copiers = Copiers()
        self._arenas = _Arenas()
        self._writers = _Writers(connection.life_line.is_attached_as)
        connection.life_line.on_change(self._writers.release_ended)
        self._given_up = _GivenUp(connection)
        self.close = weakref.finalize(self, self._writers.close)

    # Loading

    def load(self, order: LoadOrder, deadline: Deadline) -> Iterator[Bytes]:
        layer = order.first_layer
        try:
            with self._located(order, deadline) as blocks:
                try:
                    with closing(self._copied(blocks, order, deadline)) as layers:
                        for data in layers:
                            self._traffic.loaded(self.name, len(data))
                            yield data
                            layer += 1
                    return
                except InDoubt:
                    blocks.check()  # Others lie there by now: that is no damage.
        except NotShared as error:
            self._note_refusal(error)
        yield from self._fallback.load(replace(order, first_layer=layer), deadline)

    def view(self, order: LoadOrder, deadline: Deadline, verify: Verify) -> View:
        with self._located(order, deadline, verify=verify == "once") as blocks:
            blocks.wait_for_layer(order.layer_count - 1)
            blocks.check()
            self._traffic.viewed(order.size_bytes)
            return View(blocks, None if verify == "once" else partial(self._have_verified, order))

    def _have_verified(self, order: LoadOrder, block: int, layer: int) -> None:
        """Make the daemon verify one slice, by loading it: it drops the block and raises where the slice is damaged."""
        first, counts = order.first_block + block, order.token_counts[block : block + 1]
        one = replace(order, first_block=first, token_counts=counts, first_layer=layer, into=None)
        with closing(iter(self._fallback.load(one, self._connection.deadline(None)))) as layers:  # type: ignore[type-var]
            next(layers, None)

    def _located(self, order: LoadOrder, deadline: Deadline, *, verify: bool = False) -> InPlace:
        """Raises NotShared where the blocks are not in place, or not for this client."""
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

    def _copied(self, blocks: InPlace, order: LoadOrder, deadline: Deadline) -> Generator[Bytes, None, None]:
        """Each layer's buffer, copied and verified; the next layer is on its way meanwhile. Raises InDoubt."""
        started: list[tuple[Bytes, Group]] = []
        next_layer = order.first_layer
        with self._copiers.begin() as batch:
            for layer in range(order.first_layer, order.layer_count):
                blocks.wait_for_layer(layer)
                until = min(layer + _LAYERS_AHEAD + 1, order.layer_count, blocks.layers_ready)
                while next_layer < until:
                    target = order.buffer(next_layer)
                    starts = order.block_starts(next_layer)
                    copy = partial(_copy_slice, blocks, starts, next_layer, target)
                    sizes = [end - start for start, end in pairwise(starts)]
                    started.append((target, batch.start(copy, sizes)))
                    next_layer += 1
                target, group = started.pop(0)
                batch.finish(group, deadline)
                blocks.check()
                yield target

    # Saving

    def save(self, order: SaveOrder, deadline: Deadline) -> pb.SaveBlocksResponse:
        try:
            return self._save(order, deadline)
        except (NotShared, NoWriterLock) as error:
            self._note_refusal(error)
        return self._fallback.save(order, deadline)

    def _save(self, order: SaveOrder, deadline: Deadline) -> pb.SaveBlocksResponse:
        limits = self._connection.limits(deadline)
        arena = self._arenas.get(limits)
        if not limits.arena_writable:
            raise NotShared("the daemon lets nobody write into its arena")
        client_id = order.header.client_id
        with self._writers.lock(arena.directory, client_id):
            target = arena.writable()
            reservation_id = secrets.randbits(63) | 1
            request = pb.ReserveBlocksRequest(header=order.header, reservation_id=reservation_id)
            try:
                reserved = self._call("ReserveBlocks", request, pb.ReserveBlocksResponse, deadline)
                if reserved.arena_id != arena.arena_id:
                    raise NotShared("the daemon has replaced its arena")
                sums = self._write(order, reserved, target, deadline)
                commit = pb.CommitBlocksRequest(
                    client_id=client_id, reservation_id=reservation_id, checksums=sums.astype("<u8").tobytes()
                )
                return self._call("CommitBlocks", commit, pb.SaveBlocksResponse, deadline)
            except BaseException:
                # Nothing is written any more. Nobody waits for a daemon that may not answer.
                self._given_up.add(pb.AbandonBlocksRequest(client_id=client_id, reservation_id=reservation_id))
                raise

    def _write(
        self, order: SaveOrder, reserved: pb.ReserveBlocksResponse, arena: Bytes, deadline: Deadline
    ) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        """Copy the reserved blocks to their places. The checksums of what was copied, ``[block, layer]``."""
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
        self._traffic.saved(self.name, size_bytes)
        return sums

    def _call(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M:
        return self._connection.channel.call(BLOCKS + method, request, answer, deadline)

    def _note_refusal(self, error: KVError) -> None:
        """Why the other transport is taken. Raises it where this one is insisted on, and the arena is not here."""
        self._traffic.refused(error.message)
        self._log.info("shared memory is not used: %s", error.message)
        if self._insists and not self._arenas.is_open:
            raise error


def _copy_slice(blocks: InPlace, starts: list[int], layer: int, target: Bytes, block: int) -> None:
    expected = blocks.expected(block, layer)
    source, runs = blocks.slice(block, layer), blocks.runs(block, layer)
    into = target[starts[block] : starts[block + 1]]
    found = copy_and_sum(source, into) if runs is None else copy_runs_and_sum(source, runs, into)
    if found != expected:
        raise InDoubt(f"layer {layer} of block {block}")


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


class _GivenUp:
    """Reservations that the daemon has still to hear the end of: until it does, nobody else can save their blocks.

    A thread says so, however long the daemon does not answer, unless the attachment ends before: that says it too.
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
            while not self._is_said(request):
                time.sleep(_ABANDON_PAUSE_S)  # Nobody waits for this thread.

    def _is_said(self, request: pb.AbandonBlocksRequest) -> bool:
        if not self._connection.life_line.is_attached_as(request.client_id):
            return True
        call = self._connection.channel.call
        try:
            call(BLOCKS + "AbandonBlocks", request, pb.AbandonBlocksResponse, Deadline(_ABANDON_S))
        except KVError as error:
            return not isinstance(error, (DaemonUnavailable, DeadlineExceeded))
        return True


class _Arenas:
    """The arena of the daemon at hand: mapped once, and once more where it was replaced."""

    def __init__(self) -> None:
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        """Begin unmapped: a child that never asks must not keep the memory of an arena that was replaced."""
        self._lock = threading.Lock()
        self._mapped: ArenaMap | None = None
        self._refusal: tuple[bytes, str] = (b"", "")

    @property
    def is_open(self) -> bool:
        return self._mapped is not None

    def get(self, limits: pb.GetCapabilitiesResponse) -> ArenaMap:
        """Raises NotShared where it cannot be mapped here. That is tried once an arena."""
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
    """This client's writer locks: one per attachment, held until it has ended and nothing is written under it.

    While a daemon sees the lock it sets the space aside that an attachment had reserved, also after a restart. So the
    lock is released as soon as the end of the attachment is noticed, or with the last save that runs then.
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
        """An attachment has begun or ended."""
        with self._lock:
            self._release_unused()

    def _release_unused(self) -> None:
        for client_id, (lock, users) in list(self._held.items()):
            if not users and (self._closed or not self._is_attached_as(client_id)):
                del self._held[client_id]
                lock.release()
