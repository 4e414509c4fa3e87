"""Least recently used: what nobody asked for the longest leaves first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Recency
from kvservice.policy.placement import Placement


class LruPolicy(Placement):
    """Recency alone, as the table counts it: within one lookup, a prefix is newer than its suffix.

    It reads nothing else of a table, so it ranks the daemon's blocks as it ranks sessions.
    """

    name: ClassVar[str] = "lru"
    whole_items: ClassVar[bool] = True

    def retention(self, items: Recency, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return items.access_seq[rows].astype(np.float64)

    def wants_in_dram(self, items: Recency, row: int, now_s: float) -> bool:
        return True

    def wants_on_ssd(self, items: Recency, row: int, now_s: float) -> bool:
        # Once evicted from SSD it was the oldest there: writing it back would only evict a newer one.
        return not items.unwanted_on_ssd[row]
