"""Bounds that run on the same simulator as the policies: store nothing, store everything, know the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.foresight import ForesightPolicy
from kvservice.policy.hint_times import HintTimes
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement
from kvservice.policy.return_times import ReturnTimes
from kvservice.policy.survival import BEGINS, BIN_COUNT, WIDTHS, Floats, bins_of
from kvservice.simulate.settings import Machine

#: Larger than any workload.
_ENDLESS_BYTES = 2**62
_NEVER = 1e-12  # Returns per second at ages without a return.


class Bound(Placement):
    """A policy that may run on a different machine than the given one."""

    def plays_on(self, machine: Machine) -> Machine:
        """The machine that the bound is simulated on."""
        return machine

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return np.zeros(len(rows))


class NothingKept(Bound):
    """Every request recomputes its whole history. The cost includes no storage."""

    name: ClassVar[str] = "none"

    def plays_on(self, machine: Machine) -> Machine:
        return replace(machine, dram_bytes=0, ssd_bytes=0)


class EverythingKept(Bound):
    """DRAM of unlimited size. The cost is that of the given machine."""

    name: ClassVar[str] = "infinite"

    def plays_on(self, machine: Machine) -> Machine:
        return replace(machine, dram_bytes=_ENDLESS_BYTES, ssd_bytes=0)


class DistributionBound(ForesightPolicy):
    """Knows the distribution of return times, and nothing else.

    The distribution is the true one: the workload's own gaps, and the share of uses without a return. A session stays
    in DRAM while its probability of a return, per byte and second, is above the level at which DRAM is exactly full. It
    is promoted ahead of the ages at which that is so. The bound uses no queue, no hints and no pace per session:
    sessions differ only in age and size. The store, the tiers and the bandwidth are the same as for every policy.
    """

    name: ClassVar[str] = "distribution-bound"

    def __init__(self, gaps_s: Floats, never: float) -> None:
        """`gaps_s` are the true return times in seconds, `never` is the share of uses without a return."""
        super().__init__(learning=False)
        self._true_hazards = true_hazards(gaps_s, never)
        self._typical_s = float(np.exp(np.log(np.maximum(gaps_s, BEGINS[1])).mean())) if len(gaps_s) else 1.0

    def _start_learning(self, row_count: int) -> tuple[ReturnTimes, HintTimes]:
        returns, hints = super()._start_learning(row_count)
        returns.hazards[:] = self._true_hazards
        returns.typical_s = self._typical_s
        return returns, hints

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float) -> None:
        """Ignore the hint: the bound knows only the distribution."""

    def _queued_soon(self, items: ItemTable, queue: Sequence[int], now_s: float) -> list[Promotion]:
        return []


def true_hazards(gaps_s: Floats, never: float) -> Floats:
    """The hazard by age: returns per second, one per bin of `kvservice.policy.survival`."""
    bins = bins_of(gaps_s)
    events = np.bincount(bins, minlength=BIN_COUNT).astype(np.float64)
    within = np.bincount(bins, gaps_s - BEGINS[bins], BIN_COUNT) / WIDTHS
    without_return = len(gaps_s) * never / (1 - never) if never < 1 else 1.0
    survivors = np.cumsum(events[::-1])[::-1] - events + without_return
    rate: Floats = np.maximum(events / (np.maximum(survivors + within, 1e-12) * WIDTHS), _NEVER)
    return rate
