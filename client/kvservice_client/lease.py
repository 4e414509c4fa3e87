"""A lease on the stored part of a prefix: its blocks stay in their place until it ends, and can be loaded."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from kvservice_api import spans
from kvservice_api.errors import BlockNotFound, Cancelled, InvalidRequest, KVError, LeaseExpired
from kvservice_api.layout import LayerGroup, Layout, Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import arguments, forks
from kvservice_client.attach_stream import Attachment
from kvservice_client.buffers import Bytes, Slices, Source, is_plain, writable
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.device_memory import DeviceMemory, LoadPlace, WriteFence
from kvservice_client.retry import Deadline, TransferDeadline
from kvservice_client.transports.base import KnownPlaces, LoadOrder, OfferedLoad
from kvservice_client.transports.in_place import VERIFY, Verify, View, part_of
from kvservice_client.transports.ordered import OrderedTransports

# The time of a transfer beyond the client's timeout. Below this rate, recomputing is faster.
TRANSFER_BYTES_PER_S_MIN = 128 * 2**20
_RELEASE_S = 1.0
_REPORTS_MAX = 64  # The most that the daemon accepts.
_USE_MARGIN = 0.2  # The last part of a lease's time, not used for bytes in place: clocks differ in speed.


@dataclass(frozen=True, slots=True)
class ResidencyRun:
    """Consecutive blocks with copies in the same tiers."""

    count: int
    dram: bool
    ssd: bool


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """One layer of the loaded blocks: slice after slice, each `[K, V][head][token][dim]`."""

    index: int  # Counted from the shard's first layer.
    data: Bytes
    group: LayerGroup  # Its geometry.
    transport: str = ""  # By which it came: "shm", "bulk" or "grpc".


class Lease:
    """The answer of a lookup. A context manager: leaving it releases the lease.

    A lease ends when it is released, when its time is over, or with the client's attachment, so
    a restart of the daemon ends it too. `load` then raises LeaseExpired: look the prefix up again.
    It belongs to the process that made it: in a forked child it counts as ended, and in the parent it continues.
    """

    def __init__(
        self,
        connection: Connection,
        transports: OrderedTransports,
        layout: Layout,
        shard: Shard,
        token_counts: Sequence[int],
        attachment: Attachment,
        answer: pb.LookupPrefixResponse,
        asked_at_s: float,
    ) -> None:
        self._connection = connection
        self._transports = transports
        self._layout = layout
        self._shard = shard
        self._attachment = attachment
        self._lease_id = answer.lease_id
        self._ttl_s = answer.lease_ttl_ms / 1e3
        self._generation = forks.generation
        # Measured from before the request was sent, so it never ends later than the daemon's lease.
        self._end_s = asked_at_s + self._ttl_s
        self._transfers: WeakSet[TransferDeadline] = WeakSet()  # Of loads and views that are in use.
        self._lock = threading.Lock()
        self._is_cancelled = False
        self.trace: spans.TraceContext | None = None  # Of loads and views on threads that have none.
        self._places = answer.located if answer.HasField("located") else None
        self._are_verified = answer.located_verified
        self._offered = OfferedLoad(answer.offered_load, asked_at_s) if answer.HasField("offered_load") else None
        self._reports: list[pb.InPlaceLoad] = []  # For the daemon, with the release.
        self.token_counts = tuple(token_counts[: answer.hit_blocks])
        self.residency = [ResidencyRun(run.count, run.dram, run.ssd) for run in answer.runs]

    def __repr__(self) -> str:
        return f"Lease({self.hit_blocks} blocks of {self.hit_tokens} tokens, ends in {self.remaining_s:.1f} s)"

    @property
    def hit_blocks(self) -> int:
        """How many leading blocks of the prefix are stored."""
        return len(self.token_counts)

    @property
    def hit_tokens(self) -> int:
        return sum(self.token_counts)

    @property
    def remaining_s(self) -> float:
        """Seconds until the lease ends unless it is renewed; 0 once it has ended."""
        if not self._lease_id or not self._connection.attach_stream.is_current(self._attachment):
            return 0.0
        return max(0.0, self._end_s - self._connection.clock.now_s())

    def layer_bytes(self, first_block: int = 0, block_count: int | None = None, layer: int | None = None) -> int:
        """The size in bytes of one layer of these blocks: the size of a buffer for `load`.

        `layer` counts from the shard's first. It may be left out if all layers have one size; InvalidRequest is raised
        if they do not.
        """
        order = self._order(first_block, block_count)
        if layer is None:
            sizes = {order.block_starts(each)[-1] for each in range(order.layer_count)}
            if len(sizes) > 1:
                raise InvalidRequest("the layers of this layout differ in size: name the layer", field="layer")
            return sizes.pop()
        return order.block_starts(arguments.whole(layer, "layer", 0, order.layer_count - 1))[-1]

    def load(
        self,
        into: Sequence[Source] | None = None,
        first_block: int = 0,
        block_count: int | None = None,
        timeout_s: float | None = None,
        *,
        layer_timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        release: bool = False,
    ) -> Generator[LoadedLayer, None, None]:
        """The blocks' layers in order, each as soon as its last byte has arrived.

        `into` has one writable buffer per layer, filled in place; without it each layer gets a new
        array. `timeout_s` is for the whole load, with the time that the caller uses each layer; by default the client's
        timeout plus one second per 128 MiB. With `layer_timeout_s` instead, each `next` may take that long, and the
        time between two of them does not count. With `idle_timeout_s` too, a wait ends already when the daemon has sent
        nothing for that long, which means that it hangs. The daemon ends a load of which it could send nothing for
        `server.transfer_idle_s` (60 s).

        The lease is renewed meanwhile if needed. With `release` it ends with the last layer, which waits for no call.
        Raises LeaseExpired, ChecksumMismatch, StorageFailed,
        DaemonUnavailable, DeadlineExceeded, Cancelled (after `cancel`); layers that were yielded before are still
        right. Closing the generator ends the load, and the call on the daemon's side.
        """
        targets = None if into is None else list(arguments.sequence(into, "into"))
        order = self._order(first_block, block_count, targets)
        if targets is not None:
            self._make_writable(targets, order)
        deadline = self._deadline(order, timeout_s, layer_timeout_s, idle_timeout_s)
        layers = self._layers(order, deadline, release=release)
        trace = spans.current() or self.trace
        if trace is None:
            return layers
        return spans.steps(layers, trace, "kvservice.load", "kvservice.layer", _described, **_sizes(order))

    def view(
        self,
        first_block: int = 0,
        block_count: int | None = None,
        timeout_s: float | None = None,
        *,
        verify: Verify = "once",
        layer_timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
    ) -> View:
        """The blocks in the daemon's shared memory, read-only and without a copy; blocks on SSD are promoted first.

        By default waits for all layers, for at most `timeout_s`: the client's timeout plus one second per 128 MiB.
        With `layer_timeout_s` instead, returns as soon as the blocks are located. `slices` then waits for its layer, so
        that the caller uses the first layers while the next ones are promoted. Each of these waits may take that long;
        `timeout_s` is then the time for locating, by default the same. `idle_timeout_s` as in `load`: while blocks are
        promoted, the daemon reports the reads that end, at most 50 times per second. A disk that hangs looks like a
        daemon that hangs.
        The daemon keeps the blocks in their place until the view is left, so leave it as soon as possible.

        `verify` says when bytes are compared with their checksums. "once": the daemon verifies them once after its
        start, at the latest now; later damage to the memory is found only by `load` and by a scrub. "always": the view
        verifies each slice when `slices` first returns it. Choose it if the CPU reads the bytes in any case.

        A context manager. The view is valid for the first four fifths of the lease's time: renew the lease in time.
        Raises InvalidRequest for another `verify`, NotShared if the blocks cannot be read in place (then `load` them),
        LeaseExpired, ChecksumMismatch, StorageFailed, DaemonUnavailable, DeadlineExceeded, Cancelled (after `cancel`).
        """
        if verify not in VERIFY:
            raise InvalidRequest(f'verify is {verify!r}; it must be "once" or "always"', field="verify")
        order = self._order(first_block, block_count)
        locate_s = arguments.seconds(timeout_s, "timeout_s") if timeout_s is not None else None
        whole_s = None if layer_timeout_s is not None else timeout_s
        deadline = self._deadline(order, whole_s, layer_timeout_s, idle_timeout_s)
        trace = spans.current() or self.trace
        span = None if trace is None else spans.OpenSpan("kvservice.view", trace, "client", _sizes(order))
        try:
            with deadline.layer(locate_s), spans.within(None if span is None else span.context):
                self._keep(deadline)
                view = self._transports.view(order, deadline, verify)
        except BaseException as error:
            if span is not None:
                span.end(error)
            raise
        view.span = span
        return view

    def copy_to(
        self,
        memory: DeviceMemory,
        place: LoadPlace,
        fence: WriteFence,
        first_block: int,
        block_count: int,
        *,
        layer_timeout_s: float,
        idle_timeout_s: float,
    ) -> Generator[int, None, None]:
        """Have the daemon copy the blocks into GPU memory. Yields the number of each layer that is there, in order.

        Times as in `load`. Once it has ended, or is closed, or the fence has ended, nothing is written to the pages any
        more; not before. Raises as `load`;
        DeviceUnavailable, RegistrationEnded, NotShared, Overloaded if another transport must carry the layers that it
        has not yielded.
        """
        order = self._order(first_block, block_count)
        deadline = self._deadline(order, None, layer_timeout_s, idle_timeout_s)
        given = 0
        deadline.begin_layer()
        try:
            self._keep(deadline)
            with closing(memory.load(order, place, fence, deadline)) as counts:
                for count in counts:
                    if count == given:
                        continue
                    deadline.end_layer()
                    yield from range(given, count)
                    given = count
                    deadline.begin_layer()
                    with suppress(KVError):  # The daemon holds the blocks that it copies: the load needs no lease.
                        self._keep(deadline)
                    deadline.check_cancelled()
        finally:
            deadline.end_layer()

    def cancel(self) -> None:
        """End all running loads and views of this lease, and refuse later ones: they raise Cancelled.

        May be called from any thread, and does not block: a thread that waits for a layer continues at once, also if
        the daemon does not answer. The lease continues until it is released.
        """
        if self._is_inherited:
            return
        with self._lock:
            self._is_cancelled = True
            transfers = list(self._transfers)
        for each in transfers:
            each.cancel(_cancelled())

    def _deadline(
        self,
        order: LoadOrder,
        timeout_s: float | None,
        layer_timeout_s: float | None,
        idle_timeout_s: float | None,
    ) -> TransferDeadline:
        """The deadline of a new load or view, which `cancel` ends."""
        if idle_timeout_s is not None and layer_timeout_s is None:
            raise InvalidRequest("idle_timeout_s needs layer_timeout_s", field="idle_timeout_s")
        idle_s = None if idle_timeout_s is None else arguments.seconds(idle_timeout_s, "idle_timeout_s")
        if layer_timeout_s is not None and timeout_s is not None:
            raise InvalidRequest("timeout_s and layer_timeout_s exclude each other", field="layer_timeout_s")
        if layer_timeout_s is not None:
            seconds = arguments.seconds(layer_timeout_s, "layer_timeout_s")
        elif timeout_s is not None:
            seconds = timeout_s
        else:
            seconds = self._connection.timeout_s + order.size_bytes / TRANSFER_BYTES_PER_S_MIN
        deadline = self._connection.transfer_deadline(seconds, per_layer=layer_timeout_s is not None, idle_s=idle_s)
        if not self._is_inherited:
            with self._lock:
                self._transfers.add(deadline)
            if self._is_cancelled:
                deadline.cancel(_cancelled())
        return deadline

    def _order(self, first_block: int, block_count: int | None, into: Sequence[Any] | None = None) -> LoadOrder:
        if not self.hit_blocks:
            raise BlockNotFound("nothing of this prefix is stored")
        first_block = arguments.whole(first_block, "first_block")
        if block_count is not None:
            block_count = arguments.whole(block_count, "block_count")
        end = self.hit_blocks if block_count is None else first_block + block_count
        if not 0 <= first_block < end <= self.hit_blocks:
            raise InvalidRequest(f"blocks {first_block}..{end} are not within the {self.hit_blocks} that were hit")
        return LoadOrder(
            self._attachment.client_id,
            self._lease_id,
            first_block,
            into,
            self._layout,
            self._shard,
            self.token_counts[first_block:end],
            self._is_usable,
            places=None if self._places is None else self._known_places(self._places, first_block, end),
            offered=self._offered if end - first_block == self.hit_blocks else None,
        )

    def _known_places(self, all_places: pb.LocateBlocksResponse, first_block: int, end: int) -> KnownPlaces:
        def note_load(seconds: float) -> None:
            if len(self._reports) < _REPORTS_MAX:
                count, took_us = end - first_block, round(seconds * 1e6)
                self._reports.append(pb.InPlaceLoad(first_block=first_block, block_count=count, took_us=took_us))

        places = all_places if end - first_block == self.hit_blocks else part_of(all_places, first_block, end)
        return KnownPlaces(places, self._are_verified, note_load)

    def _make_writable(self, targets: list[Any], order: LoadOrder) -> None:
        """Replace the caller's buffers by their bytes. Raises InvalidRequest."""
        if len(targets) != order.layer_count:
            raise InvalidRequest(
                f"into has {len(targets)} buffers; it must have one per layer, {order.layer_count}", field="into"
            )
        for layer, each in enumerate(targets):
            if not is_plain(each, order.block_starts(layer)[-1]):
                slices = Slices.of(order.layout, order.shard, layer, order.token_counts)
                targets[layer] = writable(each, f"into[{layer}]", slices)

    def _is_usable(self) -> bool:
        """Whether bytes in place may still be used, by this client's own clock."""
        return bool(self._lease_id) and self._connection.clock.now_s() <= self._end_s - _USE_MARGIN * self._ttl_s

    def _layers(
        self, order: LoadOrder, deadline: TransferDeadline, *, release: bool
    ) -> Generator[LoadedLayer, None, None]:
        deadline.begin_layer()
        try:
            self._keep(deadline)
            with closing(self._transports.load(order, deadline)) as layers:
                for index, (transport, data) in enumerate(layers):
                    deadline.end_layer()
                    yield LoadedLayer(index, data, self._layout.group_of(self._shard.layer_begin + index), transport)
                    if self._is_inherited:
                        raise self._ended()
                    deadline.begin_layer()
                    if self._is_half_over:
                        with suppress(KVError):  # The daemon holds the blocks that it sends: the load needs no lease.
                            self._keep(deadline)
                        deadline.check_cancelled()
            if release:
                self._release_later()
        finally:
            deadline.end_layer()

    def renew(self, ttl_s: float | None = None, timeout_s: float | None = None) -> float:
        """Extend the lease to `ttl_s` from now, by default its previous ttl. Returns the granted seconds."""
        self._renew(
            self._ttl_s if ttl_s is None else arguments.seconds(ttl_s, "ttl_s"), self._connection.deadline(timeout_s)
        )
        return self._ttl_s

    def export(self, ttl_s: float = 30.0, adoptions: int = 1, timeout_s: float | None = None) -> bytes:
        """A ticket with which other clients of this daemon get leases of their own on these blocks.

        Pass it to `BlockCache.adopt` in other processes: `adoptions` times, within `ttl_s`; the daemon may grant a
        shorter time. Until then the ticket itself holds the blocks: this lease may be released, and this process may
        end. A process with the ticket can read the blocks, so treat it as a secret. Raises LeaseExpired, BlockNotFound
        if nothing was hit, InvalidRequest, Overloaded.
        """
        ttl_ms = min(max(1, round(arguments.seconds(ttl_s, "ttl_s") * 1e3)), 2**32 - 1)
        if not ttl_s:
            raise InvalidRequest("ttl_s is 0; a ticket must last for some time", field="ttl_s")
        adoptions = arguments.whole(adoptions, "adoptions", 1)
        if not self.hit_blocks:
            raise BlockNotFound("nothing of this prefix is stored")
        if not self.remaining_s:
            raise self._ended()
        request = pb.ExportLeaseRequest(
            client_id=self._attachment.client_id, lease_id=self._lease_id, ttl_ms=ttl_ms, adoptions=adoptions
        )
        deadline = self._connection.deadline(timeout_s)
        return self._transports.call("ExportLease", request, pb.ExportLeaseResponse, deadline).ticket

    def release(self, timeout_s: float | None = None) -> None:
        """End the lease. If the daemon does not answer, there is no error: the lease then ends at its time.

        Waits at most `timeout_s`, by default the client's, and never longer than a second. Raises InvalidRequest if
        `timeout_s` is not a duration.
        """
        if timeout_s is not None:
            arguments.seconds(timeout_s, "timeout_s")
        if self.remaining_s:
            wait_s = min(_RELEASE_S, self._connection.timeout_s if timeout_s is None else timeout_s)
            self._send_release(self._release_request(), wait_s)
        self._lease_id = 0

    def _release_request(self) -> pb.ReleaseLeaseRequest:
        client_id = self._attachment.client_id
        return pb.ReleaseLeaseRequest(client_id=client_id, lease_id=self._lease_id, loads=self._reports)

    def _send_release(self, request: pb.ReleaseLeaseRequest, timeout_s: float) -> None:
        deadline = self._connection.deadline(timeout_s)
        with suppress(KVError):
            self._transports.call("ReleaseLease", request, pb.ReleaseLeaseResponse, deadline)

    def _release_later(self) -> None:
        """End the lease for this client now, and at the daemon without a wait for its answer."""
        if self.remaining_s:
            request = self._release_request()
            self._connection.background.submit(lambda: self._send_release(request, _RELEASE_S))
        self._lease_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def _is_inherited(self) -> bool:
        """Whether the lease belongs to a parent of this process, from before a fork."""
        return self._generation != forks.generation

    def _ended(self) -> LeaseExpired:
        if self._is_inherited:
            return LeaseExpired("the lease was made before fork() and is the parent's; look the prefix up again here")
        return LeaseExpired("the lease has ended; look the prefix up again")

    @property
    def _is_half_over(self) -> bool:
        """Whether `_keep` may have to renew the lease. Asked for each layer."""
        return self._connection.clock.now_s() > self._end_s - self._ttl_s / 2

    def _keep(self, deadline: TransferDeadline) -> None:
        """Renew the lease if less than half of its time is left and the transfer may take longer."""
        remaining_s = self.remaining_s
        if not remaining_s:
            raise self._ended()
        half_s = self._ttl_s / 2
        needed_s = half_s if deadline.is_per_layer else deadline.remaining_s + _USE_MARGIN * self._ttl_s
        if remaining_s < min(half_s, needed_s):
            self._renew(self._ttl_s, deadline)

    def _renew(self, ttl_s: float, deadline: Deadline) -> None:
        if not self.remaining_s:
            raise self._ended()
        asked_at_s = self._connection.clock.now_s()
        request = pb.RenewLeaseRequest(
            client_id=self._attachment.client_id, lease_id=self._lease_id, ttl_ms=max(1, round(ttl_s * 1e3))
        )
        # As a stream of one answer, because a stream ends when its load is cancelled.
        renewing = self._connection.channel.stream(BLOCKS + "RenewLease", request, pb.RenewLeaseResponse, deadline)
        with closing(renewing):
            answer = next(renewing)
        self._ttl_s = answer.ttl_ms / 1e3
        self._end_s = asked_at_s + self._ttl_s


def _sizes(order: LoadOrder) -> dict[str, object]:
    """The attributes of a span."""
    return {"blocks": order.block_count, "layers": order.layer_count, "bytes": order.size_bytes}


def _described(layer: LoadedLayer) -> dict[str, object]:
    return {"layer": layer.index, "bytes": layer.data.nbytes}


def _cancelled() -> Cancelled:
    return Cancelled("the loads and views of this lease were cancelled")
