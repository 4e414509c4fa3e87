"""Policies and bounds by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from kvservice.policy import PLACEMENTS
from kvservice.policy.placement import Placement
from kvservice.simulate.bounds import DistributionBound, EverythingKept, NothingKept
from kvservice.simulate.clairvoyant import optimum_plays
from kvservice.simulate.settings import Machine
from kvservice.simulate.think_times import return_times
from kvservice.simulate.workload import Workload


def _optimum(workload: Workload, machine: Machine) -> Iterator[Placement]:
    """The clairvoyant's runs and every policy's, so that the bound is at least as high as each policy."""
    yield from optimum_plays(workload, machine)
    yield from (make() for make in PLACEMENTS.values())
    yield DistributionBound(*return_times(workload))


BOUNDS: dict[str, Callable[[Workload, Machine], Iterable[Placement]]] = {
    "none": lambda workload, machine: [NothingKept()],
    "distribution-bound": lambda workload, machine: [DistributionBound(*return_times(workload))],
    "optimum": _optimum,
    "infinite": lambda workload, machine: [EverythingKept()],
}

#: All names, in the order of the tables.
CONTENDERS = ("none", *PLACEMENTS, *(name for name in BOUNDS if name != "none"))


def plays(name: str, workload: Workload, machine: Machine) -> Iterable[Placement]:
    """New policy objects, one per run; the result is the best run. Raises ValueError for an unknown name."""
    if name in PLACEMENTS:
        return [PLACEMENTS[name]()]
    if name in BOUNDS:
        return BOUNDS[name](workload, machine)
    raise ValueError(f"no policy is called {name!r}: choose among {', '.join(CONTENDERS)}")
