"""A policy over items, as the daemon's mover asks it: about blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows, TierName
from kvservice.placement.block_items import NO_ITEM, BlockItems

_RANKING_S = 0.25  # Scores change with time. Ranking 100,000 items takes some milliseconds.


class WantedRead(NamedTuple):
    """Blocks to copy up to DRAM, in the order of their chain, until `deadline_s` of the store's monotonic clock."""

    rows: list[int]
    deadline_s: float


class ItemPolicy:
    """A `Policy` of blocks: each has the score of its item, and the end of an item leaves first."""

    def __init__(self, items: BlockItems) -> None:
        self.items = items

    @property
    def name(self) -> str:
        return self.items.policy.name

    @property
    def ranking_lasts_s(self) -> float:
        return _RANKING_S

    def scores(self, blocks: BlockTable, tier: TierName, now_s: float) -> Callable[[Rows], NDArray[np.float64]]:
        return self.items.places(tier, now_s)

    def wants_in_dram(self, blocks: BlockTable, row: int, now_s: float) -> bool:
        item = self.items.item_of(row)
        return item == NO_ITEM or self.items.policy.wants_in_dram(self.items.items, item, now_s)

    def wants_on_ssd(self, blocks: BlockTable, row: int, now_s: float) -> bool:
        if blocks.unwanted_on_ssd[row]:  # SSD evicted it, and no request has used it since.
            return False
        item = self.items.item_of(row)
        return item == NO_ITEM or self.items.policy.wants_on_ssd(self.items.items, item, now_s)

    def wanted_reads(self, blocks: BlockTable, now_s: float) -> Iterator[WantedRead]:
        """What the policy wants to be read ahead now, if it is time to ask it."""
        self.items.settle(now_s)
        policy, items = self.items.policy, self.items.items
        if now_s < policy.look_at_s:
            return
        self.items.note_use()
        wanted = policy.promotions(items, (), now_s)
        each = self.items.rows_of_each([promotion.row for promotion in wanted])
        for (_, deadline_s, _), of_item in zip(wanted, each, strict=True):
            rows = of_item[~blocks.lie_in(of_item, TierName.DRAM)]
            if len(rows):
                yield WantedRead(rows.tolist(), deadline_s)
