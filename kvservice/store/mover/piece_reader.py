"""Reads the pieces of promotions, and verifies them.

Each drive has one order of all the pieces that are read from it, and a few tasks that queue reads for its I/O threads.
A thread takes the pieces of its next read from that order when it is free: pieces that became urgent meanwhile come
first, and no thread waits for the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.image_check import ImagePiece
from kvservice.store.mover.pending_promotion import PendingPromotion
from kvservice.store.mover.promotion_spans import LayerReads
from kvservice.store.mover.read_order import ReadOrder
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice.tiers.base import PartRead, PartSums, as_kv_error, read_together
from kvservice_api import spans
from kvservice_api.errors import ChecksumMismatch, KVError, StorageFailed
from kvservice_api.file_parts import NO_RANGES

_PROGRESS_S = 0.01  # Loads that wait for one drive are woken this often by reads from any.


class ReadBatch:
    """Promotions whose reads begin together."""

    def __init__(self, promotions: Sequence[PendingPromotion], clock: Clock) -> None:
        trace = spans.current()
        self.traced = None if trace is None else LayerReads(promotions, trace, clock)
        self.promotions_left = len(promotions)
        self.over = asyncio.Event()


class _Drive:
    """One file of a tier, or what the tier has in place of files."""

    def __init__(self, order: ReadOrder) -> None:
        self.order = order
        self.workers = 0


class PieceReader:
    """Called on the event loop."""

    def __init__(
        self,
        lifecycle: BlockLifecycle,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        loop_budget: LoopBudget,
        over: Callable[[Sequence[PendingPromotion]], None],
        *,
        reads_in_flight: int,
        piece_bytes: int,
    ) -> None:
        """`over` is called with promotions whose pieces are all read or have failed. `reads_in_flight` is per drive."""
        self._lifecycle = lifecycle
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._loop_budget = loop_budget
        self._over = over
        self._reads_in_flight = reads_in_flight
        self._piece_bytes = piece_bytes
        self._drives: dict[tuple[TierName, int], _Drive] = {}
        self._waiters: list[tuple[PendingPromotion, asyncio.Future[None]]] = []
        self._woken_s = 0.0  # When all of them were woken.

    async def progress(self, pending: PendingPromotion) -> None:
        """Wait for the end of the next read of this promotion, with or without success. Returns now and then also while
        reads of others end.
        """
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append((pending, waiter))
        await waiter

    async def read(self, promotions: Sequence[PendingPromotion]) -> None:
        """Read all pieces. Returns once each is verified, or has failed."""
        batch = ReadBatch(promotions, self._clock)
        of_drive: dict[tuple[TierName, int], list[PendingPromotion]] = {}
        for each in promotions:
            each.batch = batch
            of_drive.setdefault((each.source.tier, each.source.extent.segment), []).append(each)
        for place, some in of_drive.items():
            if place not in self._drives:
                order = ReadOrder(job_bytes=self._piece_bytes, jobs_at_once=self._reads_in_flight)
                self._drives[place] = _Drive(order)
            drive = self._drives[place]
            drive.order.add(some)
            # Also if other tasks run: their reads may be behind less urgent ones in the queue of the I/O threads.
            for _ in range(min(self._reads_in_flight, sum(each.pieces_left for each in some))):
                drive.workers += 1
                self._tasks.start(self._work(*place, drive), "reads of promotions")
        await batch.over.wait()

    async def _work(self, tier: TierName, segment: int, drive: _Drive) -> None:
        try:
            while (priority := drive.order.priority) is not None:
                await self._read_job(tier, segment, drive.order, priority)
                if drive.workers > self._reads_in_flight:
                    break
        finally:
            drive.workers -= 1
            if not drive.workers:
                del self._drives[tier, segment]

    async def _read_job(self, tier: TierName, segment: int, order: ReadOrder, priority: float) -> None:
        job = _Job(order)
        loop = asyncio.get_running_loop()

        def check(found: list[PartSums]) -> None:
            job.check(found)
            # The loads of these pieces do not wait for what the event loop has to do before this job's end.
            loop.call_soon_threadsafe(self._wake, job)

        try:
            await read_together(self._lifecycle.tiers[tier], segment, job.take, check, priority=priority)
        except Exception as error:
            job.fail(as_kv_error(error))
        await self._loop_budget.slot()
        self._counters.tier_read_bytes[tier] += job.read_bytes
        for pending, failure in job.failures:  # Only now: the right pieces do not wait for a quarantine.
            self._fail(pending, failure)
        for pending, piece, sums in job.waiting:
            await pending.trailer_known()
            if (damage := _damage(pending, piece, sums)) is not None:
                self._fail(pending, damage)
        self._note_read(job.pieces)
        if job.failures or job.waiting:
            self._wake(job)

    def _wake(self, job: _Job) -> None:
        read = {pending for pending, _ in job.pieces}
        for pending in read:
            pending.wake()
        now_s = self._clock.monotonic_s()
        if is_for_all := now_s - self._woken_s >= _PROGRESS_S:
            self._woken_s = now_s
        waiters, self._waiters = self._waiters, []
        for pending, waiter in waiters:
            if waiter.done():  # Its load was cancelled.
                continue
            if is_for_all or pending in read:
                waiter.set_result(None)
            else:
                self._waiters.append((pending, waiter))

    def _note_read(self, job: Sequence[tuple[PendingPromotion, ImagePiece]]) -> None:
        over = list[PendingPromotion]()
        for pending, piece in job:
            batch = pending.batch
            assert batch is not None
            if batch.traced is not None:
                batch.traced.end(piece)
            pending.pieces_left -= 1
            if not pending.pieces_left:
                over.append(pending)
                batch.promotions_left -= 1
                if not batch.promotions_left:
                    batch.over.set()
        if over:
            self._over(over)

    def _fail(self, pending: PendingPromotion, error: KVError) -> None:
        """Take a damaged block out of service at once, before the other promotions have ended. No read waits until the
        index has recorded that: a tier below SSD may hang.
        """
        if "key" not in error.details:  # Of its own: several blocks may have failed by the same error.
            error = type(error)(error.message, **{**error.details, "key": pending.source.key.hex()})
        self._counters.storage_errors += isinstance(error, StorageFailed)
        if isinstance(error, ChecksumMismatch):
            tier, what = pending.source.tier, error.details["damaged"]
            quarantine = self._lifecycle.quarantine(pending.row, pending.generation, tier, what)
            self._tasks.start(quarantine, "quarantine")  # It runs before the loads that get the error.
        pending.failed(error)


class _Job:
    """Pieces that are read together. `take` and `check` are called on an I/O thread."""

    def __init__(self, order: ReadOrder) -> None:
        self._order = order
        self._reads: list[list[PartRead]] = []  # Of each piece.
        self.pieces: list[tuple[PendingPromotion, ImagePiece]] = []
        self.read_bytes = 0
        self.failures: list[tuple[PendingPromotion, KVError]] = []
        # Pieces that wait for the trailers of their blocks, with the checksums of their layers.
        self.waiting: list[tuple[PendingPromotion, ImagePiece, NDArray[np.uint64]]] = []

    def take(self) -> list[PartRead]:
        self.pieces += self._order.next()
        self._reads += [_reads_of(pending, piece) for pending, piece in self.pieces]
        return list(itertools.chain.from_iterable(self._reads))

    def check(self, found: list[PartSums]) -> None:
        """Verify the pieces. `found` has the result of each read."""
        results = iter(found)
        for (pending, piece), reads in zip(self.pieces, self._reads, strict=True):
            if not reads:
                continue
            of_piece = list(itertools.islice(results, len(reads)))
            errors = [each for each in of_piece if isinstance(each, KVError)]
            self.read_bytes += sum(
                len(read.into) for read, result in zip(reads, of_piece, strict=True) if not isinstance(result, KVError)
            )
            if errors:
                self.failures.append((pending, errors[0]))
                continue
            if piece is pending.pieces[0]:
                pending.read_trailer()
            sums = of_piece[0]
            assert not isinstance(sums, KVError)
            if pending.trailer is None and piece is not pending.pieces[0]:
                self.waiting.append((pending, piece, sums))
            elif (damage := _damage(pending, piece, sums)) is not None:
                self.failures.append((pending, damage))

    def fail(self, error: KVError) -> None:
        """All of it. Pieces that no thread has taken are taken here: else they would be tried for ever."""
        self.pieces = self.pieces or self._order.next()
        self.waiting.clear()
        self.failures = [(pending, error) for pending, _ in self.pieces]


def _reads_of(pending: PendingPromotion, piece: ImagePiece) -> list[PartRead]:
    """The parts to read for this piece; with the first piece also the trailer. No parts if the promotion has failed.
    Called on an I/O thread.
    """
    if pending.error is not None:
        return []
    assert pending.batch is not None
    if pending.batch.traced is not None:
        pending.batch.traced.begin(piece)
    extent = pending.source.extent
    reads = [PartRead(extent, piece.start, pending.image[piece.start : piece.end], piece.slices)]
    if piece is pending.pieces[0]:
        start = image_check.trailer_start(pending.geometry)
        reads.append(PartRead(extent, start, pending.image[start:], NO_RANGES))
    return reads


def _damage(pending: PendingPromotion, piece: ImagePiece, sums: NDArray[np.uint64]) -> ChecksumMismatch | None:
    """Compare the checksums of a piece's layers with those in the trailer, which has been read. If they are equal,
    loads may read the layers from now on. Returns the error otherwise; None too if the promotion has failed already.
    """
    if pending.error is not None:
        return None
    if pending.trailer is None:
        return _damaged(pending, "the trailer")
    are_right = sums == pending.trailer.checksums[piece.layer_begin : piece.layer_end]
    if not are_right.all():
        damaged = piece.layer_begin + int(are_right.argmin())
        return _damaged(pending, f"layer {pending.trailer.shard.layer_begin + damaged}")
    pending.piece_verified(piece)
    return None


def _damaged(pending: PendingPromotion, what: str) -> ChecksumMismatch:
    key, tier = pending.source.key.hex(), pending.source.tier
    return ChecksumMismatch(f"{what} of block {key} is damaged in {tier}", key=key, damaged=what)
