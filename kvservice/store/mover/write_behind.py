"""Write-behind: copies every block of one tier to the next slower tier soon, so that its eviction costs no I/O.

The bytes are read from the fastest tier that has them: a block that has left the tier above before its copy was made is
still copied, if a faster tier has it.

There is one `WriteBehind` for each two neighbouring tiers. It writes the bytes of several blocks at a time; blocks
whose bytes are written share index commits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.miss_reasons import SpaceFor
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.ranking import Ranking
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice.tiers.base import DurableTier, as_kv_error
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import WRITE
from kvservice_api.errors import BlockNotFound, ChecksumMismatch, IndexFull, StorageFailed, TierFull
from kvservice_api.image import BlockGeometry, Trailer

log = logging.getLogger(__name__)

# Blocks with written bytes and without a committed record. They stay held, so only a few for a slower tier, whose
# commits may hang with a network file system.
_UNRECORDED_MAX = 1024
# A commit flushes the disk's cache, and stalls writes. So many blocks share a commit if no save waits.
_COMMIT_AFTER_S = 0.2
_COMMIT_AFTER_BYTES = 512 << 20
_CHOSEN_TOGETHER = 64  # A question to the policy takes a fifth of a millisecond, whether about one block or many.
_ADDED_A_TURN = 512
_AWAITED_AT_ONCE = 16  # The begin and the end of a write take a tenth of a millisecond of the event loop.
_ENDED_A_TURN = 32
_PAUSE_AFTER_FAILURE_S = 1.0
_TRY_AGAIN_S = 30.0  # If the tier below had no space, and none could be freed.
_TRY_AGAIN_TRIM_S = 5.0  # If its index had no space, while some is being freed.


class WriteBehind:
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
        ranking: Ranking,
        above: TierName,
        target: DurableTier,
        following: WriteBehind | None,
        writes_in_flight: int,
        piece_bytes: int,
    ) -> None:
        """Copies from `above` to the tier after it, which is `target`. `following` copies on from there."""
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._evictor = evictor
        self._dram = dram
        self._target = target
        self._above = above
        self._sources = lifecycle.blocks.tiers[: lifecycle.blocks.position(above) + 1]
        self._below = lifecycle.blocks.tiers[len(self._sources)]
        self._following = following
        self._ranking = ranking
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._loop_budget = loop_budget
        self._writes_in_flight = writes_in_flight
        self._piece_bytes = piece_bytes
        self._queue: deque[tuple[int, int]] = deque()  # (row, generation)
        self._marks: set[tuple[int, int]] = set()  # Those in the queue: however long writes fail, each is in it once.
        self._queued = asyncio.Event()
        self._unasked: set[tuple[int, int]] = set()  # Of the queue: what is written without the policy's consent.
        self._wanted: deque[tuple[int, int]] = deque()  # The next blocks to write, of those that were queued first.
        self._choosing = asyncio.Lock()
        self._pending = 0  # Queued, wanted or running.
        self._writing: dict[tuple[int, int], asyncio.Task[None]] = {}
        of_first_tier = above == lifecycle.blocks.first_tier
        self._unrecorded = asyncio.Semaphore(_UNRECORDED_MAX if of_first_tier else 2 * writes_in_flight)
        self._progress = asyncio.Condition()
        self._copied: list[_Copied] = []
        self._copied_bytes = 0
        self._failing_because = ""
        self._awaited = 0  # Saves that wait for their blocks' copies in the tier below.
        self._awaited_writes = asyncio.Semaphore(_AWAITED_AT_ONCE)
        self._some_copied = asyncio.Event()
        self._enough_copied = asyncio.Event()

    def start(self) -> None:
        """Queue the blocks that an earlier daemon did not write, the oldest first, and start."""
        blocks = self._blocks
        unwritten = blocks.resident(self._above) & ~blocks.resident(self._below) & blocks.live[: blocks.row_end]
        rows = np.flatnonzero(unwritten)
        self.add(rows[np.argsort(blocks.access_seq[rows])].tolist())
        for number in range(self._writes_in_flight):
            self._tasks.start(self._write_forever(), f"write-behind {number}")
        self._tasks.start(self._record_forever(), "write-behind records")

    def add(self, rows: Sequence[int], *, ask: bool = True) -> None:
        """Queue blocks of the upper tier for their copy in the tier below. Without `ask`, the policy cannot refuse."""
        for row in rows:
            mark = (row, int(self._blocks.generation[row]))
            if not ask:
                self._unasked.add(mark)
            if mark not in self._marks:
                self._marks.add(mark)
                self._queue.append(mark)
                self._pending += 1
        self._queued.set()

    async def add_all(self, *, ask: bool = True) -> None:
        """Queue all blocks of the upper tier that no tier below has, also those that were refused or failed before."""
        rows = self._blocks.only_in(self._above)
        for start in range(0, len(rows), _ADDED_A_TURN):
            part = rows[start : start + _ADDED_A_TURN]
            self.add(part[self._blocks.live[part]].tolist(), ask=ask)
            await asyncio.sleep(0)

    def add_missing(self, row: int) -> None:
        """Queue a block that was promoted past the tier below, because only a slower one had it."""
        if not self._blocks.is_resident(row, self._below):
            self.add([row])

    async def written(self, row: int) -> None:
        """Write the block with priority, and wait until it is recorded in the tier below. Raises why that failed."""
        self._awaited += 1
        self._enough_copied.set()
        try:
            if not self._blocks.is_resident(row, self._below):
                async with self._awaited_writes:
                    copied = asyncio.Event()
                    writing = self._begin(row, copied)
                    await copied.wait()  # Not the commit of its record: many blocks share one commit.
                await asyncio.shield(writing)
        finally:
            self._awaited -= 1

    @property
    def pending(self) -> int:
        """The number of queued and running writes."""
        return self._pending

    @property
    def failing_because(self) -> str:
        """Why writes fail now; empty while they succeed."""
        return self._failing_because

    async def idle(self) -> None:
        """Wait until no block is left to write."""
        async with self._progress:
            await self._progress.wait_for(lambda: not self._pending)

    def is_progressing(self) -> bool:
        return self._pending > 0 and not self._failing_because and not self._target.refusing_because

    def is_writing(self) -> bool:
        return bool(self._writing)

    async def wait_for_one(self) -> None:
        async with self._progress:
            await self._progress.wait()

    async def _write_forever(self) -> None:
        while True:
            async with self._choosing:
                while not self._wanted:
                    await self._choose()
                row, generation = self._wanted.popleft()
            if self._failing_because and self._needs_copy(row, generation):
                await self._clock.sleep(_PAUSE_AFTER_FAILURE_S)
            if not self._needs_copy(row, generation):
                await self._are_less(1)
                continue
            await self._unrecorded.acquire()
            copied = asyncio.Event()
            writing = self._begin(row, copied)
            self._tasks.start(self._finish_queued(writing, row, generation), "end of a write-behind")
            await copied.wait()  # Not the commit of its record: many blocks share one commit.

    async def _choose(self) -> None:
        """Wait for queued blocks, and move those that need a copy below from the queue to `_wanted`."""
        while not self._queue:
            self._queued.clear()
            await self._queued.wait()
        marks = [self._queue.popleft() for _ in range(min(_CHOSEN_TOGETHER, len(self._queue)))]
        self._marks.difference_update(marks)
        wanted = [mark for mark in marks if self._needs_copy(*mark)]
        if wanted and self._above == self._blocks.first_tier:  # The policy decides about the first two tiers.
            is_wanted = await self._ranking.wanted_on_ssd(np.array([row for row, _ in wanted]))
            is_wanted |= np.array([mark in self._unasked for mark in wanted])
            wanted = list(compress(wanted, is_wanted.tolist()))
        self._unasked.difference_update(marks)
        self._wanted.extend(wanted)
        await self._are_less(len(marks) - len(wanted))

    def _needs_copy(self, row: int, generation: int) -> bool:
        """Whether the block is still in the upper tier, or in a faster one, and may be copied below."""
        blocks = self._blocks
        if blocks.generation[row] != generation or not blocks.live[row] or self._source(row) is None:
            return False
        # What the tier below has evicted was the least of it: a new copy would only evict a better block.
        is_unwanted = bool(blocks.unwanted[blocks.position(self._below), row])
        return not is_unwanted and self._target.could_hold(int(blocks.size_bytes[row]))

    async def _finish_queued(self, writing: asyncio.Task[None], row: int, generation: int) -> None:
        """Wait for a queued write. If it failed and may succeed later, queue it again."""
        try:
            await writing
            self._note_failure("")
        except (BlockNotFound, ChecksumMismatch):
            pass  # Gone.
        except (TierFull, IndexFull) as error:
            # Meanwhile it may be evicted like any other block, because a wait would not help.
            again_s = _TRY_AGAIN_S
            if isinstance(error, IndexFull):
                self._evictor.trim_index(self._below)
                again_s = _TRY_AGAIN_TRIM_S
            asyncio.get_running_loop().call_later(again_s, self._add_again, row, generation)
        except Exception as error:
            failure = as_kv_error(error)
            self._counters.storage_errors += isinstance(failure, StorageFailed)
            self._note_failure(failure.message)
            self._add_again(row, generation)
        finally:
            self._unrecorded.release()
            await self._are_less(1)

    def _add_again(self, row: int, generation: int) -> None:
        blocks = self._blocks
        if blocks.generation[row] == generation and blocks.live[row] and not blocks.is_resident(row, self._below):
            self.add([row])

    def _note_failure(self, why: str) -> None:
        """While writes or their commits fail, blocks are tried one by one. Logs the first failure only."""
        if why and not self._failing_because:
            log.warning("blocks cannot be written to %s; trying again: %s", self._below, why)
        elif self._failing_because and not why:
            log.info("blocks can be written to %s again", self._below)
        self._failing_because = why

    async def _are_less(self, count: int) -> None:
        """So many blocks are not pending any more."""
        self._pending -= count
        self._commit_if_due()
        async with self._progress:
            self._progress.notify_all()

    def _begin(self, row: int, copied: asyncio.Event | None = None) -> asyncio.Task[None]:
        """The write of this row: a new one, or the running one."""
        mark = (row, int(self._blocks.generation[row]))
        writing = self._writing.get(mark)
        if writing is None:
            writing = self._writing[mark] = self._tasks.start_quietly(self._write(row, copied), "write one block")
            writing.add_done_callback(lambda _: self._ended(mark))
        if copied is not None:
            writing.add_done_callback(lambda _: copied.set())
        return writing

    def _ended(self, mark: tuple[int, int]) -> None:
        del self._writing[mark]
        self._commit_if_due()  # It may have failed, and the others are the last ones now.

    async def _write(self, row: int, copied: asyncio.Event | None) -> None:
        blocks = self._blocks
        source = self._source(row) if blocks.live[row] else None
        if source is None:
            raise BlockNotFound("the block was evicted or discarded before it was written")
        if blocks.is_resident(row, self._below):
            return
        generation = int(blocks.generation[row])
        self._lifecycle.hold([row])
        try:
            geometry = self._lifecycle.geometry(row)
            extent, flush_failures = await self._copy(row, source, geometry)  # Its memory is free before the commit.
            if source.tier == blocks.first_tier:
                blocks.verified[row] = True  # It is held, so it is still this copy.
            if copied is not None:
                copied.set()
            await self._record(row, extent, flush_failures)
            self._counters.written_behind_blocks += 1
            self._counters.tier_written_behind_blocks[self._below] += 1
            self._counters.written_behind_bytes += geometry.image_bytes
        except ChecksumMismatch as error:
            await self._lifecycle.quarantine(row, generation, source.tier, error.message)
            raise
        finally:
            self._lifecycle.unhold([row])

    def _source(self, row: int) -> _Source | None:
        """The fastest copy that is not below."""
        fastest = self._blocks.fastest(row)
        extent = self._blocks.extent(row, fastest) if fastest in self._sources else None
        return None if fastest is None or extent is None else _Source(fastest, extent)

    async def _image(self, source: _Source, geometry: BlockGeometry) -> memoryview:
        """The block's bytes as memory: in place where they are in DRAM, else read into memory of their own."""
        if source.tier == self._blocks.first_tier:
            return self._dram.view(source.extent)[: geometry.image_bytes]
        image = image_check.scratch(geometry.image_bytes)
        await self._lifecycle.tiers[source.tier].read(source.extent, 0, image, priority=WRITE)
        self._counters.tier_read_bytes[source.tier] += len(image)
        return image

    async def _copy(self, row: int, source: _Source, geometry: BlockGeometry) -> tuple[Extent, int]:
        """The copy's place, and how many flushes of its file had failed before."""
        extent = await self._evictor.reserve(self._below, geometry.image_bytes, SpaceFor.COPY)
        with _released_on_error(self._target, extent):
            image = await self._image(source, geometry)
            checksums = self._trailer(row, image, geometry, source.tier).checksums
        try:
            return extent, await self._write_image(extent, image, geometry, checksums, source.tier)
        except StorageFailed as error:
            if self._target.refusing_because:
                raise
            self._counters.storage_errors += 1
            log.warning("a block is written to another drive of %s: %s", self._below, error.message)
        extent = await self._evictor.reserve(self._below, geometry.image_bytes, SpaceFor.COPY)
        return extent, await self._write_image(extent, image, geometry, checksums, source.tier)

    async def _write_image(
        self, extent: Extent, image: memoryview, geometry: BlockGeometry, checksums: NDArray[np.uint64], tier: TierName
    ) -> int:
        """Verify the image of a block in `tier`, and write it. Returns how many flushes of the file had failed before.

        Releases the extent if that fails.
        """
        flush_failures = self._target.flush_failures(extent)
        with _released_on_error(self._target, extent):
            pieces = image_check.cut(geometry, self._piece_bytes)
            for piece in pieces:
                end = len(image) if piece is pieces[-1] else piece.end  # With the last one the trailer.

                def verify(pages: memoryview, piece: image_check.ImagePiece = piece) -> None:
                    if image_check.is_damaged(pages, piece, checksums):
                        raise ChecksumMismatch(f"a layer was damaged in {tier} before the block was written")

                await self._target.write(extent, piece.start, image[piece.start : end], verify)
                self._counters.tier_written_bytes[self._below] += end - piece.start
            await self._target.seal(extent)
        return flush_failures

    def _trailer(self, row: int, image: memoryview, geometry: BlockGeometry, tier: TierName) -> Trailer:
        expected = int(self._blocks.trailer_checksum[row])
        trailer = image_check.read_trailer(image, geometry, self._blocks.key_of(row), expected)
        if trailer is None:
            raise ChecksumMismatch(f"the trailer was damaged in {tier} before the block was written")
        return trailer

    async def _record(self, row: int, extent: Extent, flush_failures: int) -> None:
        """Wait until the index names the extent. Releases the extent if that fails."""
        copied = _Copied(row, extent, flush_failures, asyncio.get_running_loop().create_future())
        self._copied.append(copied)
        self._some_copied.set()
        self._copied_bytes += extent.size_bytes
        self._commit_if_due()
        await copied.recorded

    def _commit_if_due(self) -> None:
        """Commit now if these are the last blocks, or a save waits, or they are many."""
        if not self._copied:
            return
        last = not self._queue and not self._wanted and len(self._writing) <= len(self._copied)
        if self._awaited or last or self._copied_bytes >= _COMMIT_AFTER_BYTES:
            self._enough_copied.set()

    async def _record_forever(self) -> None:
        while True:
            await self._some_copied.wait()
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(_COMMIT_AFTER_S):
                    await self._enough_copied.wait()
            batch, self._copied, self._copied_bytes = self._copied, [], 0
            self._some_copied.clear()
            self._enough_copied.clear()
            for drive in {copied.extent.segment for copied in batch}:  # One that is not flushed fails its own blocks.
                part = [copied for copied in batch if copied.extent.segment == drive]
                self._tasks.start(self._record_batch(part), "record written blocks")

    async def _record_batch(self, batch: list[_Copied]) -> None:
        try:
            names = [self._blocks.object_key_of(copied.row) for copied in batch]
            await self._lifecycle.wait_record_deletes(names, self._below)
        except Exception as error:  # Any error: the saves that wait must get it.
            self._give_up(batch, error)
            return
        if gone := [copied for copied in batch if not self._blocks.live[copied.row]]:
            self._give_up(gone, BlockNotFound("the block was discarded while it was written"))
        batch = [copied for copied in batch if not copied.recorded.done()]
        if not batch:
            return
        rows, extents = [copied.row for copied in batch], [copied.extent for copied in batch]

        def confirm(failure: Exception | None) -> None:
            if failure is not None and not isinstance(failure, StorageFailed):
                raise failure
            if any(self._target.flush_failures(copied.extent) != copied.flush_failures for copied in batch):
                why = "a file was not flushed after blocks were written to it; they are written again"
                raise failure or StorageFailed(why)

        try:
            await self._lifecycle.place(rows, self._below, extents, confirm=confirm)
        except Exception as error:
            for copied in batch:
                copied.fail(error)
        else:
            if self._following is not None:
                self._following.add(rows)
            for count, copied in enumerate(batch):
                if count % _ENDED_A_TURN == 0:
                    await self._loop_budget.slot()  # Each write continues once its block is recorded.
                if not copied.recorded.done():
                    copied.recorded.set_result(None)

    def _give_up(self, batch: list[_Copied], error: Exception) -> None:
        for copied in batch:
            self._target.release(copied.extent)  # No record names the extent.
            copied.fail(error)


class _Source(NamedTuple):
    """A copy that is read."""

    tier: TierName
    extent: Extent


@dataclass(frozen=True, slots=True, eq=False)
class _Copied:
    """A block whose bytes are in the tier below, and whose record is not committed yet."""

    row: int
    extent: Extent
    flush_failures: int  # Of its file, before the first write.
    recorded: asyncio.Future[None]

    def fail(self, error: Exception) -> None:
        if not self.recorded.done():  # For example, its write was cancelled.
            self.recorded.set_exception(error)


@contextlib.contextmanager
def _released_on_error(target: DurableTier, extent: Extent) -> Iterator[None]:
    try:
        yield
    except BaseException:
        target.release(extent)  # No record names the extent yet.
        raise
