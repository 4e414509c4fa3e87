"""Copies blocks up to DRAM before requests need them, as a policy over items wants it."""

from __future__ import annotations

import asyncio
import logging
import math

import numpy as np

from kvservice.blocks import BlockTable, Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.miss_reasons import SpaceFor
from kvservice.store.mover.item_ranking import ItemRanking, WantedRead
from kvservice.store.mover.promoter import Promoter
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice.tiers.base import Tier

log = logging.getLogger(__name__)

_EVERY_S, _LEAST_S = 0.1, 0.01  # Between two looks, unless the policy wants to be asked sooner,
_QUIET_EVERY_S, _QUIET_AFTER_S = 2.0, 5.0  # or nothing has happened for so long: it is asked once something does.
_PAUSE_AFTER_ERROR_S, _PAUSE_MAX_S = 10.0, 1.0
_AFTER_LOADS_S = 0.1  # Reads of loads that begin within this time are done before,
_AFTER_ALL_S = 600.0  # and before a guess all that is needed for certain.
_MEMORY_S = 60.0  # Of the share of time in which blocks are read.
_BURST_S = 1.0  # By how much that may be exceeded at first, in bytes of so much time.


class ReadAhead:
    """Carries out what the policy wants to be read. A later look changes the reads that have not begun."""

    def __init__(
        self,
        ranking: ItemRanking,
        blocks: BlockTable,
        dram: Tier,
        promoter: Promoter | None,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        loop_budget: LoopBudget,
        *,
        bytes_per_s_max: int,
    ) -> None:
        """`promoter` is None in a store with one tier. `bytes_per_s_max`: of reads for queued requests, 0 for none.
        The policy limits what is read on a guess.
        """
        self._ranking = ranking
        self._blocks = blocks
        self._dram = dram
        self._promoter = promoter
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._loop_budget = loop_budget
        self._plan: list[WantedRead] = []  # The most urgent read last.
        self._ahead_bytes: dict[int, int] = {}  # Row -> bytes of the plan up to its read's end, when it was made.
        self._begun: set[int] = set()  # Items whose reads have begun since the policy was last asked.
        self._reading: asyncio.Task[None] | None = None
        self._look_soon = asyncio.Event()
        self._happened_s = clock.monotonic_s()  # When the last event came, or the last read was planned.
        self._is_quiet = False
        self.looks = 0  # Decisions of the policy so far.
        self._bytes_per_s_max = bytes_per_s_max
        self._spent_until_s = -math.inf  # What was read for queued requests so far is allowed at this time.
        # Blocks that were read on a guess, and that no request has used yet, as columns: row, generation, access_seq.
        self._unused = np.zeros((3, 0), np.int64)

    def look_soon(self) -> None:
        """Something happened that the policy should decide about at once."""
        self._look_soon.set()

    def stop(self) -> None:
        """Begin no more reads: another policy decides now. One that runs is not stopped. Cancel `run` as well."""
        self._plan.clear()
        self._ahead_bytes.clear()

    def coming_s(self, rows: Rows) -> float | None:
        """Seconds until rows that are not in DRAM will be there; None if some of them are not about to be read."""
        if self._promoter is None:
            return None
        ahead_bytes = 0
        for row in rows.tolist():
            if not self._promoter.is_promoting(row):
                if (ahead := self._ahead_bytes.get(row)) is None:
                    return None
                ahead_bytes = max(ahead_bytes, ahead)
        return (self._promoter.pending_bytes + ahead_bytes) / self._ranking.conditions.ssd_bytes_per_s

    async def run(self) -> None:
        """Forever: first group the blocks that an earlier daemon has stored, then read ahead."""
        await self._ranking.events.fill(self._loop_budget.slot)
        self._ranking.events.on_event = self._note_event
        looked_s = self._clock.monotonic_s()
        while True:
            now_s = self._clock.monotonic_s()
            self._measure(now_s - looked_s)
            looked_s = now_s
            self._look_soon.clear()
            self._begun.clear()
            try:
                look = await self._ranking.look(self._dram.used_bytes, len(self._plan))
                if look.reads is not None:
                    self._follow(look.reads)
                pause_s = self._pause_s(look.next_s)
            except Exception:
                log.exception("the policy %s failed", self._ranking.name)
                self._counters.policy_failures += 1
                await self._clock.sleep(_PAUSE_AFTER_ERROR_S)
                pause_s = 0.0
            self.looks += 1
            self._count_unused()
            await self._sleep(pause_s)

    def _note_event(self) -> None:
        self._happened_s = self._clock.monotonic_s()
        if self._is_quiet:
            self._look_soon.set()

    def _pause_s(self, next_s: float) -> float:
        """Until the next look, if the policy wants it at `next_s`."""
        now_s = self._clock.monotonic_s()
        if self._plan or self._reading is not None or (self._promoter is not None and self._promoter.pending_bytes):
            self._happened_s = now_s
        self._is_quiet = now_s - self._happened_s > _QUIET_AFTER_S
        return min(max(next_s - now_s, _LEAST_S), _QUIET_EVERY_S if self._is_quiet else _EVERY_S)

    async def _sleep(self, pause_s: float) -> None:
        """Pause so long, or until there is a reason to look."""
        try:
            async with self._clock.timeout(pause_s):
                await self._look_soon.wait()
        except TimeoutError:
            pass

    def _follow(self, reads: list[WantedRead]) -> None:
        reads = [read for read in reads if read.item not in self._begun]
        reads.sort(key=lambda read: (not read.is_queued, read.deadline_s))  # As in `reads` where they are equal.
        ahead_bytes = 0
        self._ahead_bytes = {}
        for read in reads:
            ahead_bytes += int(self._blocks.size_bytes[read.rows].sum())
            self._ahead_bytes.update(dict.fromkeys(read.rows.tolist(), ahead_bytes))
        self._plan = reads[::-1]
        if self._plan and self._promoter is not None and self._reading is None:
            self._reading = self._tasks.start(self._read(self._promoter), "read ahead")

    async def _read(self, promoter: Promoter) -> None:
        """Read the plan, as it is when each read begins."""
        try:
            while self._plan:
                read = self._plan.pop()
                blocks = self._blocks
                same = blocks.live[read.rows] & (blocks.generation[read.rows] == read.generations)
                rows = read.rows[same & ~blocks.lie_in(read.rows, blocks.first_tier)]
                if not len(rows) or (read.is_queued and not self._bytes_per_s_max):
                    continue
                now_s = self._clock.monotonic_s()
                if read.is_queued and self._spent_until_s > now_s + _BURST_S:
                    self._plan.append(read)
                    await self._clock.sleep(min(self._spent_until_s - now_s - _BURST_S, _PAUSE_MAX_S))
                    continue
                await self._read_one(promoter, read, rows, now_s)
        finally:
            self._reading = None

    async def _read_one(self, promoter: Promoter, read: WantedRead, rows: Rows, now_s: float) -> None:
        blocks, events = self._blocks, self._ranking.events
        if read.is_queued:
            size_bytes = int(blocks.size_bytes[rows].sum())
            self._spent_until_s = max(self._spent_until_s, now_s) + size_bytes / self._bytes_per_s_max
        self._begun.add(read.item)
        within_s = max(0.0, read.deadline_s - now_s) + (_AFTER_LOADS_S if read.is_queued else _AFTER_ALL_S)
        events.coming(rows, True)
        try:
            await promoter.promote(
                rows.tolist(), within_s=within_s, wait=True, worth=read.worth, space_for=SpaceFor.READ_AHEAD
            )
        finally:
            events.coming(rows, False)
        arrived = rows[blocks.lie_in(rows, blocks.first_tier)]
        if not read.is_queued:
            self._note_guess(arrived)
            return
        self._note_hinted(arrived)
        if len(arrived) < len(rows):
            events.ask_again()

    def _note_hinted(self, rows: Rows) -> None:
        self._blocks.hinted[rows] = True
        self._counters.hint_promoted_blocks += len(rows)
        self._counters.hint_promoted_bytes += int(self._blocks.size_bytes[rows].sum())

    # Guesses

    def _note_guess(self, rows: Rows) -> None:
        blocks = self._blocks
        guess = np.array([rows, blocks.generation[rows], blocks.access_seq[rows]], np.int64)
        self._unused = np.concatenate([self._unused, guess], axis=1)
        self._counters.read_ahead_blocks += len(rows)
        self._counters.read_ahead_bytes += int(blocks.size_bytes[rows].sum())

    def _count_unused(self) -> None:
        """Count the guesses that left DRAM before a request used them."""
        blocks, (rows, generations, used) = self._blocks, self._unused
        is_same = (blocks.generation[rows] == generations) & blocks.live[rows]
        is_unused = ~is_same | (blocks.access_seq[rows] == used)
        has_left = is_unused & ~(is_same & blocks.lie_in(rows, blocks.first_tier))
        self._counters.read_ahead_unused_blocks += int(has_left.sum())
        self._unused = self._unused[:, is_unused & ~has_left]

    # What is known of the SSD

    def _measure(self, passed_s: float) -> None:
        """What the policy may know of the SSD. `passed_s` is the time since the last measurement."""
        if self._promoter is None:
            return
        conditions = self._ranking.conditions
        pending_bytes = self._promoter.pending_bytes
        rows = np.concatenate([read.rows for read in self._plan]) if self._plan else np.zeros(0, np.int64)
        planned_bytes = int(self._blocks.size_bytes[rows].sum())
        if self._promoter.bytes_per_s:
            conditions.ssd_bytes_per_s = self._promoter.bytes_per_s
        conditions.read_backlog_s = (pending_bytes + planned_bytes) / conditions.ssd_bytes_per_s
        conditions.read_busy += ((pending_bytes > 0) - conditions.read_busy) * -math.expm1(-passed_s / _MEMORY_S)
        counters = self._counters
        conditions.written_bytes, conditions.read_bytes = counters.written_behind_bytes, counters.promoted_bytes
        conditions.demand_read_bytes = counters.promoted_bytes - counters.read_ahead_bytes
