"""Scrub: reads and verifies all copies in a tier, at a bounded rate."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from kvservice.blocks import TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store import image_check
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import on_thread
from kvservice_api.errors import ScrubRunning, StorageFailed
from kvservice_api.layout import Shard

_PIECE_BYTES = 4 << 20
_REPORT_EVERY_S = 0.5
_LAST_PRIORITY = float("inf")  # Reads for clients have priority.


@dataclass(frozen=True, slots=True)
class ScrubProgress:
    copies_total: int = 0
    copies_checked: int = 0
    bytes_checked: int = 0
    damaged: int = 0
    done: bool = False


class Scrub:
    def __init__(
        self,
        lifecycle: BlockLifecycle,
        dram: DramTier,
        clock: Clock,
        counters: Counters,
        executor: Executor,
        *,
        bytes_per_second: int,
    ) -> None:
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._dram = dram
        self._clock = clock
        self._counters = counters
        self._executor = executor
        self._bytes_per_second = bytes_per_second
        self._running = False

    async def run(
        self, caller: Caller, tiers: Sequence[TierName], bytes_per_second: int = 0
    ) -> AsyncGenerator[ScrubProgress, None]:
        """The progress, about twice per second; the last one has `done`. Raises ScrubRunning."""
        if self._running:
            raise ScrubRunning("another scrub is under way: wait for it")
        self._running = True
        try:
            async for progress in self._scrub(tiers, bytes_per_second or self._bytes_per_second):
                yield progress
        finally:
            self._running = False

    async def _scrub(self, tiers: Sequence[TierName], bytes_per_second: int) -> AsyncIterator[ScrubProgress]:
        blocks = self._blocks
        rows_of = {tier: np.flatnonzero(blocks.resident(tier) & blocks.live[: blocks.row_end]) for tier in tiers}
        marks_of = {tier: blocks.generation[rows] for tier, rows in rows_of.items()}
        progress = ScrubProgress(copies_total=sum(map(len, rows_of.values())))
        started_s = reported_s = self._clock.monotonic_s()
        work = ((tier, *pair) for tier in tiers for pair in zip(map(int, rows_of[tier]), marks_of[tier], strict=True))
        for tier, row, generation in work:
            size = 0
            if blocks.generation[row] == generation and blocks.live[row] and blocks.is_resident(row, tier):
                size = self._lifecycle.geometry(row).image_bytes
                damaged = await self._check(row, tier)
                progress = replace(progress, damaged=progress.damaged + damaged)
            progress = replace(
                progress,
                copies_checked=progress.copies_checked + 1,
                bytes_checked=progress.bytes_checked + size,
            )
            self._counters.scrubbed_bytes += size
            now_s = self._clock.monotonic_s()
            if now_s - reported_s >= _REPORT_EVERY_S:
                reported_s = now_s
                yield progress
            ahead_s = progress.bytes_checked / bytes_per_second - (now_s - started_s)
            await self._clock.sleep(max(0.0, ahead_s))
        yield replace(progress, done=True)

    async def _check(self, row: int, tier: TierName) -> bool:
        """Whether the copy was damaged; it is then dropped. A read error of the disk does not count as damage."""
        generation = int(self._blocks.generation[row])
        self._lifecycle.hold([row])
        try:
            check = self._check_memory if tier == self._blocks.first_tier else self._check_read
            what = await check(row, tier)
            if what:
                await self._lifecycle.quarantine(row, generation, tier, what)
            elif tier == self._blocks.first_tier:
                self._blocks.verified[row] = True
            return bool(what)
        except StorageFailed:
            self._counters.storage_errors += 1
            return False
        finally:
            self._lifecycle.unhold([row])

    async def _check_memory(self, row: int, tier: TierName) -> str:
        extent = self._blocks.extent(row, tier)
        assert extent is not None
        geometry = self._lifecycle.geometry(row)
        image = self._dram.view(extent)[: geometry.image_bytes]
        stored = image_check.StoredImage(image, geometry, *self._identity(row))
        (what,) = await on_thread(functools.partial(image_check.damages, [stored]), self._executor)
        return what

    async def _check_read(self, row: int, tier: TierName) -> str:
        extent = self._blocks.extent(row, tier)
        assert extent is not None
        geometry, identity = self._lifecycle.geometry(row), self._identity(row)
        what = await image_check.damage_in(
            self._lifecycle.tiers[tier], extent, geometry, *identity, piece_bytes=_PIECE_BYTES, priority=_LAST_PRIORITY
        )
        self._counters.tier_read_bytes[tier] += geometry.image_bytes
        return what

    def _identity(self, row: int) -> tuple[bytes, Shard, int]:
        """The expected content of the row's trailer, and its checksum."""
        blocks = self._blocks
        return blocks.key_of(row), blocks.shard_of(row), int(blocks.trailer_checksum[row])
