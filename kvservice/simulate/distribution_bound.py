"""What placement can reach that knows how return times are distributed, and nothing else.

The true distribution: of the workload's own gaps, and the share of uses that nothing comes back to. A session is
held only while its chance of returning, by the byte and second, is above the level at which DRAM is just full, and
is read ahead of the ages at which it is. No queue, no hints, no session's own pace: all are alike but for their age
and size. Same mover, tiers and bandwidth as for every policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvservice.policy.base import Hint, Promotion
from kvservice.policy.foresight import ForesightPolicy
from kvservice.policy.hint_times import HintTimes
from kvservice.policy.items import ItemTable
from kvservice.policy.return_times import ReturnTimes
from kvservice.policy.survival import BEGINS, BIN_COUNT, WIDTHS, Floats, bins_of

_NEVER = 1e-12  # Returns a second at ages at which none came.


class DistributionBound(ForesightPolicy):
    """`gaps_s` are the true return times, `never` the share of uses after which none comes."""

    name: ClassVar[str] = "distribution-bound"

    def __init__(self, gaps_s: Floats, never: float) -> None:
        super().__init__(learning=False)
        self._true_hazards = true_hazards(gaps_s, never)
        self._typical_s = float(np.exp(np.log(np.maximum(gaps_s, BEGINS[1])).mean())) if len(gaps_s) else 1.0

    def _start_learning(self, row_count: int) -> tuple[ReturnTimes, HintTimes]:
        returns, hints = super()._start_learning(row_count)
        returns.hazards[:] = self._true_hazards
        returns.typical_s = self._typical_s
        return returns, hints

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float) -> None:
        """Not told."""

    def _queued_soon(self, items: ItemTable, queue: Sequence[int], now_s: float) -> list[Promotion]:
        return []


def true_hazards(gaps_s: Floats, never: float) -> Floats:
    """Returns a second by age, in the bins of `kvservice.policy.survival`."""
    bins = bins_of(gaps_s)
    came = np.bincount(bins, minlength=BIN_COUNT).astype(np.float64)
    within = np.bincount(bins, gaps_s - BEGINS[bins], BIN_COUNT) / WIDTHS
    others = len(gaps_s) * never / (1 - never) if never < 1 else 1.0
    outlived = np.cumsum(came[::-1])[::-1] - came + others
    rate: Floats = np.maximum(came / (np.maximum(outlived + within, 1e-12) * WIDTHS), _NEVER)
    return rate
