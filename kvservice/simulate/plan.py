"""Finds the cheapest sizes of DRAM and SSD that reach a target hit rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvservice.simulate.cost import Prices
from kvservice.simulate.result import Result
from kvservice.simulate.workload import Workload

#: The search for a size ends when its upper and lower bounds differ by this share.
PRECISION = 0.04
_STEP_GB = 1.0  # Smaller differences do not matter to a buyer.
_DRAM_FACTORS = (1.5, 2.5, 4.0)
_DRAM_SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)  # Of the footprint, if the target needs no DRAM.

Measure = Callable[[float, float], Result]
Reaches = Callable[[Result], bool]


@dataclass(frozen=True, slots=True)
class Mix:
    """One pair of sizes that was simulated and reaches the target."""

    dram_gb: float
    ssd_gb: float
    storage_dollars_per_h: float
    dollars: float  # For the whole load, with the GPUs: more DRAM needs less GPU time.
    result: Result


def mixes(measure: Measure, reaches: Reaches, footprint_gb: float, prices: Prices, gpus: int) -> list[Mix]:
    """Sizes of DRAM and SSD that reach the target, cheapest first; empty if no size reaches it.

    `measure(dram_gb, ssd_gb)` simulates sizes in GiB, and `reaches` decides whether a result is good enough. The search
    assumes that a larger tier is not worse. `footprint_gb` holds everything that the load stores, and is the upper
    limit of both sizes. The search finds the least DRAM with a full-size SSD, then the least SSD for it. It then tries
    more DRAM, and last less SSD for the cheapest pair so far.
    """

    def mix(dram_gb: float, ssd_gb: float, result: Result) -> Mix:
        per_h = prices.storage(dram_gb, ssd_gb)
        return Mix(dram_gb, ssd_gb, per_h, prices.dollars(result.gpu_hours, per_h, gpus), result)

    least = _smallest(lambda gb: measure(gb, footprint_gb), reaches, footprint_gb)
    if least is None:
        return []
    ssd = _smallest(lambda gb: measure(least[0], gb), reaches, footprint_gb)
    assert ssd is not None  # `least` was found with `footprint_gb` of SSD.
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
    """(the smallest size up to `high_gb` that was found to reach the target, its result), or None."""
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
    """Tokens of everything that the load stores, if nothing were evicted."""
    if workload.shares_prefixes:
        return int(workload.item_blocks.sum()) * workload.block_tokens
    tokens = workload.new_tokens.astype(np.int64) + workload.output_tokens
    lengths = np.bincount(workload.session, weights=tokens)
    if workload.context_tokens:
        np.minimum(lengths, workload.context_tokens, out=lengths)
    return int(lengths.sum())
