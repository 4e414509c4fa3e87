"""How much DRAM and SSD a target takes: the cheapest mix of the two that reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvservice.simulate.result import Result
from kvservice.simulate.workload import Workload

#: Sizes are searched until the bounds on one lie this far apart.
PRECISION = 0.04
_STEP_GB = 1.0  # Nobody buys less.
_DRAM_FACTORS = (1.5, 2.5, 4.0)
_DRAM_SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)  # Of the footprint, where the target needs none.

Measure = Callable[[float, float], Result]
Reaches = Callable[[Result], bool]


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars an hour, of a GiB or a GPU."""

    dram_gb: float
    ssd_gb: float
    gpu: float

    def storage(self, dram_gb: float, ssd_gb: float) -> float:
        """Dollars an hour."""
        return dram_gb * self.dram_gb + ssd_gb * self.ssd_gb

    def dollars(self, result: Result, storage_dollars_per_h: float, gpus: int) -> float:
        """Of the GPUs for as long as they work, and of the storage for the same time."""
        return result.gpu_hours * (self.gpu + storage_dollars_per_h / gpus)


@dataclass(frozen=True, slots=True)
class Mix:
    """Sizes that were simulated and reach the target."""

    dram_gb: float
    ssd_gb: float
    storage_dollars_per_h: float
    dollars: float  # Of the whole load, GPUs included: DRAM saves their time.
    result: Result


def mixes(measure: Measure, reaches: Reaches, footprint_gb: float, prices: Prices, gpus: int) -> list[Mix]:
    """Mixes of DRAM and SSD that reach the target, the cheapest first; none where nothing does.

    `measure` simulates sizes in GiB, `reaches` says whether a result is good enough; more of a tier is taken to be
    no worse. `footprint_gb` is what holds everything that the load ever stores: no tier has to be larger.
    The least DRAM comes first, and the SSD that goes with it; then more DRAM, then less SSD beside the best of these.
    """

    def mix(dram_gb: float, ssd_gb: float, result: Result) -> Mix:
        per_h = prices.storage(dram_gb, ssd_gb)
        return Mix(dram_gb, ssd_gb, per_h, prices.dollars(result, per_h, gpus), result)

    least = _smallest(lambda gb: measure(gb, footprint_gb), reaches, footprint_gb)
    if least is None:
        return []
    ssd = _smallest(lambda gb: measure(least[0], gb), reaches, footprint_gb)
    assert ssd is not None  # It was reached with `footprint_gb` of it.
    found = [mix(least[0], *ssd)]
    more = (least[0] * each for each in _DRAM_FACTORS) if least[0] else (footprint_gb * each for each in _DRAM_SHARES)
    found += [
        mix(dram_gb, ssd[0], result)
        for dram_gb in more
        if dram_gb <= footprint_gb and reaches(result := measure(dram_gb, ssd[0]))
    ]
    best = min(found, key=lambda each: each.dollars)
    less = _smallest(lambda gb: measure(best.dram_gb, gb), reaches, best.ssd_gb)
    if less is not None and less[0] < best.ssd_gb:
        found.append(mix(best.dram_gb, *less))
    return sorted(found, key=lambda each: each.dollars)


def _smallest(measure: Callable[[float], Result], reaches: Reaches, high_gb: float) -> tuple[float, Result] | None:
    """The smallest size up to `high_gb` that was found to reach the target, and what was measured with it."""
    if reaches(result := measure(0.0)):
        return 0.0, result
    if not reaches(best := measure(high_gb)):
        return None
    low_gb = min(_STEP_GB / 2, high_gb / 2)
    while high_gb > low_gb * (1 + PRECISION) and high_gb - low_gb > _STEP_GB / 2:
        middle_gb = math.sqrt(low_gb * high_gb)  # Sizes span orders of magnitude.
        if reaches(result := measure(middle_gb)):
            high_gb, best = middle_gb, result
        else:
            low_gb = middle_gb
    return high_gb, best


def footprint_tokens(workload: Workload) -> int:
    """Of everything that the load ever stores, were all of it kept."""
    if workload.shares_prefixes:
        return int(workload.item_blocks.sum()) * workload.block_tokens
    tokens = workload.new_tokens.astype(np.int64) + workload.output_tokens
    lengths = np.bincount(workload.session, weights=tokens)
    if workload.context_tokens:
        np.minimum(lengths, workload.context_tokens, out=lengths)
    return int(lengths.sum())
