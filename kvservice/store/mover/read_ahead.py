"""Copies blocks up to DRAM before requests need them, as a policy over items wants it."""

from __future__ import annotations

import math

from kvservice.blocks import BlockTable
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.placement.item_policy import ItemPolicy
from kvservice.store.mover.promoter import Promoter
from kvservice.store.tasks import LoopBudget

_EVERY_S = 0.1
_FILL_ROWS = 64  # They take about half a millisecond of the event loop.
_MEMORY_S = 60.0  # Of the share of time in which blocks are read.
_RATE_MEMORY = 0.2  # The weight of the last measurement.


class ReadAhead:
    def __init__(
        self,
        policy: ItemPolicy,
        blocks: BlockTable,
        promoter: Promoter | None,
        clock: Clock,
        counters: Counters,
        loop_budget: LoopBudget,
    ) -> None:
        self._policy = policy
        self._blocks = blocks
        self._promoter = promoter
        self._clock = clock
        self._counters = counters
        self._loop_budget = loop_budget

    async def run(self) -> None:
        """Forever: first group the blocks that an earlier daemon has stored, then read ahead."""
        rows = self._blocks.live_rows().tolist()
        for start in range(0, len(rows), _FILL_ROWS):
            await self._loop_budget.slot()
            self._policy.items.add(rows[start : start + _FILL_ROWS])
        while True:
            await self._clock.sleep(_EVERY_S)
            await self._read()

    async def _read(self) -> None:
        now_s = self._clock.monotonic_s()
        self._measure()
        for read in self._policy.wanted_reads(self._blocks, now_s):
            if self._promoter is not None:
                await self._promoter.promote(read.rows, within_s=max(0.0, read.deadline_s - now_s), wait=False)

    def _measure(self) -> None:
        """What the policy may know of the SSD."""
        if self._promoter is None:
            return
        conditions = self._policy.items.items.conditions
        rate, pending_bytes = self._promoter.read_rate, self._promoter.pending_bytes
        if rate:
            conditions.ssd_bytes_per_s += _RATE_MEMORY * (rate - conditions.ssd_bytes_per_s)
        conditions.read_backlog_s = pending_bytes / conditions.ssd_bytes_per_s
        conditions.read_busy += ((pending_bytes > 0) - conditions.read_busy) * -math.expm1(-_EVERY_S / _MEMORY_S)
        conditions.written_bytes = self._counters.written_behind_bytes
