"""Copies of blocks in tiers, and the order of bytes, records and reuse.

The two rules that make ``kill -9`` harmless are only here:

* ``admit`` and ``place``: a record names an extent only after its bytes are complete there.
* ``evict`` and ``discard``: an extent is released only after the commit that removes its record.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Extent, Rows, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.index.block_index import BlockIndex
from kvservice.index.environment import Confirm, all_durable
from kvservice.index.records import Records, new_records
from kvservice.store.miss_reasons import Eviction, MissReasons, Reason
from kvservice.store.tails import Tails
from kvservice.store.tasks import Tasks
from kvservice.tiers.base import Tier
from kvservice_api.errors import IndexFull, KVError, StorageFailed
from kvservice_api.image import BlockGeometry, block_geometry

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_SETTLED_WITHIN_S = 5.0
_FLUSHED_WITHIN_S = 5.0  # Each part of a tier. A tier below SSD may hang.
_FLUSH_ROWS = 256  # They take one to two milliseconds of the event loop.
_NOTED_A_TURN = 32  # They take two milliseconds of the event loop: listeners note each block.

_COPIED = (
    "layout_id token_count hits trailer_checksum stored_at_ms used_at_ms access_seq parent_key pinned_until_ms tenant"
).split()


MakeRoom = Callable[[TierName, int], Awaitable[bool]]  # As `Evictor.make_room_in_index`.


class BlockLifecycle:
    """The block table, the tiers' space and the index's records, changed together."""

    def __init__(
        self,
        blocks: BlockTable,
        tiers: Mapping[TierName, Tier],
        index: BlockIndex,
        counters: Counters,
        tasks: Tasks,
        history: MissReasons,
        clock: Clock,
    ) -> None:
        self.blocks = blocks
        self.tiers = tiers
        self._index = index
        self._layouts = index.layouts
        self._counters = counters
        self._tasks = tasks
        self.history = history
        self._clock = clock
        self.tails = Tails(blocks, index.layouts)
        # Tiers below the second may be network file systems, which hang. Evictions from other tiers do not wait for
        # their records, so after a crash a copy that such a tier evicted may be found again. Its bytes are the same.
        self._may_hang = frozenset(blocks.tiers[2:])
        self._leaving: dict[tuple[TierName, bytes], asyncio.Future[None]] = {}  # Records that are being removed.
        self._placing: dict[tuple[int, TierName], asyncio.Future[None]] = {}  # Rows whose records are being written.

    # About one row

    def geometry(self, row: int) -> BlockGeometry:
        """The geometry of the row's image."""
        layout = self._layouts[int(self.blocks.layout_id[row])]
        return block_geometry(layout, self.blocks.shard_of(row), int(self.blocks.token_count[row]))

    def geometries(self, rows: Sequence[int]) -> list[BlockGeometry]:
        """The same for many rows, most of which have the same one."""
        array, found = np.asarray(rows, np.int64), dict[Any, BlockGeometry]()
        columns = (self.blocks.layout_id, self.blocks.shard, self.blocks.token_count)
        kinds = list(zip(*(column[array].tolist() for column in columns), strict=True))
        for row, kind in zip(rows, kinds, strict=True):
            if kind not in found:
                found[kind] = self.geometry(row)
        return [found[kind] for kind in kinds]

    def is_free(self, row: int) -> bool:
        """Whether nothing keeps the row's bytes in place."""
        return not self.blocks.leases[row] and not self.blocks.holds[row]

    # Holding: held or leased rows keep their bytes in their place.

    def hold(self, rows: Rows | Sequence[int]) -> None:
        """Keep the rows' bytes in place while I/O runs. Pair with `unhold` of the same rows.

        A row that is named twice counts once, in both calls.
        """
        self.blocks.holds[np.asarray(rows, np.int64)] += 1

    def unhold(self, rows: Rows | Sequence[int]) -> None:
        self.blocks.holds[np.asarray(rows, np.int64)] -= 1
        self._free_unreferenced(rows)

    def lease(self, rows: Rows) -> None:
        """Begin leases on the rows, one for each time that a row is named. Pair with `unlease`."""
        _add(self.blocks.leases, rows, 1)

    def unlease(self, rows: Rows) -> None:
        """End leases on the rows, one for each time that a row is named."""
        _add(self.blocks.leases, rows, -1)
        self._free_unreferenced(rows)

    # Placing

    async def wait_record_deletes(self, object_keys: Iterable[bytes], tier: TierName | None = None) -> None:
        """Wait until no record of these objects is being removed, so that a new one is not removed with it.

        Without `tier` for a new object: no tier may keep a record of other bytes. With it for another copy of a stored
        object: records that other tiers still have are of the same bytes. Raises StorageFailed if the old ones cannot
        be removed.
        """
        tiers = self.tiers if tier is None else (tier,)
        records = [(each, name) for name in object_keys for each in tiers]
        try:
            async with self._clock.timeout(_SETTLED_WITHIN_S):
                while waiting := {self._leaving[record] for record in records if record in self._leaving}:
                    await asyncio.wait(waiting)
        except TimeoutError:
            raise StorageFailed("the record of an earlier copy could not be removed yet") from None

    def is_record_leaving(self, object_key: bytes, tier: TierName) -> bool:
        """Whether a record of this object is being removed from the tier's index."""
        return (tier, object_key) in self._leaving

    async def place(
        self,
        rows: Sequence[int],
        tier: TierName,
        extents: Sequence[Extent],
        unread: Callable[[], Awaitable[None]] | None = None,
        confirm: Confirm = all_durable,
        make_room: MakeRoom | None = None,
    ) -> None:
        """Record that the rows' bytes are complete in `extents`, then let lookups find them there.

        If the index is full, `make_room` is called with the tier and the number of rows, as long as it evicts blocks.
        If the index or `confirm` (see `BlockIndex.put`) refuses, the caller gets the error, and the extents are
        released once `unread` has returned, when no load reads them any more.
        """
        names = [self.blocks.object_key_of(row) for row in rows]
        placed = asyncio.get_running_loop().create_future()
        self._placing |= dict.fromkeys(((row, tier) for row in rows), placed)
        self.hold(rows)
        try:
            records = self._records(rows, extents)
            while True:
                try:
                    await self._index.put(tier, names, records, confirm)
                    break
                except IndexFull:
                    if make_room is None or not await make_room(tier, len(rows)):
                        raise
            while len(late := self._pinned_meanwhile(rows, records)):
                records[late] = self._records([rows[at] for at in late], [extents[at] for at in late])
                await self._index.put_again(tier, [names[at] for at in late], records[late])
        except BaseException:
            # A failed or abandoned commit may have reached the disk: its record must go before reuse.
            removal = _Removal(self._leaving, [tier], names)
            work = self._remove_until_done(removal, {tier: list(extents)}, (), unread)
            self._tasks.start(work, "withdraw records")
            raise
        else:
            array = np.asarray(rows, np.int64)
            self.blocks.set_extents(array, tier, *np.array(extents, np.int64).T)
            self._note_arrival(array, tier)
            await _in_turns(array[self.blocks.live[array]].tolist(), self._tell)
        finally:
            for row in rows:
                del self._placing[row, tier]
            placed.set_result(None)
            self.unhold(rows)

    async def relocate(self, rows: Sequence[int], tier: TierName, extents: Sequence[Extent]) -> None:
        """Record that the rows' bytes are in these extents too, and release their places so far. Before the start of
        the store, when nothing else uses them.

        After an error either place may be recorded. Both have the bytes, so that the next start continues.
        """
        await self._index.put(tier, [self.blocks.object_key_of(row) for row in rows], self._records(rows, extents))
        for row, extent in zip(rows, extents, strict=True):
            old = self.blocks.extent(row, tier)
            assert old is not None
            self.blocks.set_extent(row, tier, extent)
            self.tiers[tier].release(old)

    def _note_arrival(self, rows: Rows, tier: TierName) -> None:
        """Since when the copies exist: for a new block its own time, else a later time."""
        stored_ms = self.blocks.stored_at_ms[rows]
        later_ms = np.maximum(stored_ms + np.uint64(1), np.uint64(self._clock.wall_ms()))
        self.blocks.since_ms(tier)[rows] = np.where(self.blocks.live[rows], later_ms, stored_ms)

    def _pinned_meanwhile(self, rows: Sequence[int], records: Records) -> list[int]:
        """Positions of rows that were pinned or unpinned after these records were made, which `write_records` missed.

        Without discarded rows: the removal of their records has been submitted.
        """
        array = np.asarray(rows, np.int64)
        other = self.blocks.pinned_until_ms[array] != records["pinned_until_ms"]
        found: list[int] = np.flatnonzero(other & self.blocks.live[array]).tolist()
        return found

    async def admit(self, rows: Sequence[int], extents: Sequence[Extent], make_room: MakeRoom | None = None) -> None:
        """Record new objects, whose bytes are complete in the first tier, then make them visible, in order.

        If the index refuses, rows and extents are released. A caller that is cancelled after the records were written
        gets CancelledError once all rows are visible, because records name their extents.
        """
        self.hold(rows)
        try:
            await self.place(rows, self.blocks.first_tier, extents, make_room=make_room)
            await _in_turns(rows, self._link)
        finally:
            self.unhold(rows)  # Frees the rows that were not linked.

    def _link(self, rows: Sequence[int]) -> None:
        """Make the rows visible."""
        for row in rows:
            self.blocks.link(row)
        self.tails.add(rows)

    def _tell(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.blocks.tell(row)

    async def flush_recency(self) -> None:
        """Write use times and hit counts of the blocks used since the last flush into their records."""
        blocks = self.blocks
        used = np.flatnonzero(blocks.used_since_flush[: blocks.row_end] & blocks.live[: blocks.row_end])
        blocks.used_since_flush[used] = False
        failure: KVError | None = None
        for tier in self.tiers:
            try:
                for start in range(0, len(used), _FLUSH_ROWS):
                    async with self._clock.timeout(_FLUSHED_WITHIN_S):
                        await self._write_records(used[start : start + _FLUSH_ROWS].tolist(), tier)
            except TimeoutError:
                failure = failure or StorageFailed(f"the index of {tier} did not answer in {_FLUSHED_WITHIN_S:g} s")
            except KVError as error:
                failure = failure or error  # The other tiers' records are written nevertheless.
        if failure is not None:
            blocks.used_since_flush[used] = True  # At the next flush.
            raise failure

    async def write_records(self, rows: Sequence[int]) -> None:
        """Write the present records of these rows, in every tier that has them, or soon will."""
        writes = [self._write_records(rows, tier) for tier in self.tiers]
        await asyncio.gather(*writes)
        placing = {self._placing[row, tier] for row in rows for tier in self.tiers if (row, tier) in self._placing}
        if placing:  # Their records were made before; `place` makes them again.
            await asyncio.wait(placing)

    def _write_records(self, rows: Sequence[int], tier: TierName) -> asyncio.Future[None]:
        blocks = self.blocks
        # Read again each time, because blocks leave and move while others are committed.
        there = [row for row in rows if blocks.live[row] and blocks.is_resident(row, tier)]
        extents = [extent for row in there if (extent := blocks.extent(row, tier))]
        names = [blocks.object_key_of(row) for row in there]
        return self._index.put_again(tier, names, self._records(there, extents))

    # Dropping

    async def evict(self, rows: Sequence[int], tier: TierName, eviction: Eviction | None = None) -> None:
        """Drop copies that nothing holds from one tier. A block without another copy is forgotten.

        `eviction` says which policy chose them, and why; None for a request. Raises StorageFailed if the records could
        not be removed; the copies then leave later.
        """
        blocks = self.blocks
        last_copies = [row for row in rows if blocks.tiers_of(row) == [tier]]
        demoted = [row for row in rows if blocks.tiers_of(row) != [tier]]
        freed: list[Extent] = []
        for row in rows:
            assert blocks.live[row] and self.is_free(row), "a held copy is not evicted"
        for row in demoted:
            extent = blocks.extent(row, tier)
            assert extent is not None
            freed.append(extent)
            blocks.set_extent(row, tier, None)
            blocks.unwanted[blocks.position(tier), row] = True
        if tier == blocks.first_tier:
            self._counters.evicted_dram_blocks += len(rows)
            self._counters.lost_unwritten_blocks += len(last_copies)
        else:
            self._counters.evicted_ssd_blocks += len(rows)
        blocks.unwanted[blocks.position(tier), last_copies] = True  # For the listeners: it was no discard.
        if log.isEnabledFor(logging.DEBUG):
            space_for = "a request" if eviction is None else eviction.space_for.name.lower()
            counts = {"blocks": len(rows), "last_copies": len(last_copies)}
            log.debug("evicted", extra={"tier": tier, **counts, "space_for": space_for})
        why = Reason.EVICTED if eviction is not None else Reason.EVICTED_ON_REQUEST
        for part, last_copy in ((demoted, False), (last_copies, True)):
            self.history.note_rows(blocks, part, why, tier=tier, last_copy=last_copy, eviction=eviction)
        # Both begin before the first await, so that no task sees or cancels half of the change.
        removals = [
            self._begin_removal({tier: freed}, demoted, hold=tier not in self._may_hang),
            self._begin_discard(last_copies, excluded=self._may_hang - {tier}),
        ]
        for removal in removals:
            await removal.recorded()

    async def discard(self, rows: Sequence[int], why: Reason = Reason.DISCARDED, detail: str = "") -> None:
        """Forget blocks everywhere: invisible at once, records next, bytes when nothing holds them.

        `detail` is the reason, if it was not a request.
        """
        self.history.note_rows(self.blocks, rows, why, detail=detail)
        await self._begin_discard(rows).recorded()

    async def quarantine(self, row: int, generation: int, tier: TierName, what: str) -> None:
        """Take a block with damaged bytes out of service, in every tier: it becomes a miss.

        `generation` is the row's from before its bytes were read. If the row has another generation now, the damaged
        block is gone, and the row has another block.
        """
        if self.blocks.generation[row] != generation:
            return
        extent = self.blocks.extent(row, tier)
        log.error(
            "a damaged block was quarantined: %s of %s in %s",
            what,
            self.blocks.key_of(row).hex(),
            tier,
            extra={"key": self.blocks.key_of(row).hex(), "tier": tier, "extent": extent, "damaged": what},
        )
        if self.blocks.live[row]:
            self._counters.quarantined_blocks += 1
            self.history.note_rows(self.blocks, [row], Reason.QUARANTINED, tier=tier)
            with contextlib.suppress(StorageFailed):  # The block is invisible already; its records are removed later.
                await self._begin_discard([row]).recorded()

    def _begin_discard(self, rows: Sequence[int], *, excluded: Set[TierName] = frozenset()) -> _Removal:
        """Make the rows invisible. The removal covers all tiers that may have records of them, without `excluded`."""
        tiers = [
            tier
            for tier in self.tiers
            if tier not in excluded and any(self._may_have_record(row, tier) for row in rows)
        ]
        for row in rows:
            self.blocks.unlink(row)
        self.tails.remove(rows)
        return self._begin_removal({tier: [] for tier in tiers}, rows)

    def _may_have_record(self, row: int, tier: TierName) -> bool:
        """Whether the tier has a record of the row, gets one, or is about to remove one."""
        leaving = (tier, self.blocks.object_key_of(row)) in self._leaving
        return leaving or (row, tier) in self._placing or self.blocks.is_resident(row, tier)

    def _begin_removal(
        self, freed: dict[TierName, list[Extent]], rows: Sequence[int], *, hold: bool = True
    ) -> _Removal:
        """Remove the rows' records from the tiers named in `freed`, then release its extents.

        Without `hold` the rows' other copies may be evicted meanwhile.
        """
        removal = _Removal(self._leaving, list(freed), [self.blocks.object_key_of(row) for row in rows])
        if rows:
            held = rows if hold else ()
            self.hold(held)
            self._tasks.start(self._remove_until_done(removal, freed, held), "remove records")
        else:
            removal.end()
        return removal

    async def _remove_until_done(
        self,
        removal: _Removal,
        freed: dict[TierName, list[Extent]],
        rows: Sequence[int],
        unread: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        try:
            await removal.earlier_ones_done()
            for tier, extents in freed.items():
                await self._delete_records(tier, removal)
                if unread is not None:
                    await unread()
                for extent in extents:
                    self.tiers[tier].release(extent)
        finally:
            removal.end()
        self.unhold(rows)

    async def _delete_records(self, tier: TierName, removal: _Removal) -> None:
        while True:
            try:
                return await self._index.delete(tier, removal.names)
            except Exception as error:  # Retry: their space cannot be reused before, and a caller waits.
                self._counters.storage_errors += 1
                expected = isinstance(error, KVError)
                log.error(
                    "records of %s could not be removed; trying again: %s",
                    tier,
                    error,
                    exc_info=None if expected else error,
                )
                removal.report(error if isinstance(error, StorageFailed) else StorageFailed(str(error)))
                await self._clock.sleep(_RETRY_S)

    def _free_unreferenced(self, rows: Rows | Sequence[int]) -> None:
        """Release the bytes of forgotten rows that nothing holds any more. Their records are deleted already."""
        blocks = self.blocks
        array = np.asarray(rows, np.int64)
        if blocks.live[array].all():
            return
        over = array[~blocks.live[array] & (blocks.holds[array] == 0) & (blocks.leases[array] == 0)]
        for row in dict.fromkeys(over.tolist()):
            for tier in self.tiers:
                extent = blocks.extent(row, tier)
                if extent is not None:
                    blocks.set_extent(row, tier, None)
                    self.tiers[tier].release(extent)
            blocks.free(row)

    def _records(self, rows: Sequence[int], extents: Sequence[Extent]) -> Records:
        blocks = self.blocks
        records = new_records(len(rows))
        for name in _COPIED:
            records[name] = getattr(blocks, name)[list(rows)]
        for field, place in (("segment", 0), ("offset_bytes", 1), ("size_bytes", 2)):
            records[field] = [extent[place] for extent in extents]
        return records


class _Removal:
    """Marks records as leaving, from its creation until `end`. Removals of one record run one after another.

    Those of one object in two tiers do not wait for each other: a tier below SSD may hang.
    """

    def __init__(
        self,
        leaving: dict[tuple[TierName, bytes], asyncio.Future[None]],
        tiers: Sequence[TierName],
        names: Sequence[bytes],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.names = names
        self._failure: asyncio.Future[StorageFailed] = loop.create_future()  # The first error, if any.
        self._leaving = leaving
        self._done: asyncio.Future[None] = loop.create_future()
        self._records = [(tier, name) for tier in tiers for name in names]
        self._earlier = {leaving[record] for record in self._records if record in leaving}
        leaving |= dict.fromkeys(self._records, self._done)

    async def earlier_ones_done(self) -> None:
        if self._earlier:
            await asyncio.wait(self._earlier)

    async def recorded(self) -> None:
        """Wait until the records are deleted. Raises StorageFailed at the first failure; the removal is then
        retried.
        """
        ends: list[asyncio.Future[Any]] = [self._done, self._failure]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            raise self._failure.result()

    def report(self, error: StorageFailed) -> None:
        if not self._failure.done():
            self._failure.set_result(error)

    def end(self) -> None:
        for record in self._records:
            if self._leaving.get(record) is self._done:
                del self._leaving[record]
        self._done.set_result(None)


async def _in_turns(rows: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
    """Call `work` for some rows per turn of the event loop. If the caller is cancelled, for the rest at once."""
    done = 0
    try:
        while done < len(rows):
            if done:
                await asyncio.sleep(0)
            part = rows[done : done + _NOTED_A_TURN]
            done += len(part)
            work(part)
    finally:
        if done < len(rows):
            work(rows[done:])


def _add(counts: NDArray[np.int32], rows: Rows, change: int) -> None:
    """Add to the counts of the rows, once for each time that a row is named.

    Distinct rows, as nearly always, in a tenth of the time of ``np.add.at``.
    """
    is_distinct = len(rows) < 2 or bool((rows[1:] > rows[:-1]).all())  # Rows of one save often ascend.
    if not is_distinct:
        ordered = np.sort(rows)
        is_distinct = bool((ordered[1:] != ordered[:-1]).all())
    if is_distinct:
        counts[rows] += change
    else:
        np.add.at(counts, rows, change)
