"""Least recently used: the item with the oldest use is evicted first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement


class LruPolicy(Placement):
    """Ranks by `access_seq` alone, in which a prefix is newer than its suffix within one lookup."""

    name: ClassVar[str] = "lru"
    whole_items: ClassVar[bool] = True

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return items.access_seq[rows].astype(np.float64)

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        # It was the oldest item on SSD when it was evicted: a new copy would only evict a newer item.
        return not items.unwanted_on_ssd[row]
