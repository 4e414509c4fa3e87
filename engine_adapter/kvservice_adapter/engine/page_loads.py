"""Loads of a leased prefix into an engine's pages, by a ticket that its scheduler has got.

Where the daemon can, it copies blocks into the pages itself. Otherwise, on the daemon's host, blocks are copied from
shared memory straight into the pages, each slice verified before it is copied, unless the device reads it by DMA.
Elsewhere the client loads them, and the device copies them from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import ArrayView
from kvservice_adapter.device.base import Computed, Event, NotOrdered, Pages, Slices, Stream, StreamClosed
from kvservice_adapter.engine.device_copies import NEXT_TRANSPORT, Copied, copied_layers
from kvservice_adapter.layer_source import COPIED_S, BegunLayer, PagesOfLayer
from kvservice_api import spans
from kvservice_api.errors import (
    BlockNotFound,
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    LeaseExpired,
    NotShared,
    StorageFailed,
)
from kvservice_client import BlockCache, Clock, Lease
from kvservice_client.device_memory import NAME, DeviceMemory, PageIds, WriteFence
from kvservice_client.transports.in_place import SliceMismatch, Verify

_COMPUTED_S = 0.005


@dataclass(frozen=True, slots=True)
class PagedLayers:
    """An engine's paged KV cache: for each layer of the shard its keys and values, ``[page, kv head, token, dim]``."""

    keys: Sequence[ArrayView]
    values: Sequence[ArrayView]
    dtypes: Sequence[str]  # The names of the layers' element types in their layout.
    groups: Sequence[int]  # Of each layer: layers of one group have the same tokens in pages of the same numbers.

    def pages(
        self, layer: int, page_ids: PageIds, first_token: int = 0, copied: tuple[int, int] | None = None
    ) -> Pages:
        """Tokens of one sequence: `Pages`."""
        of_group = page_ids[self.groups[layer]]
        return Pages(self.keys[layer], self.values[layer], of_group, first_token, self.dtypes[layer], copied)

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers, as it is stored."""
        no_pages: PageIds = [()] * (max(self.groups) + 1)
        return sum(self.pages(layer, no_pages).token_bytes for layer in range(len(self.keys)))


class AnswerWait:
    """How long a step waits for a daemon that does not answer: from its first call on, and again after each answer.

    The loads of one step share it. Any thread may call it.
    """

    def __init__(self, allowed_s: float, clock: Clock, *, used_s: float = 0.0) -> None:
        """Of the first wait, `used_s` have passed."""
        self.allowed_s = allowed_s
        self._clock = clock
        self._end_s = clock.now_s() + allowed_s - used_s

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._end_s - self._clock.now_s())

    def restart(self) -> None:
        """The daemon has answered, or was not asked until now."""
        self._end_s = self._clock.now_s() + self.allowed_s


class Waits(NamedTuple):
    """How long a load waits for the daemon, in seconds."""

    answer: AnswerWait  # For the lease, and for the place of its blocks.
    layer_s: float  # For each layer.
    idle_s: float  # For each layer while the daemon sends nothing.


class PrefixLoad:
    """The load of tokens ``[first_token, end_token)`` of a ticket's prefix. A `LayerSource`, for one use.

    Only these tokens are written; others in the same pages stay as they are.
    """

    def __init__(
        self,
        stream: Stream,
        blocks: BlockCache,
        ticket: bytes,
        tokens: tuple[int, int],
        waits: Waits,
        release: Callable[[Lease], None],
        trace: spans.TraceContext | None = None,
        *,
        verify: Verify = "always",
        memory: DeviceMemory | None = None,
    ) -> None:
        """`release` ends a lease, and may do so later, on another thread. `trace` is that of the request. `verify` is
        for blocks in shared memory: "once" where the device reads them by DMA, else "always". `memory` are the pages,
        if the daemon may open them.
        """
        self._verify = verify
        self._memory = memory
        self._computed: Computed | None = None
        self._not_ordered: NotOrdered | None = None
        self._stream = stream
        self._blocks = blocks
        self._ticket = ticket
        self._tokens = tokens
        self.waits = waits
        self._release = release
        self._trace = trace
        self._events: list[Event] = []
        self._fences: list[WriteFence] = []  # Of copies that the daemon makes.
        self._lease: Lease | None = None
        self._is_cancelled = False
        self._copies = threading.Lock()  # Of the events: no copy begins after `stop`.
        self.size_bytes = 0  # Of the layers begun so far.
        # By which they come: "cuda_ipc", "shm", "bulk", "grpc"; "cuda_ipc+shm" if the first could not carry all.
        self.transport = ""
        self.valid_tokens = 0  # After an error: how many tokens of the prefix, from its first on, are in the pages.

    def after(self, computed: Computed) -> None:
        """As `LayerSource.after`; that it cannot be ordered is raised by `begin`."""
        self._computed = computed
        try:
            self._stream.after(computed)
        except NotOrdered as error:
            self._not_ordered = error

    def pages_of_layer(
        self, layers: PagedLayers, page_ids: PageIds, begins: Sequence[int] | None = None
    ) -> PagesOfLayer:
        """Where the tokens go. With `begins` only those from a token on are written, per group of layers."""
        begin, end = self._tokens
        first = self._first_block * self._blocks.layout.block_tokens

        def pages(layer: int) -> Pages:
            from_token = begin if begins is None else begins[layers.groups[layer]]
            return layers.pages(layer, page_ids, first, (from_token - first, end - first))

        return pages

    def cancel(self) -> None:
        """End the load soon: the iterator raises Cancelled. From any thread; does not wait."""
        self._is_cancelled = True
        if self._lease is not None:
            self._lease.cancel()

    def stop(self) -> None:
        """`cancel`, and wait until nothing more is written to the pages; not for the daemon. From any thread."""
        stop_all([self])

    @property
    def is_leased(self) -> bool:
        """Whether the daemon has answered."""
        return self._lease is not None

    @property
    def _first_block(self) -> int:
        return self._tokens[0] // self._blocks.layout.block_tokens

    def begin(self, pages_of_layer: PagesOfLayer) -> Iterator[BegunLayer]:
        """As `LayerSource.begin`, on any thread. `next` may also be called before the event before it is done.

        After the last layer the iterator waits for all copies, and raises the error of the first that has one.
        If one block is damaged, was removed, or cannot be read, those before it are loaded to the end: `valid_tokens`.
        Raises ValueError for pages of another geometry.
        """
        if self._not_ordered is not None:
            raise self._not_ordered
        answer = self.waits.answer
        with spans.within(self._trace):
            lease = self._lease = self._blocks.adopt(self._ticket, timeout_s=answer.remaining_s)
        answer.restart()
        if self._is_cancelled:
            lease.cancel()
        try:
            starts = [0, *accumulate(lease.token_counts)]
            if starts[-1] < self._tokens[1]:
                raise BlockNotFound(f"the lease covers {starts[-1]} tokens; {self._tokens[1]} are to be loaded")
            end_block = next(block for block, start in enumerate(starts) if start >= self._tokens[1])
            given = 0
            try:
                with closing(self._all_layers(lease, end_block, pages_of_layer)) as layers:
                    for begun in layers:
                        yield begun
                        given += 1
            except (ChecksumMismatch, StorageFailed, LeaseExpired) as error:
                bad_block = int(error.details.get("block", 0))
                if bad_block <= self._first_block:
                    raise
                answer.restart()
                with closing(self._all_layers(lease, bad_block, pages_of_layer)) as layers:
                    for layer, begun in enumerate(layers):
                        if given <= layer < self._blocks.shard.layers - 1:
                            yield begun
                self.valid_tokens = starts[bad_block]
                raise
        finally:
            for event in self._events:  # After an error too, nothing is written to the pages any more.
                event.wait(COPIED_S)
            self._release(lease)

    def _all_layers(
        self, lease: Lease, end_block: int, pages_of_layer: PagesOfLayer
    ) -> Generator[BegunLayer, None, None]:
        """Copy the blocks before `end_block`, by the first transport that can, and the rest by the next one."""
        self.transport, given = "", 0
        if self._memory is not None and self._memory.is_ready and self._is_computed:
            try:
                with closing(self._by_daemon(self._memory, lease, end_block, pages_of_layer)) as copied:
                    for begun in copied:
                        yield begun
                        given += 1
                return
            except NEXT_TRANSPORT as error:
                self._memory.fell_back(error)
                self.waits.answer.restart()
        with closing(self._by_host(lease, end_block, pages_of_layer, given)) as begun_layers:
            yield from begun_layers

    @property
    def _is_computed(self) -> bool:
        """Whether the engine has computed what it was given before, or will at once. If not, copies of our own follow
        that on the GPU, and the engine's thread, whose wait for a layer is bounded, has not to wait for it.
        """
        return self._computed is None or self._computed.wait(_COMPUTED_S)

    def _by_daemon(
        self, memory: DeviceMemory, lease: Lease, end_block: int, pages_of_layer: PagesOfLayer
    ) -> Generator[BegunLayer, None, None]:
        """Have the daemon copy the blocks into the pages. Raises errors of `NEXT_TRANSPORT` too."""
        with self._copies:
            if self._is_cancelled:
                raise Cancelled("the load was cancelled")
            fence = memory.fence()
            self._fences.append(fence)
        blocks = range(self._first_block, end_block)
        tokens = sum(lease.token_counts[blocks.start : blocks.stop])
        answer, layer_s, idle_s = self.waits
        try:
            copied = copied_layers(memory, fence, lease, blocks, pages_of_layer, layer_s=layer_s, idle_s=idle_s)
            with closing(copied):
                for layer in copied:
                    self.transport = NAME
                    answer.restart()
                    pages = pages_of_layer(layer)
                    size_bytes = tokens * pages.token_bytes
                    self.size_bytes += size_bytes
                    yield BegunLayer(pages, Copied(), size_bytes)
        finally:
            fence.end()

    def _used(self, transport: str) -> None:
        if transport != self.transport.rpartition("+")[2]:
            self.transport = f"{self.transport}+{transport}" if self.transport else transport

    def _by_host(
        self, lease: Lease, end_block: int, pages_of_layer: PagesOfLayer, first_layer: int
    ) -> Generator[BegunLayer, None, None]:
        """Copy the layers of the blocks from `first_layer` on, from shared memory or from what the client loads."""
        first, layers = self._first_block, self._blocks.shard.layers
        count = end_block - first
        token_counts = lease.token_counts[first:end_block]
        answer, layer_s, idle_s = self.waits
        events = list[Event]()
        try:
            view = lease.view(
                first, count, answer.remaining_s, verify=self._verify, layer_timeout_s=layer_s, idle_timeout_s=idle_s
            )
            self._used("shm")
        except NotShared:
            loaded = lease.load(first_block=first, block_count=count, layer_timeout_s=layer_s, idle_timeout_s=idle_s)
            with closing(loaded):
                for each in loaded:
                    answer.restart()
                    if each.index < first_layer:
                        continue
                    self._used(each.transport)
                    begun = self._copy(each.index, each.data, token_counts, pages_of_layer)
                    events.append(begun.event)
                    yield begun
            _finish(events)
            return
        with view:
            try:
                for layer in range(first_layer, layers):
                    verify = None
                    if self._stream.sums_slices:
                        slices, verify = view.slices_to_verify(layer)
                    else:
                        slices = view.slices(layer)
                    answer.restart()
                    begun = self._copy(layer, slices, token_counts, pages_of_layer, view.check, verify)
                    events.append(begun.event)
                    if verify is not None:  # The engine may cancel the lease for the error: that is reported before.
                        _finish([begun.event])
                    yield begun
                _finish(events)
            except SliceMismatch as damaged:
                view.report(damaged)
            finally:
                for event in events:  # While they read the blocks, the daemon holds them.
                    event.wait(COPIED_S)

    def _copy(
        self,
        layer: int,
        slices: Slices,
        token_counts: Sequence[int],
        pages_of_layer: PagesOfLayer,
        check: Callable[[], None] | None = None,
        verify: Callable[[NDArray[np.uint64]], None] | None = None,
    ) -> BegunLayer:
        pages = pages_of_layer(layer)
        pages.check(self._blocks.layout.group_of(self._blocks.shard.layer_begin + layer))
        with self._copies:
            if self._is_cancelled:
                raise Cancelled("the load was cancelled")
            event = self._stream.scatter(slices, token_counts, pages, then=check, verify=verify)
            self._events.append(event)
        size_bytes = sum(token_counts) * pages.token_bytes
        self.size_bytes += size_bytes
        return BegunLayer(pages, event, size_bytes)


def _finish(events: Sequence[Event]) -> None:
    """Wait until everything is copied. Raises what a copy raised."""
    for event in events:
        if not event.wait(COPIED_S):
            raise DeadlineExceeded("the copies into the engine's pages are not done in time")
        if event.error is not None:
            raise event.error


def stop_all(loads: Sequence[PrefixLoad]) -> None:
    """`PrefixLoad.stop` of each, in the time of one. They are of one engine."""
    fences, events = list[WriteFence](), list[Event]()
    for load in loads:
        load.cancel()
        with load._copies:
            fences += load._fences
            events += load._events
    WriteFence.end_all(fences)
    for event in events:
        event.wait(COPIED_S)


def release_on(stream: Stream) -> Callable[[Lease], None]:
    """Ends leases on a stream's thread, so that the engine does not wait for the daemon's answer."""

    def release(lease: Lease) -> None:
        with suppress(StreamClosed):
            stream.submit(lease.release)

    return release
