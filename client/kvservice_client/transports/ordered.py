"""The transports of one client, in the order in which they are tried: one loop of fallbacks, and one meter.

To add a transport, write a class beside the others and list it in `TRANSPORTS`.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from kvservice_api import spans
from kvservice_api.errors import BulkUnavailable, KVError, NotShared
from kvservice_client import forks
from kvservice_client.arena_map import ArenaObserver
from kvservice_client.buffers import Bytes
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import Deadline, TransferDeadline
from kvservice_client.transports.base import (
    NOT_OFFERED,
    TRY_NEXT,
    LoadOrder,
    Mismatch,
    OfferRefused,
    SaveOrder,
    SaveResult,
    SaveSet,
    Transport,
)
from kvservice_client.transports.bulk import BulkTransport
from kvservice_client.transports.grpc import GrpcTransport
from kvservice_client.transports.in_place import InPlaceReader, Verify, View
from kvservice_client.transports.reservation import InPlaceWriter, Reservation
from kvservice_client.transports.shm import ShmTransport
from kvservice_client.transports.throttle import Throttle

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

# The fastest first. The last carries every order.
TRANSPORTS: tuple[Callable[[Connection], Transport], ...] = (ShmTransport, BulkTransport, GrpcTransport)


@dataclass(frozen=True, slots=True)
class TransportStats:
    """What one transport did since the client was made.

    Bytes are payload; those of a load count when it ends. Operations are those that it completed. Seconds are its
    working time, without the caller's time between two layers, or between the reservation of a save in place and its
    commit. `fallbacks` are the operations that it could not carry, completely or in part, so that the next transport
    did. `mismatches` are the loads and views whose bytes, in place or received, did not match their checksums. They are
    not fallbacks, although the daemon then verifies the bytes through the next transport.
    """

    loads: int = 0
    saves: int = 0
    views: int = 0
    loaded_bytes: int = 0
    saved_bytes: int = 0
    viewed_bytes: int = 0
    load_seconds: float = 0.0
    save_seconds: float = 0.0
    fallbacks: int = 0
    mismatches: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Payload bytes since the client was made, by transport: "cuda_ipc", "shm", "bulk", "grpc".

    Views are read in place. A forked child counts from zero.

    `shm_refused_because` is the last reason why shared memory was not used; empty if it was always used, or not
    requested. `bulk_refused_because` is the same for the bulk port, and `cuda_ipc_refused_because` for copies that the
    daemon makes to and from GPU memory.
    `transports` has all counts, for each transport that was tried.
    """

    loaded_bytes: Mapping[str, int]
    saved_bytes: Mapping[str, int]
    viewed_bytes: int
    shm_refused_because: str
    transports: Mapping[str, TransportStats] = field(default_factory=dict)
    cuda_ipc_refused_because: str = ""
    bulk_refused_because: str = ""


class Meter:
    """Counts for all transports alike. Thread-safe. A forked child counts from zero."""

    def __init__(self) -> None:
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.RLock()  # Re-entrant: the garbage collector may end an abandoned load at any place.
        self._counts: defaultdict[str, dict[str, Any]] = defaultdict(dict)  # By transport, then by field.
        self._refused_because: dict[str, str] = {}

    def add(self, transport: str, **counts: float) -> None:
        """Add to fields of the transport's `TransportStats`."""
        with self._lock:
            sums = self._counts[transport]
            for name, count in counts.items():
                sums[name] = sums.get(name, 0) + count

    def fell_back(self, transport: str, why: str) -> None:
        self.add(transport, fallbacks=1)
        self._refused_because[transport] = why

    def stats(self) -> Stats:
        with self._lock:
            counts = {name: TransportStats(**sums) for name, sums in self._counts.items()}
        return Stats(
            {name: count.loaded_bytes for name, count in counts.items() if count.loaded_bytes},
            {name: count.saved_bytes for name, count in counts.items() if count.saves},
            sum(count.viewed_bytes for count in counts.values()),
            self._refused_because.get("shm", ""),
            counts,
            self._refused_because.get("cuda_ipc", ""),
            self._refused_because.get("bulk", ""),
        )


class OrderedTransports:
    """Carries each order by the first transport that both sides offer and that can carry it. Thread-safe."""

    def __init__(self, connection: Connection, wanted: str = "auto", bytes_per_s: float = 0.0) -> None:
        """`wanted` names the transport that must be offered, or is "auto". `bytes_per_s` > 0 limits all transports."""
        made = [make(connection) for make in TRANSPORTS]
        self._required, self._made = wanted, made
        self._transports = [each for each in made if wanted in ("auto", each.name) or each is made[-1]]
        for each in self._transports:
            if each.name == wanted:
                each.bytes_min = 0
        # Slow checks, once.
        self._readers = [each for each in self._transports if isinstance(each, InPlaceReader)]
        self._bulk = next((each for each in self._transports if isinstance(each, BulkTransport)), None)
        # Calls go there too where shared memory carries all bytes.
        bulk = next((each for each in made if isinstance(each, BulkTransport)), None)
        self._calls = bulk.calls if bulk is not None and wanted != made[-1].name else None
        self._connection = connection
        self.meter = Meter()
        self._log = RateLimitedLog(log)
        self._now_s = connection.clock.now_s
        self._down = Throttle(bytes_per_s) if bytes_per_s else None
        self._up = Throttle(bytes_per_s) if bytes_per_s else None
        self.stats = self.meter.stats

    def close(self) -> None:
        for transport in self._made:
            transport.close()

    def check_bulk(self, deadline: Deadline) -> None:
        """Raises BulkUnavailable if the bulk port cannot be reached, or is not for this client."""
        if self._bulk is None:
            raise BulkUnavailable(f"this client does not use the bulk port: its transport is {self._required!r}")
        self._bulk.check_reachable(deadline)

    def observe_arenas(self, observer: ArenaObserver) -> None:
        """Have it follow the mappings of the daemon's memory, from now on."""
        for transport in self._readers:
            transport.observe_arenas(observer)

    @property
    def read_in_place(self) -> bool:
        """Whether a load would read the daemon's memory in place if it knew where the blocks are."""
        return any(each.is_mapped for each in self._readers)

    def offered_connections(self, size_bytes: int, deadline: Deadline) -> int:
        """How many connections of the bulk port a load of so many bytes would use; 0 if another transport is likely to
        carry it. Makes no call.
        """
        if self._bulk is None or self.read_in_place:
            return 0
        return self._bulk.offered_connections(size_bytes, deadline)

    def call(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M:
        """A call of `kvservice_api.bulk.CALLS`, on an idle connection of the bulk port if there is one: it costs less
        there. It may run twice. Calls of a trace go over gRPC, which carries its context. Raises as `Channel.call`.
        """
        found = None
        if self._calls is not None and spans.current() is None:
            found = self._calls.call(method, request, answer, deadline)
        return self._connection.channel.call(BLOCKS + method, request, answer, deadline) if found is None else found

    def prepare(self, deadline: Deadline) -> None:
        """Do what a transport's first order would have to wait for."""
        for transport in self._transports:
            with suppress(*NOT_OFFERED):
                transport.check_offered(deadline)

    def load(self, order: LoadOrder, deadline: Deadline) -> Generator[tuple[str, Bytes], None, None]:
        """The transport's name and the buffer of each layer, in order, as soon as its last byte has arrived.

        Closing the generator ends the load.
        """
        waiting, generation = deque(self._transports), forks.generation
        while waiting:
            transport = waiting.popleft()
            if not self._carries(transport, order, deadline):
                continue
            layers = transport.load(order, deadline)
            layer, size_bytes, seconds = order.first_layer, 0, 0.0
            try:
                while True:
                    begin_s = self._now_s()
                    data = next(layers, None)
                    if data is None:
                        break
                    size_bytes += data.size
                    seconds += self._now_s() - begin_s
                    if self._down is not None:
                        self._down.carry(data.size, begin_s, deadline)
                    yield transport.name, data
                    layer += 1
            except OfferRefused:
                waiting.appendleft(transport)
                order = replace(order, first_layer=layer, offered=None)
                continue
            except TRY_NEXT as error:
                self._fall_back(transport, error)
                order = replace(order, first_layer=layer)
                continue
            finally:
                layers.close()
                if size_bytes and generation == forks.generation:  # A forked child ends a load that is its parent's.
                    self.meter.add(transport.name, loaded_bytes=size_bytes, load_seconds=seconds)
            self.meter.add(transport.name, loads=1)
            return

    def save(self, order: SaveOrder, deadline: Deadline) -> list[SaveResult]:
        """Send the blocks that are not stored yet, and commit: the result of each chain. The buffers may change once
        this has returned.
        """
        for transport in self._transports:
            if not self._carries(transport, order, deadline):
                continue
            begin_s = self._now_s()
            try:
                results, sent_bytes = transport.save(order, deadline)
            except TRY_NEXT as error:
                self._fall_back(transport, error)
                continue
            self.meter.add(transport.name, saves=1, saved_bytes=sent_bytes, save_seconds=self._now_s() - begin_s)
            if self._up is not None:
                self._up.carry(order.size_bytes, begin_s, deadline)
            return results
        raise AssertionError("the last transport carries every order")

    def reserve(self, saved: SaveSet, deadline: Deadline) -> Reservation:
        """Space for the blocks, in place, by the first transport that supports it. Raises NotShared, NoWriterLock."""
        if self._up is not None:
            raise NotShared("a save in place moves no bytes that could be slowed down: save the blocks")
        for transport in self._transports:
            if isinstance(transport, InPlaceWriter):
                transport.check_offered(deadline)
                begin_s = self._now_s()
                reservation = transport.reserve(saved, deadline)
                reserving_s = self._now_s() - begin_s
                reservation.on_commit = partial(self._committed, transport, reservation.size_bytes, reserving_s)
                return reservation
        raise NotShared("no transport of this client writes blocks in place: save the blocks")

    def view(self, order: LoadOrder, deadline: TransferDeadline, verify: Verify) -> View:
        """The blocks in place, without a copy, by the first transport that supports it. Raises NotShared.

        "once": the daemon verifies bytes that it has not verified since its start. "always": the view verifies each
        slice before it returns it.
        """
        if self._down is not None:
            raise NotShared("a view moves no bytes that could be slowed down: load the blocks")
        for transport in self._transports:
            if isinstance(transport, InPlaceReader):
                have_verified = partial(self._have_verified, transport, order, deadline) if verify == "always" else None
                transport.check_offered(deadline)
                view = transport.view(order, deadline, have_verified)
                self.meter.add(transport.name, views=1, viewed_bytes=order.size_bytes)
                return view
        raise NotShared("no transport of this client reads blocks in place: load the blocks")

    def _carries(self, transport: Transport, order: LoadOrder | SaveOrder, deadline: Deadline) -> bool:
        """Whether it is offered, and worth it. Raises as `_is_offered`."""
        is_small = transport.bytes_min and order.size_bytes < transport.bytes_min
        return not is_small and self._is_offered(transport, deadline)

    def _is_offered(self, transport: Transport, deadline: Deadline) -> bool:
        """Raises an error of `NOT_OFFERED` if this transport is required and is not offered."""
        try:
            transport.check_offered(deadline)
        except NOT_OFFERED as error:
            self._fall_back(transport, error)
            if transport.name == self._required:
                raise
            return False
        return True

    def _fall_back(self, transport: Transport, error: Exception) -> None:
        """Count a fallback. Raises the error if there is no next transport, or none is allowed."""
        is_required = transport.name == self._required and isinstance(error, BulkUnavailable)
        if transport is self._transports[-1] or is_required:
            raise error
        why = error.message if isinstance(error, KVError) else str(error)
        if isinstance(error, Mismatch):
            self.meter.add(transport.name, mismatches=1)
            self._log.warning("bytes read by %s are requested from the daemon instead: %s", transport.name, why)
            return
        self.meter.fell_back(transport.name, why)
        self._log.info("%s is not used: %s", transport.name, why)

    def _committed(self, transport: Transport, size_bytes: int, reserving_s: float, committing_s: float) -> None:
        """Count a save that the caller wrote in place."""
        self.meter.add(transport.name, saves=1, saved_bytes=size_bytes, save_seconds=reserving_s + committing_s)

    def _have_verified(
        self, transport: Transport, order: LoadOrder, deadline: TransferDeadline, block: int, layer: int
    ) -> None:
        """Make the daemon verify one slice, by loading it. For a damaged slice it drops the block and raises.

        Waits as long as the view waits for a layer, or as long as a call may take.
        """
        self.meter.add(transport.name, mismatches=1)
        first, counts = order.first_block + block, order.token_counts[block : block + 1]
        one = replace(order, first_block=first, token_counts=counts, first_layer=layer, into=None)
        wait = deadline if deadline.is_per_layer else self._connection.deadline(None)
        with deadline.layer(), closing(self._transports[-1].load(one, wait)) as layers:
            data = next(layers, None)
            if data is not None:
                self.meter.add(self._transports[-1].name, loaded_bytes=data.size)
