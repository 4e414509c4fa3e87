"""First in, first out: the item that entered a tier first is evicted first, independent of its uses."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement


class FifoPolicy(Placement):
    """Ranks by arrival per tier. An item that is promoted from SSD is new in DRAM, and keeps its age on SSD."""

    name: ClassVar[str] = "fifo"
    whole_items: ClassVar[bool] = True
    ranks_by_arrival: ClassVar[bool] = True

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        arrivals = items.dram_seq if tier == TierName.DRAM else items.ssd_seq
        return arrivals[rows].astype(np.float64)

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        # SSD evicted it, and no request has used it since: a new copy would only evict another item.
        return not items.unwanted_on_ssd[row]
