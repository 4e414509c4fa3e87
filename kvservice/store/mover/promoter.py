"""Promotion: brings blocks from SSD up to DRAM, layer by layer, so that a load can follow behind.

The layers of all blocks of a load come in the order in which the
load sends them: layer 0 of every block first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Extent, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.policy.base import Policy
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.loop_budget import LoopBudget
from kvservice.store.mover.evictor import Evictor
from kvservice.store.tasks import Tasks, all_of
from kvservice.tiers.dram import DramTier
from kvservice_api.errors import BlockNotFound, ChecksumMismatch, KVError, StorageFailed, TierFull
from kvservice_api.image import BlockGeometry, Trailer

T = TypeVar("T")

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_ROWS_A_TURN = 64  # A millisecond of the event loop.
_ROOM_WAIT_S = 0.2  # Whoever loads is better off reading past DRAM than waiting for longer.


class PendingPromotion:
    """One block on its way up. Its verified layers can be read before the last one is there."""

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
        self.tier = tier  # That it is read from.
        self.pieces = image_check.cut(geometry, _PIECE_BYTES)
        self.extent = extent
        self.image = image
        self.trailer: Trailer | None = None
        self.done = asyncio.Event()
        self.error: KVError | None = None
        self._readers = 0
        self._landed = [False] * geometry.slice_count
        self._more = asyncio.Event()

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """Of all layers; known once one is ready."""
        assert self.trailer is not None
        return self.trailer.checksums

    async def layer_ready(self, layer: int) -> None:
        """Wait until the layer is there and verified. Raises why it will not come."""
        while not self._landed[layer]:
            if self.error is not None:
                raise self.error
            await self._more.wait()

    def begin_reading(self) -> None:
        """Keep the image in place until `end_reading`, even where the landing fails."""
        self._readers += 1

    def end_reading(self) -> None:
        self._readers -= 1
        self._wake()

    async def unread(self) -> None:
        """Wait until nobody reads the image."""
        while self._readers:
            await self._more.wait()

    def landed(self, piece: image_check.ImagePiece) -> None:
        for layer in range(piece.layer_begin, piece.layer_end):
            self._landed[layer] = True
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
        policy: Policy[BlockTable],
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        loop_budget: LoopBudget,
        *,
        reads_in_flight: int,
    ) -> None:
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._evictor = evictor
        self._dram = dram
        self._policy = policy
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._loop_budget = loop_budget
        self._reads_in_flight = reads_in_flight
        self._landings: dict[int, PendingPromotion] = {}
        self._reserving: dict[int, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def promoting(self, rows: Sequence[int]) -> AsyncIterator[dict[int, PendingPromotion]]:
        """Promote the rows that are only on SSD, and keep what is read of them in place until the block is left.

        Rows that DRAM has no room for, and those already there, are not among them.
        """
        pending = await self._begin(rows, within_s=0.0)
        for each in pending.values():  # Nothing is awaited in between: a promotion that ends gives its image away.
            each.begin_reading()
        try:
            yield pending
        finally:
            for each in pending.values():
                each.end_reading()

    async def promote(self, rows: Sequence[int], *, within_s: float, wait: bool) -> None:
        """Promote the rows that are only on SSD; `wait` for the end of it, which may be a failure."""
        begin = self._begin(rows, within_s=within_s)
        if not wait:
            self._tasks.start(begin, "prefetch")
            return
        for each in (await begin).values():
            await each.done.wait()

    async def _begin(self, rows: Sequence[int], *, within_s: float) -> dict[int, PendingPromotion]:
        """Start to read the rows that are only on SSD. Single flight: a promotion that runs is joined.

        Reads are ordered by the time at which their blocks are wanted, `within_s` from now.
        """
        begun: list[PendingPromotion] = []
        found: dict[int, PendingPromotion] = {}
        try:
            for count, row in enumerate(dict.fromkeys(rows)):
                if count % _ROWS_A_TURN == 0:
                    await self._loop_budget.slot()  # Where there is room nothing below waits.
                while row in self._reserving:
                    await asyncio.wait({self._reserving[row]})
                if row not in self._landings and self._wanted(row):
                    try:
                        begun.append(await self._reserve(row))
                    except (TierFull, StorageFailed) as error:
                        log.debug("no room to promote: %s", error.message)
                        break  # The later ones will not fit either; they are read where they lie.
                if row in self._landings:
                    found[row] = self._landings[row]
        finally:
            if begun:
                due_s = self._clock.monotonic_s() + within_s
                self._tasks.start(self._bring_up(begun, due_s), "promotion")
        # A promotion that was joined may have ended while we waited for room; its image is invalid then.
        return {row: landing for row, landing in found.items() if not landing.done.is_set()}

    def _wanted(self, row: int) -> bool:
        blocks = self._blocks
        below = blocks.fastest(row) not in (None, blocks.first_tier)
        return below and bool(blocks.live[row]) and self._policy.wants_in_dram(blocks, row, self._clock.monotonic_s())

    async def _reserve(self, row: int) -> PendingPromotion:
        geometry = self._lifecycle.geometry(row)
        reserving = self._reserving[row] = asyncio.get_running_loop().create_future()
        self._lifecycle.hold([row])
        try:
            extent = await self._evictor.reserve(self._blocks.first_tier, geometry.image_bytes, wait_s=_ROOM_WAIT_S)
        except BaseException:
            self._lifecycle.unhold([row])
            raise
        finally:
            del self._reserving[row]
            reserving.set_result(None)
        image = self._dram.view(extent)[: geometry.image_bytes]
        generation, source = int(self._blocks.generation[row]), self._blocks.fastest(row)
        assert source is not None, "a held block keeps its copy"
        landing = self._landings[row] = PendingPromotion(row, generation, geometry, source, extent, image)
        return landing

    async def _bring_up(self, landings: list[PendingPromotion], due_s: float) -> None:
        """Read all, some pieces at a time, and end each landing when its last piece is there."""
        await self._each(landings, lambda landing: self._read_trailer(landing, due_s))
        missing = {landing.row: len(landing.pieces) for landing in landings}

        async def read(job: tuple[PendingPromotion, image_check.ImagePiece]) -> None:
            landing, piece = job
            await self._read_piece(landing, piece, due_s)
            missing[landing.row] -= 1
            if not missing[landing.row]:
                # Not here: the next pieces need not wait for the commit.
                self._tasks.start(self._end(landing), "end of a landing")

        await self._each(_layer_major(landings), read)

    async def _each(self, jobs: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Run `work` on all jobs, in order, `reads_in_flight` at a time."""
        shared = iter(jobs)

        async def worker() -> None:
            for job in shared:
                await work(job)

        await all_of(worker() for _ in range(self._reads_in_flight))

    async def _read_trailer(self, landing: PendingPromotion, due_s: float) -> None:
        source = self._blocks.extent(landing.row, landing.tier)
        assert source is not None, "a held block keeps its copy"
        start = image_check.trailer_start(landing.geometry)
        expected = int(self._blocks.trailer_checksum[landing.row])
        key = self._blocks.key_of(landing.row)
        try:
            landing.trailer = await self._lifecycle.tiers[landing.tier].read(
                source,
                start,
                landing.image[start:],
                lambda end: image_check.read_trailer(end, landing.geometry, key, expected),
                priority=due_s,
            )
            if landing.trailer is None:
                raise self._damaged(landing, "the trailer")
        except KVError as error:
            await self._fail(landing, error)

    async def _read_piece(self, landing: PendingPromotion, piece: image_check.ImagePiece, due_s: float) -> None:
        if landing.error is not None:
            return
        trailer, geometry = landing.trailer, landing.geometry
        source = self._blocks.extent(landing.row, landing.tier)
        assert trailer is not None and source is not None
        layers = range(piece.layer_begin, piece.layer_end)
        try:
            damaged = await self._lifecycle.tiers[landing.tier].read(
                source,
                piece.start,
                landing.image[piece.start : piece.end],
                lambda pages: image_check.damaged_layers(pages, piece.start, geometry, layers, trailer.checksums),
                priority=due_s,
            )
            if damaged:
                first_layer = self._blocks.shard_of(landing.row).layer_begin
                raise self._damaged(landing, f"layer {first_layer + damaged[0]}")
            landing.landed(piece)
        except KVError as error:
            await self._fail(landing, error)

    def _damaged(self, landing: PendingPromotion, what: str) -> ChecksumMismatch:
        key = self._blocks.key_of(landing.row).hex()
        return ChecksumMismatch(f"{what} of block {key} is damaged in {landing.tier}", key=key, damaged=what)

    async def _fail(self, landing: PendingPromotion, error: KVError) -> None:
        """A damaged block is a miss from now on, and not only once all others have landed."""
        landing.failed(error)
        self._counters.storage_errors += isinstance(error, StorageFailed)
        if isinstance(error, ChecksumMismatch):
            await self._lifecycle.quarantine(landing.row, landing.generation, landing.tier, error.details["damaged"])

    async def _end(self, landing: PendingPromotion) -> None:
        """Make the block resident in DRAM, or give its space back."""
        row, blocks = landing.row, self._blocks
        placed = False
        try:
            if landing.error is None:
                await self._lifecycle.wait_record_deletes([blocks.object_key_of(row)])
                if not blocks.live[row]:
                    raise BlockNotFound("the block was discarded while it was promoted")
                placed = True  # From here on `place` owns the extent.
                await self._lifecycle.place([row], blocks.first_tier, [landing.extent], landing.unread)
                blocks.verified[row] = blocks.is_resident(row, blocks.first_tier)
                self._counters.promoted_blocks += 1
                self._counters.promoted_bytes += landing.geometry.image_bytes
        except KVError as error:
            # Its bytes are right all the same: whoever reads them from this landing may go on.
            log.debug("a promoted block got no record: %s", error.message)
        finally:
            del self._landings[row]
            landing.done.set()
            self._lifecycle.unhold([row])
            if not placed:
                await landing.unread()
                self._dram.release(landing.extent)


def _layer_major(landings: Sequence[PendingPromotion]) -> Iterator[tuple[PendingPromotion, image_check.ImagePiece]]:
    """Every landing's first piece, then every second one, and so on."""
    for number in range(max(len(landing.pieces) for landing in landings)):
        for landing in landings:
            if number < len(landing.pieces):
                yield landing, landing.pieces[number]
