"""Think times: distributions to draw from, and the true return times of a workload."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from kvservice.simulate.workload import Workload

Shape = Literal["people", "exponential", "constant", "lognormal", "bimodal"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

#: Seconds between a user's consecutive requests in a real interactive service of 503 K requests.
PEOPLE_QUANTILES = ((0.01, 6.0), (0.05, 12.0), (0.1, 18.0), (0.5, 43.0), (0.9, 87.0), (0.99, 140.0))
_PEOPLE_LEAST_S = 3.0  # Assumed minimum: the time to read an answer.
# From p90 to p99 the survivors fall to a tenth within 53 s. The last percent continues at that rate.
_PEOPLE_TAIL_S = (140.0 - 87.0) / np.log(10)

_LOGNORMAL_SIGMA = 1.0
_QUICK_SHARE = 0.6  # Of the bimodal shape: the share of users who answer at once. The others return later.
_SLOW_TIMES = 8.0
_BIMODAL_SIGMA = 0.3


def people_gap_s(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quantile function of the real service's gaps, in seconds: log-linear between the known quantiles."""
    below, gaps = np.array([(0.0, _PEOPLE_LEAST_S), *PEOPLE_QUANTILES]).T
    inner = np.exp(np.interp(share, below, np.log(gaps)))
    beyond = np.maximum(share - below[-1], 0.0) / (1 - below[-1])
    gaps_s: NDArray[np.float64] = inner - _PEOPLE_TAIL_S * np.log1p(-beyond)
    return gaps_s


def people_mean_s() -> float:
    """The mean of the real service's gaps, in seconds."""
    midpoints = (np.arange(100_000) + 0.5) / 100_000
    return float(people_gap_s(midpoints).mean())


def draw(shape: Shape, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`count` think times with mean 1, shape [count]. Raises ValueError for an unknown shape."""
    if shape == "people":
        return people_gap_s(rng.random(count)) / people_mean_s()
    if shape == "exponential":
        return rng.exponential(1.0, count)
    if shape == "constant":
        return np.ones(count)
    if shape == "lognormal":
        return unit_lognormal(_LOGNORMAL_SIGMA, count, rng)
    if shape == "bimodal":
        quick = rng.random(count) < _QUICK_SHARE
        scale = np.where(quick, 1.0, _SLOW_TIMES) / (_QUICK_SHARE + (1 - _QUICK_SHARE) * _SLOW_TIMES)
        return scale * unit_lognormal(_BIMODAL_SIGMA, count, rng)
    raise ValueError(f"unknown shape of think times {shape!r}: one of {', '.join(SHAPES)}")


def unit_lognormal(sigma: float, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`count` lognormal numbers with mean 1."""
    return np.exp(sigma * rng.standard_normal(count) - sigma * sigma / 2)


class Uses(NamedTuple):
    """Every use of an item, by a turn. All arrays have the shape [uses]."""

    gap_s: NDArray[np.float64]  # To the item's next use: infinite if there is none, NaN if it depends on the run.
    answer_tokens: NDArray[np.int32]  # Of the turn's answer.


def uses_of(workload: Workload) -> Uses:
    """The true return times after every use.

    The gap after a session's turn is the next think time, or, in a trace, the time between the two requests. The
    gap of a shared prefix is the time between two requests that use the same item.
    """
    if workload.shares_prefixes:
        turns = np.repeat(np.arange(workload.turns), np.diff(workload.path_begins))
        order = np.argsort(workload.path_items, kind="stable")
        owner, turns = workload.path_items[order], turns[order]
        arrives, answers = workload.arrives_s[turns], workload.output_tokens[turns]
        think = np.zeros_like(arrives)
    else:
        owner, arrives, think = workload.session, workload.arrives_s, workload.think_s
        answers = workload.output_tokens
    gap_s = np.full(len(owner), np.inf)
    again = np.flatnonzero(owner[1:] == owner[:-1]) + 1
    # If a turn has a fixed time and the turn before it does not, the gap between them depends on the run: it is NaN.
    gap_s[again - 1] = np.where(np.isnan(arrives[again]), think[again], arrives[again] - arrives[again - 1])
    return Uses(gap_s, answers)


def return_times(workload: Workload) -> tuple[NDArray[np.float64], float]:
    """The true return times: (gaps in seconds, ascending; the share of uses without a later use)."""
    gap_s = uses_of(workload).gap_s
    return np.sort(gap_s[np.isfinite(gap_s)]), float(np.isinf(gap_s).mean()) if len(gap_s) else 1.0
