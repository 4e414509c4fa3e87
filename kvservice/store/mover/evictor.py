"""Frees space in a tier: evicts the blocks with the policy's lowest scores, on demand and in advance."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from kvservice.blocks import BlockTable, Extent, Rows, TierName
from kvservice.clock import Clock
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.miss_reasons import Eviction, SpaceFor
from kvservice.store.mover.ranking import Ranking
from kvservice.store.tasks import LoopBudget, Tasks, in_parts
from kvservice_api.errors import StorageFailed, TierFull

log = logging.getLogger(__name__)

_VICTIMS_AHEAD = 1024
_VICTIMS_AT_A_TIME = 128
_TRIM_BLOCKS_MIN, _TRIM_PART = 256, 64


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Fractions of a tier's capacity: below `low` free the mover starts to evict, at `high` it stops."""

    low: float
    high: float


class _Victim(NamedTuple):
    """A block to evict, if it is still the same one and was not used since."""

    row: int
    generation: int
    access_seq: int
    score: float


class Cleaner(Protocol):
    """Copies blocks of the first tier to the next one, so that they can be evicted without loss: the write-behind."""

    def is_progressing(self) -> bool:
        """Whether a wait can free space."""

    def is_writing(self) -> bool:
        """Whether writes are running. Each holds its block until it ends, also when it fails."""

    async def wait_for_one(self) -> None:
        """Wait until the write of one more block has succeeded or failed."""


class Evictor:
    def __init__(
        self,
        lifecycle: BlockLifecycle,
        ranking: Ranking,
        clock: Clock,
        tasks: Tasks,
        loop_budget: LoopBudget,
        *,
        watermarks: dict[TierName, Watermarks],
        wait_s: float,
    ) -> None:
        self._lifecycle = lifecycle
        self._blocks: BlockTable = lifecycle.blocks
        self._ranking = ranking
        self._clock = clock
        self._tasks = tasks
        self._loop_budget = loop_budget
        self._watermarks = watermarks
        self._wait_s = wait_s
        self._cleaner: Cleaner | None = None
        self._victims: dict[TierName, deque[_Victim]] = {tier: deque() for tier in lifecycle.tiers}
        self._not_needed: dict[TierName, dict[int, int]] = {tier: {} for tier in lifecycle.tiers}  # Row -> generation.
        self._ranked_at_s = dict.fromkeys(lifecycle.tiers, -math.inf)
        self._locks = {tier: asyncio.Lock() for tier in lifecycle.tiers}
        self._waiting = dict.fromkeys(lifecycle.tiers, 0)
        self._trimming = dict.fromkeys(lifecycle.tiers, False)
        self._index_locks = {tier: asyncio.Lock() for tier in lifecycle.tiers}
        self._rooms = dict.fromkeys(lifecycle.tiers, 0)  # How often `make_room_in_index` has evicted some block.
        self._taken = {tier: asyncio.Event() for tier in lifecycle.tiers}

    def start(self, cleaner: Cleaner | None) -> None:
        """Keep free space between the watermarks from now on. `cleaner` copies blocks out of the first tier.

        Evictions from slower tiers do not wait for copies, because a slow or hanging tier below must not stop them.
        """
        self._cleaner = cleaner
        for tier, marks in self._watermarks.items():  # Each on its own: a tier below SSD may hang.
            self._tasks.start(self._keep_free(tier, marks), f"keep space free in {tier}")

    async def reserve(
        self,
        tier: TierName,
        size_bytes: int,
        space_for: SpaceFor,
        *,
        wait_s: float | None = None,
        worth: float = math.inf,
        more_bytes: int = 0,
    ) -> Extent:
        """Reserve space in `tier`, with evictions if needed. Raises TierFull if nothing may be evicted in time.

        Waiting callers are served in order; otherwise smaller blocks would starve a large one. With a finite `worth`,
        only blocks with a lower score are evicted, no I/O is waited for, and no other caller. `more_bytes`: what the
        caller reserves next. An eviction frees it too, because each takes a commit of the index.
        """
        space = self._lifecycle.tiers[tier]
        self._taken[tier].set()
        if not space.could_hold(size_bytes):
            raise TierFull(f"{size_bytes} bytes are more than the {tier} tier could ever hold in one piece", tier=tier)
        if not self._waiting[tier]:
            with contextlib.suppress(TierFull):
                return space.reserve(size_bytes)
        elif worth < math.inf:
            raise TierFull(f"others wait for space in the {tier} tier", tier=tier)
        wait_s = self._wait_s if wait_s is None else min(wait_s, self._wait_s)
        self._waiting[tier] += 1
        try:
            async with self._clock.timeout(wait_s), self._locks[tier]:
                return await self._reserve_in_turn(tier, size_bytes, space_for, worth, size_bytes + more_bytes)
        except TimeoutError as error:
            raise TierFull(f"no space became free in the {tier} tier in {wait_s:g} s", tier=tier) from error
        finally:
            self._waiting[tier] -= 1

    def reserve_at_once(self, tier: TierName, sizes: Sequence[int]) -> list[Extent]:
        """Space for the first of these sizes, as far as it is free and no earlier caller waits for it."""
        self._taken[tier].set()
        found: list[Extent] = []
        for size_bytes in sizes if not self._waiting[tier] else ():
            try:
                extent = self._lifecycle.tiers[tier].reserve(size_bytes)
            except TierFull:
                break
            found.append(extent)
        return found

    def evict_first(self, rows: Rows) -> None:
        """Evict these rows before all others, from each tier that needs space, unless they are used before that.

        Nothing happens to rows that are evicted first already.
        """
        blocks = self._blocks
        rows = rows[blocks.access_seq[rows] > 0]
        blocks.rank_oldest(rows)
        for marked in self._not_needed.values():
            marked.update(zip(rows.tolist(), blocks.generation[rows].tolist(), strict=True))

    def rank_again(self) -> None:
        """The present order of victims is out of date."""
        self._ranked_at_s = dict.fromkeys(self._ranked_at_s, -math.inf)
        for queue in self._victims.values():
            queue.clear()

    def trim_index(self, tier: TierName) -> None:
        """Begin to evict a small part of a tier whose index is full: there the number of blocks counts, not their
        size.
        """
        if not self._trimming[tier]:
            self._trimming[tier] = True
            self._tasks.start(self._trim(tier), "free space in an index")

    async def make_room_in_index(self, tier: TierName, count: int) -> bool:
        """Evict a small part of a tier whose index is full, `count` blocks at least if there are as many. Returns
        whether some block was evicted. Raises StorageFailed.

        One caller evicts, and all that have called before its end go by that: a full index refuses many puts at once.
        """
        made = self._rooms[tier]
        missing = max(_TRIM_BLOCKS_MIN, int(np.count_nonzero(self._blocks.resident(tier))) // _TRIM_PART, count)
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(self._wait_s), self._index_locks[tier]:
                if self._rooms[tier] == made:
                    await self._evict_from_index(tier, missing)
        return self._rooms[tier] != made

    async def _evict_from_index(self, tier: TierName, missing: int) -> None:
        evicted = 0
        try:
            while evicted < missing:
                async with self._locks[tier]:
                    chosen = await self._choose(tier, self._lifecycle.tiers[tier].capacity_bytes)
                    await self._evict(chosen, tier, SpaceFor.INDEX)
                if not chosen and (evicted or not await self._one_is_copied(tier)):
                    return
                evicted += len(chosen)
        finally:  # Also when its time is over.
            self._rooms[tier] += evicted > 0

    async def _trim(self, tier: TierName) -> None:
        try:
            await self.make_room_in_index(tier, 0)
        except StorageFailed as error:
            log.warning("no space could be freed in the index of %s: %s", tier, error.message)
        finally:
            self._trimming[tier] = False

    async def _evict(self, scores: dict[int, float], tier: TierName, space_for: SpaceFor) -> None:
        eviction = Eviction(self._ranking.name, space_for, scores)
        marks = list(zip(scores, self._blocks.generation[list(scores)].tolist(), strict=True))

        async def evict(part: Sequence[tuple[int, int]]) -> None:
            generation = self._blocks.generation
            rows = [row for row, mark in part if generation[row] == mark and self._may_leave(row, tier)]
            await self._lifecycle.evict(rows, tier, eviction)

        await in_parts(marks, evict, self._loop_budget)

    async def _reserve_in_turn(
        self, tier: TierName, size_bytes: int, space_for: SpaceFor, worth: float, evict_bytes: int
    ) -> Extent:
        while True:
            try:
                return self._lifecycle.tiers[tier].reserve(size_bytes)
            except TierFull:
                if not await self._evict_for(tier, evict_bytes, space_for, worth):
                    raise

    async def _evict_for(self, tier: TierName, size_bytes: int, space_for: SpaceFor, worth: float) -> bool:
        """Evict at least `size_bytes`, or wait for space. Returns False if neither is possible."""
        if await self._lifecycle.tiers[tier].grown():
            return True
        if chosen := await self._choose(tier, size_bytes, worth):
            await self._evict(chosen, tier, space_for)
            return True
        return worth == math.inf and await self._one_is_copied(tier)

    async def _one_is_copied(self, tier: TierName) -> bool:
        """Wait until the cleaner has copied one more block out of the tier. Returns False if it copies none."""
        cleaner = self._cleaner if tier == self._blocks.first_tier else None
        if cleaner is not None and (cleaner.is_progressing() or (cleaner.is_writing() and self._has_held(tier))):
            await cleaner.wait_for_one()
            return True
        return False

    def _has_held(self, tier: TierName) -> bool:
        """Whether some block could be evicted after the I/O that holds it has ended."""
        blocks = self._blocks
        end = blocks.row_end
        return bool((blocks.resident(tier) & (blocks.leases[:end] == 0) & (blocks.holds[:end] > 0)).any())

    async def _choose(self, tier: TierName, size_bytes: int, worth: float = math.inf) -> dict[int, float]:
        """Rows to evict with their scores, of `size_bytes` in total, or fewer: not too many at a time, and only such
        with a score below `worth`.
        """
        blocks, queue, marked = self._blocks, self._victims[tier], self._not_needed[tier]
        if self._clock.monotonic_s() - self._ranked_at_s[tier] > self._ranking.lasts_s:
            queue.clear()
        chosen: dict[int, float] = {}
        chosen_bytes = 0
        ranked = False
        while chosen_bytes < size_bytes and len(chosen) < _VICTIMS_AT_A_TIME:
            if marked:
                row, generation = marked.popitem()  # Of a chain, the end first.
                access_seq, score = 0, -math.inf
            elif not queue:
                if ranked or not await self._rank(tier):
                    break
                ranked = True
                continue
            elif queue[0].score >= worth:
                break
            else:
                row, generation, access_seq, score = queue.popleft()
            if blocks.generation[row] == generation and blocks.access_seq[row] == access_seq:
                extent = blocks.extent(row, tier)
                if extent is not None and row not in chosen and self._may_leave(row, tier):
                    chosen[row] = score
                    chosen_bytes += extent.size_bytes
        # The ranking may have awaited.
        return {row: score for row, score in chosen.items() if self._may_leave(row, tier)}

    def _may_leave(self, row: int, tier: TierName) -> bool:
        blocks = self._blocks
        free = bool(blocks.live[row]) and blocks.is_resident(row, tier) and self._lifecycle.is_free(row)
        return free and not blocks.pin_keeps(row, tier, self._clock.wall_ms())

    async def _rank(self, tier: TierName) -> bool:
        """Fill the queue of victims, the lowest score first. Returns False if there is none."""
        blocks = self._blocks
        end = blocks.row_end
        free = blocks.resident(tier) & blocks.live[:end] & (blocks.leases[:end] == 0) & (blocks.holds[:end] == 0)
        pinned = blocks.pinned(self._clock.wall_ms())
        rows = np.flatnonzero(free & blocks.resident_slower(tier))  # Their eviction loses nothing.
        cleaner = self._cleaner if tier == blocks.first_tier else None
        if not len(rows) and not (cleaner is not None and cleaner.is_progressing()):
            free &= ~pinned
            rows = np.flatnonzero(free & ~blocks.resident_faster(tier))
            if not len(rows):
                rows = np.flatnonzero(free)
        if not len(rows):
            return False
        awaited = blocks.awaited[rows]
        if not awaited.all():
            rows = rows[~awaited]
        self._ranked_at_s[tier] = self._clock.monotonic_s()
        used, generations = blocks.access_seq[rows], blocks.generation[rows]  # The ranking may await.
        lowest, scores = await self._ranking.lowest(tier, rows, _VICTIMS_AHEAD)
        places = np.searchsorted(rows, lowest)  # `rows` is ascending.
        columns = (lowest.tolist(), generations[places].tolist(), used[places].tolist(), scores.tolist())
        self._victims[tier].extend(map(_Victim, *columns))
        return True

    async def _keep_free(self, tier: TierName, marks: Watermarks) -> None:
        while True:
            await self._taken[tier].wait()
            self._taken[tier].clear()
            try:
                await self._free_up(tier, marks)
            except StorageFailed as error:
                log.warning("space could not be kept free in %s: %s", tier, error.message)

    async def _free_up(self, tier: TierName, marks: Watermarks) -> None:
        """Evict from the low watermark up to the high one. Only the last tier loses blocks by it."""
        space = self._lifecycle.tiers[tier]
        until = marks.low
        while True:
            async with self._locks[tier]:
                missing_bytes = int(until * space.capacity_bytes) - (space.capacity_bytes - space.used_bytes)
                if missing_bytes <= 0:
                    return
                chosen = await self._choose(tier, missing_bytes)
                if tier in (self._blocks.first_tier, *self._blocks.tiers[:-1]):
                    chosen = {row: chosen[row] for row in chosen if self._blocks.has_slower_copy(row, tier)}
                if not chosen:
                    return
                await self._evict(chosen, tier, SpaceFor.FREE_SHARE)
                until = marks.high
