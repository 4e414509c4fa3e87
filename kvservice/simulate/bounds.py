"""Bounds that run on the same simulator as the policies: store nothing, store everything, know the return times."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from kvservice.simulate.think_times import Uses

#: Larger than any workload.
_ENDLESS_BYTES = 2**62
#: Classes of the last answer's length, with equally many answers each.
ANSWER_CLASSES = 32
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


class AgesOnly(ForesightPolicy):
    """Knows the distribution of return times by the age since the last use, and nothing else.

    The distribution is the true one: the workload's own gaps, and the share of uses without a return. A session stays
    in DRAM while its Whittle index, per byte, is above the level at which DRAM is exactly full. It is promoted ahead of
    the ages at which that is so. No queue, no hints and no pace per session: sessions differ in age and size only. The
    store, the tiers and the bandwidth are the same as for every policy. A policy that knows more may exceed it.
    """

    name: ClassVar[str] = "ages-only"

    def __init__(self, uses: Uses) -> None:
        super().__init__(learning=False)
        self._known = KnownReturns.of(uses, self._edges(uses))

    def _edges(self, uses: Uses) -> list[float]:
        """Where classes of the last answer's length begin, without the first."""
        return []

    def _start_learning(self, row_count: int) -> tuple[ReturnTimes, HintTimes]:
        return _KnownReturnTimes(row_count, self._known), HintTimes(row_count)

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float, kind: int = 0) -> None:
        """Ignore the hint: the bound knows only the distribution."""

    def _queued_soon(self, items: ItemTable, queue: Sequence[int], now_s: float) -> list[Promotion]:
        return []


class AgesAndAnswers(AgesOnly):
    """Knows also how return times depend on the last answer's length: one true distribution per class of lengths."""

    name: ClassVar[str] = "ages-and-answers"

    def _edges(self, uses: Uses) -> list[float]:
        shares = np.arange(1, ANSWER_CLASSES) / ANSWER_CLASSES
        return np.unique(np.quantile(uses.answer_tokens, shares)).tolist() if len(uses.answer_tokens) else []


@dataclass(frozen=True, slots=True)
class KnownReturns:
    """The true return times of a workload, by class of the last answer's length."""

    edges: list[float]
    hazards: Floats  # Shape [class, bin]: returns per second.
    typical_s: float

    @staticmethod
    def of(uses: Uses, edges: list[float]) -> KnownReturns:
        """From all uses of the workload."""
        classes = np.searchsorted(edges, uses.answer_tokens, side="right")
        known_s = uses.gap_s[~np.isnan(uses.gap_s)]
        classes = classes[~np.isnan(uses.gap_s)]
        hazards = np.stack([_hazards_of(known_s[classes == each]) for each in range(len(edges) + 1)])
        gaps_s = known_s[np.isfinite(known_s)]
        typical_s = float(np.exp(np.log(np.maximum(gaps_s, BEGINS[1])).mean())) if len(gaps_s) else 1.0
        return KnownReturns(edges, hazards, typical_s)


def _hazards_of(gaps_s: Floats) -> Floats:
    returns = np.isfinite(gaps_s)
    return true_hazards(gaps_s[returns], 1 - returns.mean() if len(gaps_s) else 1.0)


class _KnownReturnTimes(ReturnTimes):
    def __init__(self, row_count: int, known: KnownReturns) -> None:
        super().__init__(row_count, learning=False)
        self._edges = known.edges
        self.hazards = known.hazards
        self.typical_s = known.typical_s

    def start_waiting(self, row: int, uses: int, answer_tokens: int, now_s: float, value: float = 1.0) -> None:
        super().start_waiting(row, uses, answer_tokens, now_s, value)
        self.in_class[row] = bisect_right(self._edges, answer_tokens)


def true_hazards(gaps_s: Floats, never: float) -> Floats:
    """The hazard by age: returns per second, one per bin of `kvservice.policy.survival`."""
    bins = bins_of(gaps_s)
    events = np.bincount(bins, minlength=BIN_COUNT).astype(np.float64)
    within = np.bincount(bins, gaps_s - BEGINS[bins], BIN_COUNT) / WIDTHS
    without_return = len(gaps_s) * never / (1 - never) if never < 1 else 1.0
    survivors = np.cumsum(events[::-1])[::-1] - events + without_return
    rate: Floats = np.maximum(events / (np.maximum(survivors + within, 1e-12) * WIDTHS), _NEVER)
    return rate
