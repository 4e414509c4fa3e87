"""What every placement policy answers."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows, TierName


class Policy(Protocol):
    """Says what is worth keeping. Never changes the table, and may be called from any thread."""

    name: ClassVar[str]

    def retention(self, blocks: BlockTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        """The worth of keeping each of `rows` in `tier`. The lowest leave first; ties leave in any order.

        `rows` have a copy in `tier` and are neither leased nor held.
        """

    def wants_in_dram(self, blocks: BlockTable, row: int, now_s: float) -> bool:
        """Whether a block that is being loaded from SSD shall get a place in DRAM, evicting others."""

    def wants_on_ssd(self, blocks: BlockTable, row: int, now_s: float) -> bool:
        """Whether a block in DRAM shall be copied to SSD, evicting others."""
