"""Least recently used: the item with the oldest use is evicted first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Recency
from kvservice.policy.placement import Placement


class LruPolicy(Placement):
    """Ranks by `access_seq` alone, in which a prefix is newer than its suffix within one lookup.

    It reads only the columns of `Recency`, so the daemon can use it for blocks.
    """

    name: ClassVar[str] = "lru"
    whole_items: ClassVar[bool] = True
    ranking_lasts_s: ClassVar[float] = math.inf

    def retention(self, items: Recency, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return items.access_seq[rows].astype(np.float64)

    def scores(self, items: Recency, tier: TierName, now_s: float) -> Callable[[Rows], NDArray[np.float64]]:
        return lambda rows: self.retention(items, rows, tier, now_s)

    def wants_in_dram(self, items: Recency, row: int, now_s: float) -> bool:
        return True

    def wants_on_ssd(self, items: Recency, row: int, now_s: float) -> bool:
        # It was the oldest item on SSD when it was evicted: a new copy would only evict a newer item.
        return not items.unwanted_on_ssd[row]
