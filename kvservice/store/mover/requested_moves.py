"""Moves that a client asks for: blocks to DRAM ahead of their load, and copies out of a tier.

Called on the event loop's thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvservice.blocks import NO_ROW, BlockTable, TierName
from kvservice.clock import Clock
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.mover.active_policy import ActivePolicy
from kvservice.store.mover.promoter import Promoter
from kvservice.store.tasks import LoopBudget, in_parts

_KEYS_A_TURN = 128


class PrefetchOutcome(NamedTuple):
    missing: int
    in_dram: int
    promoted: int
    failed: int


class EvictOutcome(NamedTuple):
    evicted: int
    held: int
    missing: int


class RequestedMoves:
    def __init__(
        self,
        blocks: BlockTable,
        lifecycle: BlockLifecycle,
        promoter: Promoter | None,
        policy: ActivePolicy,
        clock: Clock,
        loop_budget: LoopBudget,
    ) -> None:
        self._blocks = blocks
        self._lifecycle = lifecycle
        self._promoter = promoter
        self._policy = policy
        self._clock = clock
        self._loop_budget = loop_budget

    async def prefetch(self, caller: Caller, keys: Sequence[bytes], *, within_s: float, wait: bool) -> PrefetchOutcome:
        """Promote blocks to DRAM ahead of their load."""
        blocks, unique = self._blocks, list(dict.fromkeys(keys))
        wanted: list[int] = []
        missing = in_dram = 0
        for start in range(0, len(unique), _KEYS_A_TURN):
            await self._loop_budget.slot()
            first = blocks.rows_of_keys(unique[start : start + _KEYS_A_TURN])
            rows = [row for start in first.tolist() for row in blocks.shards_of(start)]
            is_absent = ~blocks.lie_in(np.array(rows, np.int64), blocks.first_tier)
            missing += int((first == NO_ROW).sum())
            in_dram += len(rows) - int(is_absent.sum())
            wanted += itertools.compress(rows, is_absent)
        if self._promoter is None or not wanted:
            return PrefetchOutcome(missing, in_dram, 0, len(wanted))
        await self._promoter.promote(wanted, within_s=within_s, wait=wait)
        if not wait:
            return PrefetchOutcome(missing, in_dram, len(wanted), 0)
        promoted = int(blocks.lie_in(np.array(wanted), blocks.first_tier).sum())
        return PrefetchOutcome(missing, in_dram, promoted, len(wanted) - promoted)

    async def evict(self, caller: Caller, keys: Sequence[bytes], tier: TierName) -> EvictOutcome:
        """Drop copies from one tier. Leased, busy and pinned copies stay."""
        done = await in_parts(list(dict.fromkeys(keys)), lambda part: self._evict(part, tier), self._loop_budget)
        return EvictOutcome(*(sum(each) for each in zip(*done, strict=True))) if done else EvictOutcome(0, 0, 0)

    async def _evict(self, keys: Sequence[bytes], tier: TierName) -> EvictOutcome:
        """As many blocks as fit into one turn of the event loop."""
        blocks, now_ms = self._blocks, self._clock.wall_ms()
        held = missing = 0
        rows: list[int] = []
        for first in blocks.rows_of_keys(keys).tolist():
            copies = [row for row in blocks.shards_of(first) if blocks.is_resident(row, tier)]
            missing += not copies
            free = [row for row in copies if self._lifecycle.is_free(row) and not blocks.pin_keeps(row, tier, now_ms)]
            held += len(copies) - len(free)
            rows += free
        if tier == blocks.first_tier:
            self._policy.evicted(np.array(rows, np.int64))
        await self._lifecycle.evict(rows, tier)
        return EvictOutcome(len(rows), held, missing)
