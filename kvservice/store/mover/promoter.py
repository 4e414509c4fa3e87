"""Promotion: copies blocks from a slower tier to DRAM, layer by layer. A load sends each layer once it is verified.

The promoter reads the layers of all blocks of a load in the order in which the load sends them: layer 0 of every
block first, in small pieces (`read_order.py`). A load that joins a promotion makes it as urgent as itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

import numpy as np

from kvservice.blocks import Extent
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.miss_reasons import SpaceFor
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.pending_promotion import PendingPromotion, StoredCopy
from kvservice.store.mover.piece_reader import PieceReader
from kvservice.store.mover.read_order import ReadOrder
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice.tiers.dram import DramTier
from kvservice_api import spans
from kvservice_api.errors import KVError, StorageFailed, TierFull
from kvservice_api.image import BlockGeometry

log = logging.getLogger(__name__)

_FIRST_BYTES = 64 << 10  # Of the first piece of a block at least: smaller reads take a disk as long.
_FIRST_BATCH_ROWS = 32
_ROWS_A_TURN = 32  # They take a millisecond of the event loop.
_MEASURED_BYTES = 4 << 20  # The bandwidth is measured over this much,
_RATE_WEIGHT = 0.2  # and the last measurement has this weight.
# Each commit takes a millisecond of the event loop, so blocks that end within this time share one.
_END_AFTER_S = 0.005
_SPACE_WAIT_S = 0.2  # After this time, a load reads from the slower tier instead of waiting for space in DRAM.


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
        piece_bytes: int,
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
        self._piece_bytes = piece_bytes
        self._reader = PieceReader(
            lifecycle,
            clock,
            counters,
            tasks,
            loop_budget,
            self._note_over,
            reads_in_flight=reads_in_flight,
            piece_bytes=piece_bytes,
        )
        self._pending: dict[int, PendingPromotion] = {}
        self._reserving: dict[int, asyncio.Future[None]] = {}
        self._over: list[PendingPromotion] = []  # All their pieces are read, or have failed.
        self._enough_over = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
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

    async def progress(self, pending: PendingPromotion) -> None:
        """Wait for the end of the next read of this promotion, with or without success. Returns now and then also while
        reads of others end.
        """
        await self._reader.progress(pending)

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
        ordered = list(dict.fromkeys(rows))
        wanted = np.array(ordered, np.int64)
        absent = wanted[~self._blocks.lie_in(wanted, self._blocks.first_tier)]
        later_bytes = int(self._blocks.size_bytes[absent].sum())
        due_s = self._clock.monotonic_s() + within_s
        begun, batch_rows = list[PendingPromotion](), _FIRST_BATCH_ROWS
        _hurry([self._pending[row] for row in ordered if row in self._pending], due_s)
        try:
            for start in range(0, len(ordered), _ROWS_A_TURN):
                await self._loop_budget.slot()  # If there is space, nothing below waits.
                part = ordered[start : start + _ROWS_A_TURN]
                begun += (at_once := self._reserve_at_once(part, due_s))
                later_bytes -= sum(each.geometry.image_bytes for each in at_once)
                for row in part:
                    while row in self._reserving:
                        await asyncio.wait({self._reserving[row]})
                    if row not in self._pending and self._should_promote(row):
                        later_bytes -= int(self._blocks.size_bytes[row])
                        begun.append(await self._reserve(row, due_s, worth, space_for, later_bytes))
                if len(begun) >= batch_rows:  # Reads begin while space for the next ones is reserved.
                    self._tasks.start(self._read_all(begun, space_for), "promotion")
                    begun, batch_rows = [], 2 * batch_rows
        except (TierFull, StorageFailed) as error:
            # The later rows will not fit either: loads read them from the slower tier.
            log.debug("no space to promote: %s", error.message)
        finally:
            if begun:
                self._tasks.start(self._read_all(begun, space_for), "promotion")
        if len(absent):
            for _ in range(2):  # A turn for the task, and one for its reads: what the caller does next takes longer.
                await asyncio.sleep(0)
        # Without those that have ended during a wait of this call: their image is invalid.
        found = {row: self._pending[row] for row in ordered if row in self._pending}
        _hurry(found.values(), due_s)
        return found

    def _should_promote(self, row: int) -> bool:
        blocks = self._blocks
        below = blocks.fastest(row) not in (None, blocks.first_tier)
        return below and bool(blocks.live[row])

    async def _reserve(
        self, row: int, due_s: float, worth: float, space_for: SpaceFor, more_bytes: int
    ) -> PendingPromotion:
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
        return self._add(row, geometry, extent, due_s, self._cut(geometry))

    def _reserve_at_once(self, rows: Sequence[int], due_s: float) -> list[PendingPromotion]:
        """Promotions of the first rows of these that are only in slower tiers, as far as space is free."""
        blocks, among = self._blocks, np.array(rows, np.int64)
        are_below = blocks.live[among] & blocks.lie_anywhere(among) & ~blocks.lie_in(among, blocks.first_tier)
        wanted = [row for row in among[are_below].tolist() if row not in self._pending and row not in self._reserving]
        geometries = self._lifecycle.geometries(wanted)
        sizes = [geometry.image_bytes for geometry in geometries]
        extents = self._evictor.reserve_at_once(blocks.first_tier, sizes)
        self._lifecycle.hold(wanted[: len(extents)])
        pieces = {id(geometry): self._cut(geometry) for geometry in {id(each): each for each in geometries}.values()}
        return [
            self._add(row, geometry, extent, due_s, pieces[id(geometry)])
            for row, geometry, extent in zip(wanted, geometries, extents, strict=False)
        ]

    def _cut(self, geometry: BlockGeometry) -> Sequence[image_check.ImagePiece]:
        return image_check.cut(geometry, self._piece_bytes, _FIRST_BYTES)

    def _add(
        self,
        row: int,
        geometry: BlockGeometry,
        extent: Extent,
        due_s: float,
        pieces: Sequence[image_check.ImagePiece],
    ) -> PendingPromotion:
        image = self._dram.view(extent)[: geometry.image_bytes]
        blocks, tier = self._blocks, self._blocks.fastest(row)
        place = blocks.extent(row, tier) if tier is not None else None
        assert tier is not None and place is not None, "a held block keeps its copy"
        source = StoredCopy(tier, place, blocks.key_of(row), int(blocks.trailer_checksum[row]))
        pending = self._pending[row] = PendingPromotion(
            row, int(blocks.generation[row]), geometry, source, extent, image, due_s=due_s, pieces=pieces
        )
        return pending

    async def _read_all(self, promotions: list[PendingPromotion], space_for: SpaceFor) -> None:
        """Read all pieces, several at a time, and end each promotion after its last piece."""
        began_s, reason = self._clock.monotonic_s(), space_for.name.lower()
        size_bytes = sum(each.geometry.image_bytes for each in promotions)
        tier, count = str(promotions[0].source.tier), len(promotions)
        with (
            self._measured(promotions),
            spans.span("kvservice.promote", tier=tier, blocks=count, bytes=size_bytes, reason=reason),
        ):
            await self._reader.read(promotions)
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

    def _note_over(self, promotions: Sequence[PendingPromotion]) -> None:
        """End them as a task, so that the next reads do not wait for the commit."""
        self._over += promotions
        self._check_enough()
        if self._ending is None:
            self._end_next()

    def _check_enough(self) -> None:
        if self._over and len(self._over) >= min(_ROWS_A_TURN, len(self._pending)):
            self._enough_over.set()

    def _end_next(self, ended: asyncio.Task[None] | None = None) -> None:
        self._ending = None
        if ended is not None and ended.cancelled():  # The daemon stops: it would cancel a new task too, without end.
            return
        if self._over:
            self._check_enough()
            self._ending = self._tasks.start(self._end_some(), "end of promotions")
            self._ending.add_done_callback(self._end_next)

    async def _end_some(self) -> None:
        """End promotions that are over, all that share a commit of the index: soon, or once they are many or all."""
        with suppress(TimeoutError):
            async with self._clock.timeout(_END_AFTER_S):
                await self._enough_over.wait()
        self._enough_over.clear()
        over, self._over = self._over[:_ROWS_A_TURN], self._over[_ROWS_A_TURN:]
        await self._end(over)

    async def _end(self, promotions: Sequence[PendingPromotion]) -> None:
        """Make the blocks resident in DRAM, or release their space.

        A block whose earlier record has not been deleted yet waits for that alone: it keeps no other one out of DRAM.
        """
        tier, now = self._blocks.first_tier, list[PendingPromotion]()
        for each in promotions:
            if each.error is None and self._lifecycle.is_record_leaving(self._blocks.object_key_of(each.row), tier):
                self._tasks.start(self._end_late(each), "end of a promotion")
            else:
                now.append(each)
        await self._end_now(now)

    async def _end_late(self, pending: PendingPromotion) -> None:
        key, tier = self._blocks.object_key_of(pending.row), self._blocks.first_tier
        try:
            await self._lifecycle.wait_record_deletes([key], tier)
        except BaseException as error:
            self._ended([pending], placed=())
            if not isinstance(error, KVError):
                raise
            log.debug("a promoted block was not recorded: %s", error.message)
        else:
            await self._end_now([pending])

    async def _end_now(self, promotions: Sequence[PendingPromotion]) -> None:
        """Of blocks without records that are being deleted."""
        # `place` owns the extents of these from here on.
        placed = [each for each in promotions if each.error is None and self._blocks.live[each.row]]
        try:
            if placed:
                await self._place(placed)
        except KVError as error:
            # The bytes are right, so loads may continue to read them.
            log.debug("the records of promoted blocks were not written: %s", error.message)
        finally:
            self._ended(promotions, placed)

    def _ended(self, promotions: Sequence[PendingPromotion], placed: Sequence[PendingPromotion]) -> None:
        for each in promotions:
            del self._pending[each.row]
            each.done.set()
            if each not in placed:
                self._tasks.start(self._release(each), "release the space of a promotion")
        self._lifecycle.unhold([each.row for each in promotions])

    async def _place(self, promotions: Sequence[PendingPromotion]) -> None:
        rows = np.array([each.row for each in promotions], np.int64)

        async def unread() -> None:
            for each in promotions:
                await each.unread()

        await self._lifecycle.place(
            rows.tolist(),
            self._blocks.first_tier,
            [each.extent for each in promotions],
            unread,
            make_room=self._evictor.make_room_in_index,
        )
        self._blocks.verified[rows] = self._blocks.lie_in(rows, self._blocks.first_tier)
        self._counters.promoted_blocks += len(rows)
        self._counters.promoted_bytes += sum(each.geometry.image_bytes for each in promotions)
        for row in rows.tolist():
            self._write_behind.add_missing(row)

    async def _release(self, pending: PendingPromotion) -> None:
        await pending.unread()
        self._dram.release(pending.extent)


def _hurry(promotions: Iterable[PendingPromotion], due_s: float) -> None:
    """Make those that are due later than `due_s` due at `due_s`."""
    of_order: dict[ReadOrder, list[PendingPromotion]] = {}
    for pending in promotions:
        if pending.due_s <= due_s:
            continue
        if pending.order is None:
            pending.due_s = due_s
        else:
            of_order.setdefault(pending.order, []).append(pending)
    for order, some in of_order.items():
        order.hurry(some, due_s)
