"""The bytes of leased blocks, layer by layer: from where each slice is read, cut into parts for a frame or for a thread
that sends.

The tier of a block decides only from where its slices are read: from DRAM; from DRAM during a promotion; or from SSD if
DRAM has no space (one layer at a time, through scratch memory). Called on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np

from kvservice.blocks import Extent, Rows, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.leases import Lease
from kvservice.store.mover.pending_promotion import PendingPromotion
from kvservice.store.mover.promoter import Promoter
from kvservice.store.tasks import LoopBudget, all_of, cancel
from kvservice.store.transfers.coverage import HeadRun, cover
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import on_thread
from kvservice_api.errors import ChecksumMismatch, LeaseExpired, Overloaded, StorageFailed
from kvservice_api.image import PAGE_BYTES, BlockGeometry, Trailer
from kvservice_api.layout import Layout, Shard

T = TypeVar("T")

_SCRATCH_BYTES = 256 << 20
_SCRATCH_WAIT_S = 5.0

_TRAILERS_ON_LOOP = 16  # They take 0.1 ms of the event loop, about as much as the change to a thread and back.
_ROWS_A_TURN = 256  # They take half a millisecond of the event loop,
_SOURCES_A_TURN = 128  # as do the sources of these.
_VERIFIED_BYTES = 1 << 20  # Of a part that is verified right before it is sent: it is still in the cache then.


class LayerSlice(NamedTuple):
    """One layer of one stored object, in memory."""

    row: int
    layer: int  # Counted from the stored shard's first.
    data: memoryview
    expected: int | None  # Its checksum; None if it was verified when it was read.


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one layer, at most as many as fit into one frame. For threads that send, also several whole layers."""

    layer: int
    first_block: int
    first_offset_bytes: int
    runs: list[memoryview]
    unverified: list[LayerSlice]  # To be verified before the first byte is sent.
    checksums: list[int] = field(default_factory=list)  # Of its runs, for the client to verify; else none.


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


class _Cutter:
    """Cuts one layer into parts, block after block: of whole slices, with `part_bytes` or little more; or also inside
    of slices, with `part_bytes` each.
    """

    def __init__(self, layer: int, part_bytes: int, *, cuts_slices: bool) -> None:
        self.layer = layer
        self._part_bytes, self._cuts_slices = part_bytes, cuts_slices
        self._parts: list[Part] = []
        self._size = part_bytes  # Of the last part; as if it were full, if there is none.

    def add(self, block: int, runs: list[memoryview], unverified: list[LayerSlice]) -> None:
        taken_bytes = 0
        for run in runs:
            left = run
            while len(left):
                if self._size >= self._part_bytes and (self._cuts_slices or not taken_bytes):
                    self._parts.append(Part(self.layer, block, taken_bytes, [], []))
                    self._size = 0
                taken = left[: self._part_bytes - self._size] if self._cuts_slices else left
                self._parts[-1].runs.append(taken)
                self._parts[-1].unverified.extend(unverified)
                unverified = []  # A slice is verified once, before its first byte is sent.
                left = left[len(taken) :]
                self._size += len(taken)
                taken_bytes += len(taken)

    def take(self, *, is_end: bool) -> list[Part]:
        """The parts that are complete and were not taken before. At the end the last one is complete, however small."""
        if not is_end and self._size < self._part_bytes:
            parts, self._parts = self._parts[:-1], self._parts[-1:]
        else:
            parts, self._parts, self._size = self._parts, [], self._part_bytes
        return parts


class ScratchBudget:
    """The bound of all loads' memory for blocks that are read from SSD while DRAM is full, because clients may be
    slow.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._used_bytes = 0
        self._more = asyncio.Condition()

    async def take(self, size_bytes: int) -> None:
        """Wait for a share. A load that needs more than the bound gets it when no other load has a share. Raises
        Overloaded.
        """
        if not size_bytes:
            return
        try:
            async with self._clock.timeout(_SCRATCH_WAIT_S), self._more:
                await self._more.wait_for(
                    lambda: not self._used_bytes or self._used_bytes + size_bytes <= _SCRATCH_BYTES
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


@dataclass(slots=True)
class ReadsShared:
    """What all loads of a store share."""

    lifecycle: BlockLifecycle
    dram: DramTier
    promoter: Promoter | None
    counters: Counters
    executor: Executor
    loop_budget: LoopBudget
    scratch: ScratchBudget


class LeasedBytes:
    """The bytes of some blocks of a lease, while they are read. `open` it before use, and `close` it in any case."""

    def __init__(self, shared: ReadsShared, lease: Lease, blocks: range) -> None:
        self._shared = shared
        self._blocks_table = shared.lifecycle.blocks
        self._layout: Layout = lease.layout
        self._shard = lease.shard
        self.rows = lease.rows[blocks.start : blocks.stop]
        self._row_of_block = self.rows.tolist()  # A load may have thousands: a tuple of each would take milliseconds.
        self._parts = {block - blocks.start: rows for block, rows in lease.parts.items() if block in blocks}
        if self._parts:
            rows = map(self._rows_of, range(len(self._row_of_block)))
            self.rows = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        self._plans: list[list[list[HeadRun]] | None] = []
        self._sources: dict[int, _Source] = {}
        self._all_at_hand: list[tuple[_Source, list[int]]] | None = None  # With checksums; if no block is of shards.
        self._rows_since_slot = 0
        self._token_count = int(self._blocks_table.token_count[lease.rows[blocks.start : blocks.stop]].sum())
        self.scratch_bytes = 0
        self.is_in_dram = False  # All of it, from the time of `open` on.
        self._held = AsyncExitStack()  # Keeps the promotions in place while they are read.

    def _rows_of(self, block: int) -> tuple[int, ...]:
        """The rows that make up a block: usually one."""
        return self._parts.get(block) or (self._row_of_block[block],)

    def _turns(self) -> Iterator[range]:
        """All blocks, in runs of `_ROWS_A_TURN` rows or little more: a block of eight shards has eight."""
        start = rows = 0
        for block in range(len(self._row_of_block)):
            rows += len(self._rows_of(block))
            if rows >= _ROWS_A_TURN:
                yield range(start, block + 1)
                start, rows = block + 1, 0
        if rows:
            yield range(start, len(self._row_of_block))

    def _plan(self, rows: Sequence[int]) -> list[list[HeadRun]] | None:
        """How several shards give one; None if one row is exactly the requested shard."""
        stored = [self._sources[row].shard for row in rows]
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
        table, shared = self._blocks_table, self._shared
        missing = self.rows[~table.lie_in(self.rows, table.first_tier)].tolist()
        promotions: dict[int, PendingPromotion] = {}
        if missing and shared.promoter is not None:
            promotions = await self._held.enter_async_context(shared.promoter.promoting(missing))
        for start in range(0, len(self.rows), _SOURCES_A_TURN):
            await shared.loop_budget.slot()
            self._add_sources(self.rows[start : start + _SOURCES_A_TURN], promotions)
        for blocks in self._turns():
            await shared.loop_budget.slot()
            self._plans += [self._plan(self._rows_of(block)) for block in blocks]
        resident = [source for source in self._sources.values() if source.is_at_hand]
        self.is_in_dram = len(resident) == len(self._sources)
        if len(resident) <= _TRAILERS_ON_LOOP:
            self._read_trailers(resident)
        else:
            await on_thread(lambda: self._read_trailers(resident), shared.executor)
        for source in resident:
            if source.trailer is None:
                await self._quarantine(source, table.first_tier, "the trailer")
        read_through = [source for source in self._sources.values() if source.extent is not None]
        # One layer of each is sent while the next one is read.
        wanted_bytes = sum(2 * (source.geometry.slice_bytes_max + 2 * PAGE_BYTES) for source in read_through)
        await shared.scratch.take(wanted_bytes)
        self.scratch_bytes = wanted_bytes
        await _gather(self._fetch_trailer, read_through)

    def _add_sources(self, rows: Rows, promotions: Mapping[int, PendingPromotion]) -> None:
        """The sources of these rows, column by column: a load may have thousands. Raises LeaseExpired."""
        table, some = self._blocks_table, rows.tolist()
        geometries, shards = self._shared.lifecycle.geometries(some), table.shards(rows)
        columns = zip(some, table.generation[rows].tolist(), shards, geometries, strict=True)
        extents = table.extents(rows, table.first_tier)
        for (row, generation, shard, geometry), extent in zip(columns, extents, strict=True):
            self._sources[row] = source = _Source(row, generation, shard, geometry, None)
            if (pending := promotions.get(row)) is not None:
                source.image, source.pending = pending.image, pending
            elif extent is not None:
                source.image = self._shared.dram.view(extent)[: geometry.image_bytes]
            else:
                source.tier, source.extent = self._slower_copy(row)

    def _slower_copy(self, row: int) -> tuple[TierName, Extent]:
        tier = self._blocks_table.fastest(row)
        if tier is None:
            key = self._blocks_table.key_of(row).hex()
            raise LeaseExpired("a block was removed before its load began: look the prefix up again", key=key)
        extent = self._blocks_table.extent(row, tier)
        assert extent is not None
        return tier, extent

    async def close(self) -> None:
        """Release the blocks' memory. No thread reads it any more: `on_thread` returns after its work has ended."""
        self._shared.scratch.release(self.scratch_bytes)
        await self._held.aclose()
        while len(self._sources) > _ROWS_A_TURN:  # The release of thousands of objects takes milliseconds.
            for row in list(itertools.islice(self._sources, _ROWS_A_TURN)):
                del self._sources[row]
            if self._all_at_hand:
                del self._all_at_hand[-_ROWS_A_TURN:]
            await asyncio.sleep(0)

    async def _yield_to_loop(self, count: int) -> None:
        """Yield to the event loop regularly, because a load may have thousands of blocks, and there may be many
        loads.
        """
        if count % _ROWS_A_TURN == 0:
            await self._shared.loop_budget.slot()

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
            result = await self._shared.lifecycle.tiers[source.tier].read(source.extent, start, into, then)
        except StorageFailed as error:
            error.details.setdefault("key", self._blocks_table.key_of(source.row).hex())
            raise
        self._shared.counters.tier_read_bytes[source.tier] += len(into)
        return result

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
        self._shared.counters.read_through_bytes += end - begin
        return LayerSlice(source.row, layer, pages[begin - start : end - start], int(source.trailer.checksums[layer]))

    def parts(self, layer: int, part_bytes: int) -> AsyncGenerator[Part, None]:
        """One requested layer, cut into parts of `part_bytes`, each once its own slices are at hand. Close it before
        this object. `layer` counts from the shard's first.
        """
        return self._arriving(_Cutter(layer, part_bytes, cuts_slices=True))

    def arriving_units(self, layer: int) -> AsyncGenerator[Part, None]:
        """As `parts`, of whole slices: what is verified right before it is sent."""
        return self._arriving(_Cutter(layer, _VERIFIED_BYTES, cuts_slices=False))

    async def units(self, layers: range, run_bytes: int, unit_bytes: int) -> tuple[list[Part], int]:
        """The first of these layers, in parts of whole slices; or as many whole layers as have at most `run_bytes`
        together, as one part. Returns the end of what is in the parts. Counts as for `parts`.

        A part has `unit_bytes` or little more for the client to verify. Otherwise `_VERIFIED_BYTES` of one layer.
        """
        if not await self.are_at_hand():
            return await listed(self.arriving_units(layers.start)), layers.start + 1
        assert self._all_at_hand is not None
        first = layers.start
        layer_bytes = self.layer_bytes(first)
        end, left_bytes = first + 1, min(run_bytes, unit_bytes) - layer_bytes
        while end < layers.stop and (left_bytes := left_bytes - self.layer_bytes(end)) >= 0:
            end += 1
        return await self._summed_units(self._all_at_hand, range(first, end), unit_bytes), end

    async def are_at_hand(self) -> bool:
        """Whether all blocks are in DRAM, each as the one shard that is wanted."""
        if self._all_at_hand is None and self.is_in_dram and not any(self._plans):
            self._all_at_hand = await self._with_checksums()
        return self._all_at_hand is not None

    async def _summed_units(
        self, blocks: list[tuple[_Source, list[int]]], layers: range, unit_bytes: int
    ) -> list[Part]:
        """The usual case, in a microsecond per slice. Several layers are one part."""
        units: list[Part] = []
        size = unit_bytes
        for layer in layers:
            for block, (source, checksums) in enumerate(blocks):
                if self._rows_since_slot == _ROWS_A_TURN:
                    self._rows_since_slot = 0
                    await self._shared.loop_budget.slot()
                self._rows_since_slot += 1
                if size >= unit_bytes:
                    units.append(unit := Part(layer, block, 0, [], []))
                    size = 0
                index = layer + self._shard.layer_begin - source.shard.layer_begin
                begin, end = source.geometry.slices[index][:2]
                assert source.image is not None
                unit.runs.append(source.image[begin:end])
                unit.checksums.append(checksums[index])
                size += end - begin
        return units

    async def _arriving(self, cutter: _Cutter) -> AsyncGenerator[Part, None]:
        model_layer = cutter.layer + self._shard.layer_begin
        for blocks in self._turns():
            await self._shared.loop_budget.slot()
            slices: dict[int, LayerSlice] = {}
            coming: dict[int, asyncio.Future[LayerSlice]] = {}
            rows = dict.fromkeys(row for block in blocks for row in self._rows_of(block))  # A lease may have one twice.
            try:
                for source in (self._sources[row] for row in rows):
                    if not source.shard.layer_begin <= model_layer < source.shard.layer_end:
                        continue
                    if source.is_at_hand:
                        slices[source.row] = self._slice(source, model_layer - source.shard.layer_begin)
                    else:
                        work = self._fetch_slice(source, model_layer - source.shard.layer_begin)
                        coming[source.row] = asyncio.ensure_future(work)
                for block in blocks:
                    for row in self._rows_of(block):
                        if row in coming:
                            slices[row] = await coming[row]
                    of_block = [slices[row] for row in self._rows_of(block) if row in slices]
                    unverified = [found for found in of_block if found.expected is not None]
                    cutter.add(block, self._runs(block, cutter.layer, slices), unverified)
                    for part in cutter.take(is_end=block + 1 == len(self._row_of_block)):
                        yield part
            finally:
                if coming:
                    await cancel(coming.values())

    def layer_bytes(self, layer: int) -> int:
        """Of all blocks together."""
        return self._token_count * self._layout.shard_slice_bytes(self._shard, layer + self._shard.layer_begin, 1)

    async def _with_checksums(self) -> list[tuple[_Source, list[int]]] | None:
        """The source of each block, and the checksums of its slices. None if not all of them are in DRAM."""
        found = []
        for count, row in enumerate(self._row_of_block):
            if count:  # A small load needs no slot of its own for this.
                await self._yield_to_loop(count)
            source = self._sources[row]
            if not source.is_at_hand or source.trailer is None:
                return None
            found.append((source, source.trailer.checksums.tolist()))
        return found

    def _runs(self, block: int, layer: int, slices: dict[int, LayerSlice]) -> list[memoryview]:
        """The bytes of one block's layer, in order: all of it, or keys and then values of each run of heads."""
        plan, rows = self._plans[block], self._rows_of(block)
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

    async def dropped(self, found: LayerSlice) -> ChecksumMismatch:
        """Drop the block of a damaged slice. Returns the error that says so."""
        source = self._sources[found.row]
        return await self._dropped(source, source.tier or self._blocks_table.first_tier, f"layer {found.layer}")

    async def _quarantine(self, source: _Source, tier: TierName, what: str) -> NoReturn:
        raise await self._dropped(source, tier, what)

    async def _dropped(self, source: _Source, tier: TierName, what: str) -> ChecksumMismatch:
        key = self._blocks_table.key_of(source.row).hex()
        await self._shared.lifecycle.quarantine(source.row, source.generation, tier, what)
        return ChecksumMismatch(f"{what} of block {key} is damaged in {tier}; the block was dropped", key=key)


async def listed(items: AsyncGenerator[T, None]) -> list[T]:
    """All of them. They are closed on return."""
    async with aclosing(items):
        return [each async for each in items]


async def _gather(work: Callable[[_Source], Awaitable[T]], sources: Sequence[_Source]) -> list[T]:
    """The results of `work` for each of them, a bounded number at a time."""
    results: list[T] = []
    for start in range(0, len(sources), _ROWS_A_TURN):
        results += await all_of(map(work, sources[start : start + _ROWS_A_TURN]))
    return results
