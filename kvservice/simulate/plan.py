"""How much DRAM and SSD a target takes: the cheapest mix of the two that reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvservice.simulate.result import Result
from kvservice.simulate.workload import Workload

#: Sizes are searched until the bounds on one lie this far apart.
PRECISION = 0.04
_STEP_GB = 1.0  # Nobody buys less.
_DRAM_FACTORS = (1.25, 1.6, 2.0, 3.0, 4.0)
_DRAM_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # Of the footprint, where none is needed.

Measure = Callable[[float, float], Result]
Reaches = Callable[[Result], bool]


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars an hour, of a GiB or a GPU."""

    dram_gb: float
    ssd_gb: float
    gpu: float

    def storage(self, dram_gb: float, ssd_gb: float) -> float:
        return dram_gb * self.dram_gb + ssd_gb * self.ssd_gb


@dataclass(frozen=True, slots=True)
class Mix:
    """Sizes that were simulated and reach the target."""

    dram_gb: float
    ssd_gb: float
    dollars_per_h: float  # Of both tiers.
    result: Result


def mixes(measure: Measure, reaches: Reaches, footprint_gb: float, prices: Prices) -> Iterator[Mix]:
    """Ever cheaper mixes of DRAM and SSD that reach the target; none where nothing does.

    `measure` simulates sizes in GiB, `reaches` says whether a result is good enough; more of a tier is taken to be
    no worse. `footprint_gb` is what holds everything that the load ever stores: no tier has to be larger.
    """
    dram_gb = _smallest(lambda gb: measure(gb, footprint_gb), reaches, 0.0, footprint_gb)
    if dram_gb is None:
        return
    best = math.inf
    more = (
        (dram_gb[0] * each for each in _DRAM_FACTORS) if dram_gb[0] else (footprint_gb * each for each in _DRAM_SHARES)
    )
    for each_gb in (dram_gb[0], *more):
        each_gb = min(each_gb, footprint_gb)
        left = best - each_gb * prices.dram_gb  # What an SSD may cost for the mix to be cheaper.
        if left <= 0:
            continue
        most_gb = min(footprint_gb, left / prices.ssd_gb if prices.ssd_gb else math.inf)
        found = _smallest(lambda gb, dram_gb=each_gb: measure(dram_gb, gb), reaches, 0.0, most_gb)  # type: ignore[misc]
        if found is None:
            continue
        mix = Mix(each_gb, found[0], prices.storage(each_gb, found[0]), found[1])
        if mix.dollars_per_h < best:
            best = mix.dollars_per_h
            yield mix


def _smallest(
    measure: Callable[[float], Result], reaches: Reaches, low_gb: float, high_gb: float
) -> tuple[float, Result] | None:
    """The smallest size found that reaches the target, and what was measured with it."""
    if reaches(result := measure(low_gb)):
        return low_gb, result
    if not reaches(best := measure(high_gb)):
        return None
    low_gb = min(_STEP_GB / 2, high_gb / 2)
    if reaches(result := measure(low_gb)):
        return low_gb, result
    while high_gb / low_gb > 1 + PRECISION and high_gb - low_gb > _STEP_GB:
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
