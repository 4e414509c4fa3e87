"""Least recently used: what nobody asked for the longest leaves first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows, TierName


class LruPolicy:
    """Recency alone, as the table counts it: within one lookup, a prefix is newer than its suffix."""

    name: ClassVar[str] = "lru"

    def retention(self, blocks: BlockTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return blocks.access_seq[rows].astype(np.float64)

    def wants_in_dram(self, blocks: BlockTable, row: int, now_s: float) -> bool:
        return True

    def wants_on_ssd(self, blocks: BlockTable, row: int, now_s: float) -> bool:
        # Once evicted from SSD it was the oldest there: writing it back would only evict a newer one.
        return not blocks.unwanted_on_ssd[row]
