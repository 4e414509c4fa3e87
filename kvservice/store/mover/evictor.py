"""Frees space in a tier: evicts what the policy values least, when a reservation needs it and ahead of need."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvservice.blocks import BlockTable, Extent, Rows, TierName
from kvservice.clock import Clock
from kvservice.policy.base import Policy
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.tasks import Tasks
from kvservice_api.errors import StorageFailed, TierFull

log = logging.getLogger(__name__)

_RANK_IN_THREAD_ROWS = 50_000  # Ranking more rows than this would keep the event loop for too long.
_VICTIMS_AHEAD = 1024
_VICTIMS_AT_A_TIME = 128
_SHED_BLOCKS_MIN, _SHED_PART = 256, 64


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Fractions of a tier's capacity: below `low` free the mover starts to evict, at `high` it stops."""

    low: float
    high: float


class Cleaner(Protocol):
    """Copies blocks of a tier to the next slower one, so that they can be evicted without loss: the write-behind."""

    def is_progressing(self) -> bool:
        """Whether waiting will help."""

    def is_writing(self) -> bool:
        """Whether writes are running. Each holds its block until it ends, also when it fails."""

    async def wait_for_one(self) -> None:
        """Wait until one more block is written, or failed to be."""


class Evictor:
    def __init__(
        self,
        lifecycle: BlockLifecycle,
        policy: Policy[BlockTable],
        clock: Clock,
        tasks: Tasks,
        *,
        watermarks: dict[TierName, Watermarks],
        wait_s: float,
    ) -> None:
        self._lifecycle = lifecycle
        self._blocks: BlockTable = lifecycle.blocks
        self._policy = policy
        self._clock = clock
        self._tasks = tasks
        self._watermarks = watermarks
        self._wait_s = wait_s
        self._cleaners: Mapping[TierName, Cleaner] = {}
        self._victims: dict[TierName, deque[tuple[int, int, int]]] = {tier: deque() for tier in lifecycle.tiers}
        self._locks = {tier: asyncio.Lock() for tier in lifecycle.tiers}
        self._waiting = dict.fromkeys(lifecycle.tiers, 0)
        self._shedding = dict.fromkeys(lifecycle.tiers, False)
        self._taken = asyncio.Event()

    def start(self, cleaners: Mapping[TierName, Cleaner]) -> None:
        """Keep free space between the watermarks from now on. Each tier but the last has a cleaner."""
        self._cleaners = cleaners
        self._tasks.start(self._keep_free(), "keep room free")

    async def reserve(self, tier: TierName, size_bytes: int, *, wait_s: float | None = None) -> Extent:
        """Space in `tier`, evicting others where needed. Raises TierFull where nothing may leave in time.

        Who waits is served in the order of asking: a large block would starve behind small ones else.
        """
        space = self._lifecycle.tiers[tier]
        self._taken.set()
        if not space.could_hold(size_bytes):
            raise TierFull(f"{size_bytes} bytes are more than the {tier} tier could ever hold in one piece", tier=tier)
        if not self._waiting[tier]:
            with contextlib.suppress(TierFull):
                return space.reserve(size_bytes)
        wait_s = self._wait_s if wait_s is None else min(wait_s, self._wait_s)
        self._waiting[tier] += 1
        try:
            async with self._clock.timeout(wait_s), self._locks[tier]:
                return await self._reserve_in_turn(tier, size_bytes)
        except TimeoutError as error:
            raise TierFull(f"no space came free in the {tier} tier in {wait_s:g} s", tier=tier) from error
        finally:
            self._waiting[tier] -= 1

    def shed(self, tier: TierName) -> None:
        """Begin to evict a small part of a tier whose index is full: their number counts then, not their size."""
        if not self._shedding[tier]:
            self._shedding[tier] = True
            self._tasks.start(self._shed(tier), "make room in an index")

    async def _shed(self, tier: TierName) -> None:
        missing = max(_SHED_BLOCKS_MIN, int(np.count_nonzero(self._blocks.resident(tier))) // _SHED_PART)
        try:
            while missing > 0:
                async with self._locks[tier]:
                    rows = await self._choose(tier, self._lifecycle.tiers[tier].capacity_bytes)
                    await self._lifecycle.evict(rows, tier, self._policy.name)
                if not rows:
                    return
                missing -= len(rows)
        except StorageFailed as error:
            log.warning("no room could be made in the index of %s: %s", tier, error.message)
        finally:
            self._shedding[tier] = False

    async def _reserve_in_turn(self, tier: TierName, size_bytes: int) -> Extent:
        while True:
            try:
                return self._lifecycle.tiers[tier].reserve(size_bytes)
            except TierFull:
                if not await self._make(tier, size_bytes):
                    raise

    async def _make(self, tier: TierName, size_bytes: int) -> bool:
        """Evict at least `size_bytes`, or wait for space to come. False where neither is possible."""
        if await self._lifecycle.tiers[tier].grown():
            return True
        if rows := await self._choose(tier, size_bytes):
            await self._lifecycle.evict(rows, tier, self._policy.name)
            return True
        cleaner = self._cleaners.get(tier)
        if cleaner is not None and (cleaner.is_progressing() or (cleaner.is_writing() and self._has_held(tier))):
            await cleaner.wait_for_one()
            return True
        return False

    def _has_held(self, tier: TierName) -> bool:
        """Whether some block could be evicted once the I/O that holds it has ended."""
        blocks = self._blocks
        end = blocks.row_end
        return bool((blocks.resident(tier) & (blocks.leases[:end] == 0) & (blocks.holds[:end] > 0)).any())

    async def _choose(self, tier: TierName, size_bytes: int) -> list[int]:
        """Rows to evict, worth `size_bytes` together, or fewer: no more than one turn of the event loop can take."""
        blocks, queue = self._blocks, self._victims[tier]
        chosen: dict[int, None] = {}
        chosen_bytes = 0
        ranked = False
        while chosen_bytes < size_bytes and len(chosen) < _VICTIMS_AT_A_TIME:
            if not queue:
                if ranked or not await self._rank(tier):
                    break
                ranked = True
                continue
            row, generation, access_seq = queue.popleft()
            if blocks.generation[row] == generation and blocks.access_seq[row] == access_seq:
                extent = blocks.extent(row, tier)
                if extent is not None and row not in chosen and self._may_leave(row, tier):
                    chosen[row] = None
                    chosen_bytes += extent.size_bytes
        return [row for row in chosen if self._may_leave(row, tier)]  # Ranking may have awaited.

    def _may_leave(self, row: int, tier: TierName) -> bool:
        blocks = self._blocks
        free = bool(blocks.live[row]) and blocks.is_resident(row, tier) and self._lifecycle.is_free(row)
        return free and not blocks.pin_keeps(row, tier, self._clock.wall_ms())

    async def _rank(self, tier: TierName) -> bool:
        """Fill the queue of victims, the least valuable first. False where there is none."""
        blocks = self._blocks
        end = blocks.row_end
        free = blocks.resident(tier) & blocks.live[:end] & (blocks.leases[:end] == 0) & (blocks.holds[:end] == 0)
        pinned = blocks.pinned(self._clock.wall_ms())
        rows = np.flatnonzero(free & blocks.resident_slower(tier))  # These leave without loss.
        cleaner = self._cleaners.get(tier)
        if not len(rows) and not (cleaner is not None and cleaner.is_progressing()):
            free &= ~pinned
            rows = np.flatnonzero(free & ~blocks.resident_faster(tier))
            if not len(rows):
                rows = np.flatnonzero(free)
        if not len(rows):
            return False
        args = (self._policy, blocks, rows, tier, self._clock.monotonic_s())
        in_thread = len(rows) > _RANK_IN_THREAD_ROWS
        lowest = await asyncio.to_thread(_lowest, *args) if in_thread else _lowest(*args)
        marks = (lowest.tolist(), blocks.generation[lowest].tolist(), blocks.access_seq[lowest].tolist())
        self._victims[tier].extend(zip(*marks, strict=True))
        return True

    async def _keep_free(self) -> None:
        while True:
            await self._taken.wait()
            self._taken.clear()
            for tier, marks in self._watermarks.items():
                try:
                    await self._free_up(tier, marks)
                except StorageFailed as error:
                    log.warning("no room could be kept free in %s: %s", tier, error.message)

    async def _free_up(self, tier: TierName, marks: Watermarks) -> None:
        """From below the low watermark up to the high one, without losing a block: nobody needs the space yet."""
        space = self._lifecycle.tiers[tier]
        until = marks.low
        while True:
            async with self._locks[tier]:
                missing_bytes = int(until * space.capacity_bytes) - (space.capacity_bytes - space.used_bytes)
                if missing_bytes <= 0:
                    return
                rows = await self._choose(tier, missing_bytes)
                if tier == self._blocks.first_tier or tier in self._cleaners:
                    rows = [row for row in rows if self._blocks.has_slower_copy(row, tier)]
                if not rows:
                    return
                await self._lifecycle.evict(rows, tier, self._policy.name)
                until = marks.high


def _lowest(policy: Policy[BlockTable], blocks: BlockTable, rows: Rows, tier: TierName, now_s: float) -> Rows:
    """The rows of least retention, lowest first; not all of them, where there are many."""
    worth = policy.retention(blocks, rows, tier, now_s)
    if len(rows) > _VICTIMS_AHEAD:
        part = np.argpartition(worth, _VICTIMS_AHEAD)[:_VICTIMS_AHEAD]
        rows, worth = rows[part], worth[part]
    return rows[np.argsort(worth, kind="stable")]
