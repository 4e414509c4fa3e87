"""The load path: leased blocks are sent layer by layer, and each slice is verified before any byte of it is sent.

The tier of a block decides only from where its slices are read: from DRAM; from DRAM during a promotion; or from SSD if
DRAM has no space (one layer at a time, through scratch memory).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np

from kvservice.blocks import Extent, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.leases import Lease
from kvservice.store.mover.promoter import PendingPromotion, Promoter
from kvservice.store.tasks import LoopBudget, all_of
from kvservice.store.transfers.coverage import HeadRun, cover
from kvservice.store.transfers.load_times import LoadTimes
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import ended, on_thread
from kvservice_api.errors import ChecksumMismatch, InvalidRequest, KVError, LeaseExpired, Overloaded, StorageFailed
from kvservice_api.image import PAGE_BYTES, BlockGeometry, Trailer, checksum
from kvservice_api.layout import Layout, Shard

T = TypeVar("T")

_SCRATCH_BYTES = 256 << 20
_SCRATCH_WAIT_S = 5.0

_ROWS_A_TURN = 256  # They take a millisecond of the event loop.


@dataclass(frozen=True, slots=True)
class Span:
    """`count` items from `first` on; a count of 0 means all later ones."""

    first: int = 0
    count: int = 0

    def within(self, end: int, what: str) -> range:
        """As a range of a lease's `end` items. Raises InvalidRequest if it is empty or beyond the end."""
        last = self.first + self.count if self.count else end
        if not self.first < last <= end:
            raise InvalidRequest(f"{what}s {self.first}..{last} are not in the lease's {end}", field=f"first_{what}")
        return range(self.first, last)


@dataclass(frozen=True, slots=True)
class LayerSlice:
    """One layer of one stored object, in memory."""

    row: int
    layer: int  # Counted from the stored shard's first.
    data: memoryview
    expected: int | None  # Its checksum; None if it was verified when it was read.


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one layer, at most as many as fit into one frame."""

    layer: int
    first_block: int
    first_offset_bytes: int
    runs: list[memoryview]
    unverified: list[LayerSlice]


@dataclass(slots=True)
class _Source:
    """The source of one row's slices, during a load."""

    row: int
    generation: int  # The row's generation, to detect that it has another block.
    shard: Shard
    geometry: BlockGeometry
    image: memoryview | None  # In DRAM, or being promoted; None if the slices are read from SSD.
    trailer: Trailer | None = None
    pending: PendingPromotion | None = None
    tier: TierName | None = None  # From which the slices are read, if not from memory.
    extent: Extent | None = None  # Its place in that tier.

    @property
    def is_at_hand(self) -> bool:
        """Whether all of it is in DRAM."""
        return self.image is not None and self.pending is None


class Reads:
    """All running loads. `slots` bounds how many frames are joined at a time, over all clients."""

    def __init__(
        self,
        lifecycle: BlockLifecycle,
        dram: DramTier,
        promoter: Promoter | None,
        clock: Clock,
        counters: Counters,
        executor: Executor,
        loop_budget: LoopBudget,
        *,
        slots: int,
        frame_bytes: int,
    ) -> None:
        self.lifecycle = lifecycle
        self.dram = dram
        self.promoter = promoter
        self.clock = clock
        self.counters = counters
        self.executor = executor
        self.loop_budget = loop_budget
        self.slots = asyncio.Semaphore(slots)
        self.frame_bytes = frame_bytes
        self.scratch = _ScratchBudget(clock, _SCRATCH_BYTES, _SCRATCH_WAIT_S)

    async def run(
        self, caller: Caller, lease: Lease, blocks: range, layers: range, encode: Callable[[Part], T]
    ) -> AsyncGenerator[T, None]:
        """Every frame of a load, in order. `encode` runs on a thread, after the frame's slices are verified.

        Raises ChecksumMismatch or StorageFailed, with the block's position in the lease as the detail `block`; frames
        that were yielded before are right.
        """
        read = _Read(self, lease, blocks)
        rows = np.array(read.rows, np.int64)
        times = LoadTimes(self.lifecycle.blocks, lease, blocks, rows, self.clock, self.counters, "stream")
        self.lifecycle.hold(read.rows)
        try:
            await read.open()
            ready: asyncio.Future[T] | None  # One frame is sent while the next one, `waiting`, is joined.
            waiting: asyncio.Future[T] | None = None
            parts: asyncio.Future[list[Part]] | None = None
            try:
                for layer in layers:
                    times.layer_begins(layer)
                    parts = asyncio.ensure_future(read.parts(layer))
                    if waiting is not None:
                        both: list[asyncio.Future[Any]] = [parts, waiting]
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                        if not parts.done():
                            ready, waiting = waiting, None
                            yield await ready  # It does not wait for a layer that is still being read.
                    cut = await parts
                    times.layers_ready(layer + 1)
                    for part in cut:
                        following = asyncio.ensure_future(read.finish(part, encode))
                        ready, waiting = waiting, following
                        if ready is not None:
                            yield await ready
                    if layer == layers.start and waiting is not None:  # It is the last frame of the first layer.
                        waiting.add_done_callback(times.first_layer_joined)
                if waiting is not None:
                    ready, waiting = waiting, None
                    yield await ready
            finally:
                for unneeded in (waiting, parts):
                    if unneeded is not None:
                        unneeded.cancel()
                        await ended(unneeded)  # The thread may be reading memory that is released below.
                        if not unneeded.cancelled():
                            unneeded.exception()  # Another error was raised before it.
            self.counters.load_blocks += len(blocks)
            stored = self.lifecycle.blocks.token_count[lease.rows[blocks.start : blocks.stop]]
            self.counters.load_tokens += int(stored.sum())
            times.ended()
        except KVError as error:
            self.counters.loads_failed += 1
            raise lease.placed(error, self.lifecycle.blocks) from error
        finally:
            await read.close()
            self.lifecycle.unhold(read.rows)


class _Read:
    def __init__(self, reads: Reads, lease: Lease, blocks: range) -> None:
        self._reads = reads
        self._blocks_table = reads.lifecycle.blocks
        self._layout: Layout = lease.layout
        self._shard = lease.shard
        rows = lease.rows[blocks.start : blocks.stop].tolist()
        self._rows_of_block = [lease.parts.get(block, (row,)) for block, row in zip(blocks, rows, strict=True)]
        self.rows = list(dict.fromkeys(itertools.chain.from_iterable(self._rows_of_block)))
        self._plans: list[list[list[HeadRun]] | None] = []
        self._sources: dict[int, _Source] = {}
        self._scratch_bytes = 0
        self._held = AsyncExitStack()  # Keeps the promotions in place while they are read.

    def _plan(self, rows: Sequence[int]) -> list[list[HeadRun]] | None:
        """How several shards give one; None if one row is exactly the requested shard."""
        stored = [self._blocks_table.shard_of(row) for row in rows]
        if len(rows) == 1 and (stored[0].head_begin, stored[0].head_end) == (
            self._shard.head_begin,
            self._shard.head_end,
        ):
            return None
        plan = cover(stored, self._shard)
        assert plan is not None, "a lease holds only what covers its shard"
        return plan

    async def open(self) -> None:
        """Find every row's bytes, and start to promote rows that only SSD has."""
        table, reads = self._blocks_table, self._reads
        rows = np.array(self.rows, np.int64)
        missing = rows[~table.lie_in(rows, table.first_tier)].tolist()
        promotions: dict[int, PendingPromotion] = {}
        if missing and reads.promoter is not None:
            promotions = await self._held.enter_async_context(reads.promoter.promoting(missing))
        for row, pending in promotions.items():
            self._sources[row] = source = self._new_source(row)
            source.image, source.pending = pending.image, pending
        for count, row in enumerate(self.rows):
            await self._yield_to_loop(count)
            if row not in promotions:
                self._sources[row] = self._source(row)
        for count, rows_of_block in enumerate(self._rows_of_block):
            await self._yield_to_loop(count)
            self._plans.append(self._plan(rows_of_block))
        resident = [source for source in self._sources.values() if source.image is not None and not source.pending]
        await on_thread(lambda: self._read_trailers(resident), reads.executor)
        for source in resident:
            if source.trailer is None:
                await self._quarantine(source, table.first_tier, "the trailer")
        read_through = [source for source in self._sources.values() if source.extent is not None]
        # One layer of each is sent while the next one is read.
        wanted_bytes = sum(2 * (source.geometry.slice_bytes_max + 2 * PAGE_BYTES) for source in read_through)
        await reads.scratch.take(wanted_bytes)
        self._scratch_bytes = wanted_bytes
        await _gather(self._fetch_trailer, read_through)

    def _source(self, row: int) -> _Source:
        """The source of a block that is not being promoted."""
        table, source = self._blocks_table, self._new_source(row)
        tier = table.fastest(row)
        if tier is None:
            key = table.key_of(row).hex()
            raise LeaseExpired("a block was removed before its load began: look the prefix up again", key=key)
        extent = table.extent(row, tier)
        assert extent is not None
        if tier == table.first_tier:
            source.image = self._reads.dram.view(extent)[: source.geometry.image_bytes]
        else:
            source.tier, source.extent = tier, extent
        return source

    def _new_source(self, row: int) -> _Source:
        table = self._blocks_table
        return _Source(row, int(table.generation[row]), table.shard_of(row), self._reads.lifecycle.geometry(row), None)

    async def close(self) -> None:
        """Release the blocks' memory. No thread reads it any more: `on_thread` returns after its work has ended."""
        self._reads.scratch.release(self._scratch_bytes)
        await self._held.aclose()

    async def _yield_to_loop(self, count: int) -> None:
        """Yield to the event loop regularly, because a load may have thousands of blocks, and there may be many
        loads.
        """
        if count % _ROWS_A_TURN == 0:
            await self._reads.loop_budget.slot()

    def _read_trailers(self, sources: list[_Source]) -> None:
        for source in sources:
            assert source.image is not None
            source.trailer = self._trailer(source, source.image)

    def _trailer(self, source: _Source, image_end: memoryview) -> Trailer | None:
        expected = int(self._blocks_table.trailer_checksum[source.row])
        return image_check.read_trailer(image_end, source.geometry, self._blocks_table.key_of(source.row), expected)

    async def _fetch_trailer(self, source: _Source) -> None:
        start = image_check.trailer_start(source.geometry)
        pages = image_check.scratch(source.geometry.image_bytes - start)
        source.trailer = await self._read(source, start, pages, lambda end: self._trailer(source, end))
        if source.trailer is None:
            assert source.tier is not None
            await self._quarantine(source, source.tier, "the trailer")

    async def _read(
        self, source: _Source, start: int, into: memoryview, then: Callable[[memoryview], T] | None = None
    ) -> T | None:
        """Read a part of a block that is only in a slower tier. An error says which block it is of."""
        assert source.tier is not None and source.extent is not None
        try:
            result = await self._reads.lifecycle.tiers[source.tier].read(source.extent, start, into, then)
        except StorageFailed as error:
            error.details.setdefault("key", self._blocks_table.key_of(source.row).hex())
            raise
        self._reads.counters.tier_read_bytes[source.tier] += len(into)
        return result

    async def parts(self, layer: int) -> list[Part]:
        """One requested layer, cut into frames; `layer` counts from the shard's first."""
        return await self._cut(layer, await self._slices(layer + self._shard.layer_begin))

    async def _slices(self, layer: int) -> dict[int, LayerSlice]:
        """A layer of every row that has it; `layer` counts from the model's first."""
        slices: dict[int, LayerSlice] = {}
        coming: list[_Source] = []
        for count, source in enumerate(self._sources.values()):
            await self._yield_to_loop(count)
            if not source.shard.layer_begin <= layer < source.shard.layer_end:
                continue
            if source.is_at_hand:
                slices[source.row] = self._slice(source, layer - source.shard.layer_begin)
            else:
                coming.append(source)
        fetched = await _gather(lambda source: self._fetch_slice(source, layer - source.shard.layer_begin), coming)
        return slices | {found.row: found for found in fetched}

    def _slice(self, source: _Source, layer: int) -> LayerSlice:
        """The slice of a block in DRAM. Not a coroutine, because a load calls it thousands of times."""
        begin, end = source.geometry.slice_range(layer)
        assert source.image is not None and source.trailer is not None
        return LayerSlice(source.row, layer, source.image[begin:end], int(source.trailer.checksums[layer]))

    async def _fetch_slice(self, source: _Source, layer: int) -> LayerSlice:
        begin, end = source.geometry.slice_range(layer)
        if source.pending is not None:
            pending = source.pending
            await pending.layer_ready(layer)
            # Small slices share pages with neighbours that are still being read, so they are verified once more.
            expected = int(pending.checksums[layer]) if source.geometry.shares_pages(layer) else None
            return LayerSlice(source.row, layer, pending.image[begin:end], expected)
        assert source.trailer is not None
        start, stop = image_check.page_range(source.geometry, layer, layer + 1)
        pages = image_check.scratch(stop - start)
        await self._read(source, start, pages)
        self._reads.counters.read_through_bytes += end - begin
        return LayerSlice(source.row, layer, pages[begin - start : end - start], int(source.trailer.checksums[layer]))

    async def _cut(self, layer: int, slices: dict[int, LayerSlice]) -> list[Part]:
        """Frames of at most `frame_bytes` payload over the blocks' bytes of one layer."""
        parts: list[Part] = []
        current = Part(layer, 0, 0, [], [])
        room = self._reads.frame_bytes
        for block in range(len(self._rows_of_block)):
            await self._yield_to_loop(block)
            verify = [
                slices[row] for row in self._rows_of_block[block] if row in slices and slices[row].expected is not None
            ]
            sent = 0
            for run in self._runs(block, layer, slices):
                while len(run):
                    if not room:
                        parts.append(current)
                        current, room = Part(layer, block, sent, [], []), self._reads.frame_bytes
                    taken = run[:room]
                    current.runs.append(taken)
                    current.unverified.extend(verify)
                    verify = []  # Verify a slice once, before its first byte is sent.
                    run = run[len(taken) :]
                    room -= len(taken)
                    sent += len(taken)
        parts.append(current)
        return parts

    def _runs(self, block: int, layer: int, slices: dict[int, LayerSlice]) -> list[memoryview]:
        """The bytes of one block's layer, in order: all of it, or keys and then values of each run of heads."""
        plan, rows = self._plans[block], self._rows_of_block[block]
        if plan is None:
            return [slices[rows[0]].data]
        model_layer = layer + self._shard.layer_begin
        keys, values = [], []
        taken = 0
        for run in plan[layer]:
            source = self._sources[rows[run.source]]
            begin, end = self._layout.heads_between(model_layer, run.begin, run.end)
            begin = max(begin, taken)  # A head that two shards have is taken from the first.
            if begin >= end:
                continue
            taken = end
            data = slices[source.row].data
            (k_start, k_end), (v_start, v_end) = source.geometry.slices[
                model_layer - source.shard.layer_begin
            ].head_runs(begin, end)
            keys.append(data[k_start:k_end])
            values.append(data[v_start:v_end])
        return keys + values

    async def finish(self, part: Part, encode: Callable[[Part], T]) -> T:
        """Verify the slices that begin in this part, then encode it; both on a thread."""
        reads = self._reads

        def work() -> T | LayerSlice:
            for found in part.unverified:
                if checksum(found.data) != found.expected:
                    return found
            return encode(part)

        async with reads.slots:
            result = await on_thread(work, reads.executor)
        if isinstance(result, LayerSlice):
            source = self._sources[result.row]
            await self._quarantine(source, source.tier or self._blocks_table.first_tier, f"layer {result.layer}")
        reads.counters.load_bytes += sum(map(len, part.runs))
        return result

    async def _quarantine(self, source: _Source, tier: TierName, what: str) -> NoReturn:
        key = self._blocks_table.key_of(source.row).hex()
        await self._reads.lifecycle.quarantine(source.row, source.generation, tier, what)
        raise ChecksumMismatch(f"{what} of block {key} is damaged in {tier}; the block was dropped", key=key)


async def _gather(work: Callable[[_Source], Awaitable[T]], sources: Sequence[_Source]) -> list[T]:
    """The results of `work` for each of them, a bounded number at a time."""
    results: list[T] = []
    for start in range(0, len(sources), _ROWS_A_TURN):
        results += await all_of(map(work, sources[start : start + _ROWS_A_TURN]))
    return results


class _ScratchBudget:
    """The bound of all loads' memory for blocks that are read from SSD while DRAM is full, because clients may be
    slow.
    """

    def __init__(self, clock: Clock, limit_bytes: int, wait_s: float) -> None:
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._wait_s = wait_s
        self._used_bytes = 0
        self._more = asyncio.Condition()

    async def take(self, size_bytes: int) -> None:
        """Wait for a share. A load that needs more than the bound gets it when no other load has a share. Raises
        Overloaded.
        """
        if not size_bytes:
            return
        try:
            async with self._clock.timeout(self._wait_s), self._more:
                await self._more.wait_for(
                    lambda: not self._used_bytes or self._used_bytes + size_bytes <= self._limit_bytes
                )
                self._used_bytes += size_bytes
        except TimeoutError as error:
            raise Overloaded("other loads use all the memory for reads from SSD while DRAM is full") from error

    def release(self, size_bytes: int) -> None:
        if size_bytes:
            self._used_bytes -= size_bytes
            asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        async with self._more:
            self._more.notify_all()
