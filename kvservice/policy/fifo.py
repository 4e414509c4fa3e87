"""First in, first out: what came into a tier the longest ago leaves it first, however it was used since."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement


class FifoPolicy(Placement):
    """By arrival, in each tier its own: what comes back from SSD is new in DRAM, and on SSD as old as before."""

    name: ClassVar[str] = "fifo"
    whole_items: ClassVar[bool] = True

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        arrivals = items.dram_seq if tier is TierName.DRAM else items.ssd_seq
        return arrivals[rows].astype(np.float64)

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        # It was the first to leave there: only a use makes it worth another's place.
        return not items.unwanted_on_ssd[row]
