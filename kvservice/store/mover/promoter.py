"""Promotion: copies blocks from a slower tier to DRAM, layer by layer. A load sends each layer once it is verified.

The promoter reads the layers of all blocks of a load in the order in which the load sends them: layer 0 of every
block first.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.miss_reasons import SpaceFor
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.promotion_spans import LayerReads
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.tasks import LoopBudget, Tasks, all_of
from kvservice.tiers.base import as_kv_error
from kvservice.tiers.dram import DramTier
from kvservice_api import spans
from kvservice_api.errors import BlockNotFound, ChecksumMismatch, KVError, StorageFailed, TierFull
from kvservice_api.image import BlockGeometry, Trailer

T = TypeVar("T")

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_ROWS_A_TURN = 8  # They take a millisecond of the event loop.
_MEASURED_BYTES = 4 << 20  # The bandwidth is measured over this much,
_RATE_WEIGHT = 0.2  # and the last measurement has this weight.
_SPACE_WAIT_S = 0.2  # After this time, a load reads from the slower tier instead of waiting for space in DRAM.


class PendingPromotion:
    """A block that is being copied to DRAM. Its verified layers can be read before the last one has been read."""

    def __init__(
        self,
        row: int,
        generation: int,
        geometry: BlockGeometry,
        tier: TierName,
        extent: Extent,
        image: memoryview,
    ) -> None:
        self.row = row
        self.generation = generation
        self.geometry = geometry
        self.tier = tier  # The tier whose copy is read.
        self.pieces = image_check.cut(geometry, _PIECE_BYTES)
        self.extent = extent
        self.image = image
        self.trailer: Trailer | None = None
        self.done = asyncio.Event()
        self.error: KVError | None = None
        self._readers = 0
        self._is_verified = [False] * geometry.slice_count
        self._more = asyncio.Event()

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """One checksum per layer. Valid once a layer is ready."""
        assert self.trailer is not None
        return self.trailer.checksums

    async def layer_ready(self, layer: int) -> None:
        """Wait until the layer is read and verified. Raises the error with which the promotion failed."""
        while not self.is_ready(layer):
            await self._more.wait()

    def is_ready(self, layer: int) -> bool:
        """Whether the layer is read and verified. Raises as `layer_ready`."""
        if not self._is_verified[layer] and self.error is not None:
            raise self.error
        return self._is_verified[layer]

    def begin_reading(self) -> None:
        """Keep the image in place until `end_reading`, also if the promotion fails."""
        self._readers += 1

    def end_reading(self) -> None:
        self._readers -= 1
        self._wake()

    async def unread(self) -> None:
        """Wait until no load reads the image."""
        while self._readers:
            await self._more.wait()

    def piece_verified(self, piece: image_check.ImagePiece) -> None:
        for layer in range(piece.layer_begin, piece.layer_end):
            self._is_verified[layer] = True
        self._wake()

    def failed(self, error: KVError) -> None:
        if self.error is None:
            self.error = error
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


class Promoter:
    def __init__(
        self,
        lifecycle: BlockLifecycle,
        evictor: Evictor,
        dram: DramTier,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        loop_budget: LoopBudget,
        *,
        write_behind: WriteBehind,
        reads_in_flight: int,
    ) -> None:
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._evictor = evictor
        self._dram = dram
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._loop_budget = loop_budget
        self._write_behind = write_behind
        self._reads_in_flight = reads_in_flight
        self._pending: dict[int, PendingPromotion] = {}
        self._reserving: dict[int, asyncio.Future[None]] = {}
        self._read_ended = asyncio.Event()  # Set, and replaced, at the end of each read of any promotion.
        self.bytes_per_s = 0.0  # Of all reads together while there are some; 0 until it is known.
        self._batches = 0  # Reads that run.
        self._busy_s = self._busy_bytes = 0.0  # Since the last measurement: the time with reads, and their bytes.
        self._busy_from_s = 0.0

    @property
    def pending_bytes(self) -> int:
        """Of all promotions that have not ended. May be called from any thread."""
        return sum(pending.geometry.image_bytes for pending in list(self._pending.values()))

    @property
    def pending_count(self) -> int:
        """The blocks that are being promoted, or wait for space. May be called from any thread."""
        return len(self._pending) + len(self._reserving)

    async def read_ended(self) -> None:
        """Wait for the end of the next read of any promotion, with or without success."""
        await self._read_ended.wait()

    def is_promoting(self, row: int) -> bool:
        """Whether the row is being copied to DRAM, or waits for space there."""
        return row in self._pending or row in self._reserving

    @asynccontextmanager
    async def promoting(self, rows: Sequence[int]) -> AsyncIterator[dict[int, PendingPromotion]]:
        """Promote the rows that are only in slower tiers, and keep their images in place until the context is left.

        Yields a promotion per row, but none for rows in DRAM and for rows that DRAM has no space for.
        """
        pending = await self._begin(rows, within_s=0.0, space_for=SpaceFor.LOAD)
        for each in pending.values():  # Before any await: a promotion without readers may end and free its image.
            each.begin_reading()
        try:
            yield pending
        finally:
            for each in pending.values():
                each.end_reading()

    async def promote(
        self,
        rows: Sequence[int],
        *,
        within_s: float,
        wait: bool,
        worth: float = math.inf,
        space_for: SpaceFor = SpaceFor.PREFETCH,
    ) -> None:
        """Promote the rows that are only in slower tiers. With `wait`, return once each has succeeded or failed.

        With a finite `worth`, only blocks with a lower score leave DRAM for them.
        """
        if not wait:
            self.prefetch(rows, within_s=within_s)
            return
        for each in (await self._begin(rows, within_s=within_s, worth=worth, space_for=space_for)).values():
            await each.done.wait()

    def prefetch(self, rows: Sequence[int], *, within_s: float) -> None:
        """As `promote` without `wait`. Called on the event loop."""
        self._tasks.start(self._begin(rows, within_s=within_s), "prefetch")

    async def _begin(
        self,
        rows: Sequence[int],
        *,
        within_s: float,
        worth: float = math.inf,
        space_for: SpaceFor = SpaceFor.PREFETCH,
    ) -> dict[int, PendingPromotion]:
        """Start to read the rows that are only in slower tiers. A row that is being promoted is not read twice.

        Reads are ordered by their deadline, `within_s` from now.
        """
        wanted = np.unique(np.asarray(rows, np.int64))
        absent = wanted[~self._blocks.lie_in(wanted, self._blocks.first_tier)]
        later_bytes = int(self._blocks.size_bytes[absent].sum())
        begun: list[PendingPromotion] = []
        found: dict[int, PendingPromotion] = {}
        try:
            for count, row in enumerate(dict.fromkeys(rows)):
                if count % _ROWS_A_TURN == 0:
                    await self._loop_budget.slot()  # If there is space, nothing below waits.
                while row in self._reserving:
                    await asyncio.wait({self._reserving[row]})
                if row not in self._pending and self._should_promote(row):
                    try:
                        later_bytes -= int(self._blocks.size_bytes[row])
                        begun.append(await self._reserve(row, worth, space_for, later_bytes))
                    except (TierFull, StorageFailed) as error:
                        log.debug("no space to promote: %s", error.message)
                        break  # The later rows will not fit either: loads read them from the slower tier.
                if row in self._pending:
                    found[row] = self._pending[row]
        finally:
            if begun:
                due_s = self._clock.monotonic_s() + within_s
                self._tasks.start(self._read_all(begun, due_s, space_for), "promotion")
        # A promotion that was joined may have ended while this call waited for space; its image is invalid then.
        return {row: pending for row, pending in found.items() if not pending.done.is_set()}

    def _should_promote(self, row: int) -> bool:
        blocks = self._blocks
        below = blocks.fastest(row) not in (None, blocks.first_tier)
        return below and bool(blocks.live[row])

    async def _reserve(self, row: int, worth: float, space_for: SpaceFor, more_bytes: int) -> PendingPromotion:
        geometry = self._lifecycle.geometry(row)
        reserving = self._reserving[row] = asyncio.get_running_loop().create_future()
        self._lifecycle.hold([row])
        try:
            extent = await self._evictor.reserve(
                self._blocks.first_tier,
                geometry.image_bytes,
                space_for,
                wait_s=_SPACE_WAIT_S,
                worth=worth,
                more_bytes=max(0, more_bytes),
            )
        except BaseException:
            self._lifecycle.unhold([row])
            raise
        finally:
            del self._reserving[row]
            reserving.set_result(None)
        image = self._dram.view(extent)[: geometry.image_bytes]
        generation, source = int(self._blocks.generation[row]), self._blocks.fastest(row)
        assert source is not None, "a held block keeps its copy"
        pending = self._pending[row] = PendingPromotion(row, generation, geometry, source, extent, image)
        return pending

    async def _read_all(self, promotions: list[PendingPromotion], due_s: float, space_for: SpaceFor) -> None:
        """Read all pieces, several at a time, and end each promotion after its last piece."""
        began_s, reason = self._clock.monotonic_s(), space_for.name.lower()
        size_bytes = sum(each.geometry.image_bytes for each in promotions)
        tier, count = str(promotions[0].tier), len(promotions)
        with (
            self._measured(promotions),
            spans.span("kvservice.promote", tier=tier, blocks=count, bytes=size_bytes, reason=reason),
        ):
            await self._read_pieces(promotions, due_s)
        self._counters.promotion_times[reason,].observe(self._clock.monotonic_s() - began_s)

    @contextmanager
    def _measured(self, promotions: Sequence[PendingPromotion]) -> Iterator[None]:
        """Measure the tier's bandwidth: batches that run at the same time share it."""
        if not self._batches:
            self._busy_from_s = self._clock.monotonic_s()
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1
            now_s = self._clock.monotonic_s()
            self._busy_s += now_s - self._busy_from_s
            self._busy_from_s = now_s
            self._busy_bytes += sum(each.geometry.image_bytes for each in promotions if each.error is None)
            if self._busy_s > 0 and self._busy_bytes >= _MEASURED_BYTES:
                rate = self._busy_bytes / self._busy_s
                self.bytes_per_s += (_RATE_WEIGHT if self.bytes_per_s else 1.0) * (rate - self.bytes_per_s)
                self._busy_s = self._busy_bytes = 0.0

    async def _read_pieces(self, promotions: list[PendingPromotion], due_s: float) -> None:
        await self._each(promotions, lambda pending: self._read_trailer(pending, due_s))
        missing = {pending.row: len(pending.pieces) for pending in promotions}
        trace = spans.current()
        traced = None if trace is None else LayerReads(promotions, trace, self._clock)

        async def read(job: tuple[PendingPromotion, image_check.ImagePiece]) -> None:
            pending, piece = job
            if traced is not None:
                traced.begin(piece)
            await self._read_piece(pending, piece, due_s)
            if traced is not None:
                traced.end(piece)
            missing[pending.row] -= 1
            if not missing[pending.row]:
                # As a task, so that the next pieces do not wait for the commit.
                self._tasks.start(self._end(pending), "end of a promotion")

        await self._each(_layer_major(promotions), read)

    async def _each(self, jobs: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Run `work` on all jobs, in order, `reads_in_flight` at a time."""
        shared = iter(jobs)

        async def worker() -> None:
            for job in shared:
                await work(job)
                ended, self._read_ended = self._read_ended, asyncio.Event()
                ended.set()

        await all_of(worker() for _ in range(self._reads_in_flight))

    async def _read_trailer(self, pending: PendingPromotion, due_s: float) -> None:
        source = self._blocks.extent(pending.row, pending.tier)
        assert source is not None, "a held block keeps its copy"
        start = image_check.trailer_start(pending.geometry)
        expected = int(self._blocks.trailer_checksum[pending.row])
        key = self._blocks.key_of(pending.row)
        try:
            pending.trailer = await self._lifecycle.tiers[pending.tier].read(
                source,
                start,
                pending.image[start:],
                lambda end: image_check.read_trailer(end, pending.geometry, key, expected),
                priority=due_s,
            )
            self._counters.tier_read_bytes[pending.tier] += len(pending.image) - start
            if pending.trailer is None:
                raise self._damaged(pending, "the trailer")
        except Exception as error:
            await self._fail(pending, as_kv_error(error))

    async def _read_piece(self, pending: PendingPromotion, piece: image_check.ImagePiece, due_s: float) -> None:
        if pending.error is not None:
            return
        trailer, geometry = pending.trailer, pending.geometry
        source = self._blocks.extent(pending.row, pending.tier)
        assert trailer is not None and source is not None
        layers = range(piece.layer_begin, piece.layer_end)
        try:
            damaged = await self._lifecycle.tiers[pending.tier].read(
                source,
                piece.start,
                pending.image[piece.start : piece.end],
                lambda pages: image_check.damaged_layers(pages, piece.start, geometry, layers, trailer.checksums),
                priority=due_s,
            )
            self._counters.tier_read_bytes[pending.tier] += piece.end - piece.start
            if damaged:
                first_layer = self._blocks.shard_of(pending.row).layer_begin
                raise self._damaged(pending, f"layer {first_layer + damaged[0]}")
            pending.piece_verified(piece)
        except Exception as error:
            await self._fail(pending, as_kv_error(error))

    def _damaged(self, pending: PendingPromotion, what: str) -> ChecksumMismatch:
        key = self._blocks.key_of(pending.row).hex()
        return ChecksumMismatch(f"{what} of block {key} is damaged in {pending.tier}", key=key, damaged=what)

    async def _fail(self, pending: PendingPromotion, error: KVError) -> None:
        """Take a damaged block out of service at once, before the other promotions have ended."""
        error.details.setdefault("key", self._blocks.key_of(pending.row).hex())
        pending.failed(error)
        self._counters.storage_errors += isinstance(error, StorageFailed)
        if isinstance(error, ChecksumMismatch):
            await self._lifecycle.quarantine(pending.row, pending.generation, pending.tier, error.details["damaged"])

    async def _end(self, pending: PendingPromotion) -> None:
        """Make the block resident in DRAM, or release its space."""
        row, blocks = pending.row, self._blocks
        placed = False
        try:
            if pending.error is None:
                await self._lifecycle.wait_record_deletes([blocks.object_key_of(row)], blocks.first_tier)
                if not blocks.live[row]:
                    raise BlockNotFound("the block was discarded while it was promoted")
                placed = True  # `place` owns the extent from here on.
                await self._lifecycle.place([row], blocks.first_tier, [pending.extent], pending.unread)
                blocks.verified[row] = blocks.is_resident(row, blocks.first_tier)
                self._counters.promoted_blocks += 1
                self._counters.promoted_bytes += pending.geometry.image_bytes
                self._write_behind.add_missing(row)
        except KVError as error:
            # The bytes are right, so loads may continue to read them.
            log.debug("the record of a promoted block was not written: %s", error.message)
        finally:
            del self._pending[row]
            pending.done.set()
            self._lifecycle.unhold([row])
            if not placed:
                await pending.unread()
                self._dram.release(pending.extent)


def _layer_major(promotions: Sequence[PendingPromotion]) -> Iterator[tuple[PendingPromotion, image_check.ImagePiece]]:
    """The first piece of every promotion, then the second piece of each, and so on."""
    for number in range(max(len(pending.pieces) for pending in promotions)):
        for pending in promotions:
            if number < len(pending.pieces):
                yield pending, pending.pieces[number]
