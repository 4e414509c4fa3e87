"""Coarse clocks: a trace whose times are whole multiples of a tick has requests that seem to arrive together."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kvservice.simulate.workload import Workload

#: A longer tick is not believed, nor one that few times attest: such times are multiples of it by chance.
_TICK_MAX_S = 60
_TICKS_THAT_ATTEST = 8
#: A time may be this far from its tick. Mooncake's are up to 3 ms off.
_TOLERANCE_S = 0.01


class Tick(NamedTuple):
    """A clock's tick, and the most requests that share one."""

    seconds: int
    most: int


def tick_of(workload: Workload) -> Tick | None:
    """The tick, if it is a second or longer and requests share it. None for a clock that is finer."""
    arrives = workload.arrives_s
    ticks = np.rint(arrives)
    if not len(arrives) or not (np.abs(arrives - ticks) <= _TOLERANCE_S).all():  # NaN is not close either.
        return None
    times, counts = np.unique(ticks.astype(np.int64), return_counts=True)
    if len(times) == len(arrives):
        return None
    length = int(np.gcd.reduce(np.diff(times))) if len(times) > _TICKS_THAT_ATTEST else 1
    return Tick(length if length <= _TICK_MAX_S else 1, int(counts.max()))


def spread(workload: Workload, tick: Tick, seed: int) -> Workload:
    """The workload with the requests of each tick spread evenly over it, in an order drawn with `seed`.

    The turns of a session keep their order. If a tick has n requests, they are 1/n of it apart.
    """
    ticks = np.rint(workload.arrives_s).astype(np.int64)
    drawn = np.random.default_rng(seed).random(len(ticks))
    order = np.lexsort((drawn, ticks))
    begins = np.flatnonzero(np.diff(ticks[order], prepend=-1))
    counts = np.diff(begins, append=len(ticks))
    place = np.arange(len(ticks)) - np.repeat(begins, counts)
    arrives = np.empty(len(ticks))
    arrives[order] = ticks[order] + tick.seconds * place / np.repeat(counts, counts)
    return replace(workload, arrives_s=arrives[np.lexsort((arrives, workload.session))])
