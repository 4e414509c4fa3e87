"""What the mover asks a policy: which blocks leave a tier first, and which are copied up or down at all."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows, TierName

_IN_THREAD_ROWS = 50_000  # Ranking more rows than this would block the event loop for too long.


class Ranked(NamedTuple):
    """Blocks in the order in which they should leave a tier, and the score of each. Arrays of the shape [blocks]."""

    rows: Rows
    scores: NDArray[np.float64]


class Valuation(NamedTuple):
    """What a block is worth in a tier: copies with the lowest scores leave it first."""

    tier: TierName
    score: float
    inputs: Mapping[str, float]  # What the score depends on, by name.


class Ranking(Protocol):
    """All methods are called on the event loop's thread."""

    @property
    def name(self) -> str:
        """The name of the policy."""

    @property
    def lasts_s(self) -> float:
        """For how long the order of blocks stays right that were not used since."""

    async def lowest(self, tier: TierName, rows: Rows, count_max: int) -> Ranked:
        """Those of the rows that should leave `tier` first, at most `count_max`."""

    async def wanted_on_ssd(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of these blocks in DRAM are copied to SSD, for which other blocks are evicted there."""

    async def explain(self, row: int) -> list[Valuation]:
        """What the block is worth in each tier that the policy knows; empty if it does not know the block."""


class RecencyRanking:
    """Single blocks, the least recently used one first: the policy `lru` of the daemon."""

    name = "lru"
    lasts_s = math.inf

    def __init__(self, blocks: BlockTable) -> None:
        self._blocks = blocks

    async def lowest(self, tier: TierName, rows: Rows, count_max: int) -> Ranked:
        used = self._blocks.access_seq[rows]
        if len(rows) > _IN_THREAD_ROWS:
            return await asyncio.to_thread(_lowest, rows, used, count_max)
        return _lowest(rows, used, count_max)

    async def wanted_on_ssd(self, rows: Rows) -> NDArray[np.bool_]:
        return np.ones(len(rows), np.bool_)

    async def explain(self, row: int) -> list[Valuation]:
        blocks, used = self._blocks, int(self._blocks.access_seq[row])
        found = []
        for tier in blocks.tiers_of(row):
            older = blocks.resident(tier) & (blocks.access_seq[: blocks.row_end] < used)
            inputs = {"size_bytes": float(blocks.size_bytes[row]), "blocks_before_it": float(np.count_nonzero(older))}
            found.append(Valuation(tier, float(used), inputs))
        return found


def _lowest(rows: Rows, used: NDArray[np.int64], count_max: int) -> Ranked:
    if len(rows) > count_max:
        few = np.argpartition(used, count_max - 1)[:count_max]
        rows, used = rows[few], used[few]
    order = np.argsort(used, kind="stable")
    return Ranked(rows[order], used[order].astype(np.float64))
