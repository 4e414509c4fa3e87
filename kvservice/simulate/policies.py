"""Policies and bounds by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from kvservice.policy import PLACEMENTS
from kvservice.policy.placement import Placement
from kvservice.simulate.bounds import AgesAndAnswers, AgesOnly, EverythingKept, NothingKept
from kvservice.simulate.clairvoyant import optimum_plays
from kvservice.simulate.settings import Machine
from kvservice.simulate.think_times import uses_of
from kvservice.simulate.workload import Workload


def _optimum(workload: Workload, machine: Machine) -> Iterator[Placement]:
    """The clairvoyant's runs and every policy's, so that the bound is at least as high as each policy."""
    yield from optimum_plays(workload, machine)
    yield from (make() for make in PLACEMENTS.values())
    yield AgesOnly(uses_of(workload))
    yield AgesAndAnswers(uses_of(workload))


BOUNDS: dict[str, Callable[[Workload, Machine], Iterable[Placement]]] = {
    "none": lambda workload, machine: [NothingKept()],
    "ages-only": lambda workload, machine: [AgesOnly(uses_of(workload))],
    "ages-and-answers": lambda workload, machine: [AgesAndAnswers(uses_of(workload))],
    "optimum": _optimum,
    "infinite": lambda workload, machine: [EverythingKept()],
}

#: All names, in the order of the tables.
CONTENDERS = ("none", *PLACEMENTS, *(name for name in BOUNDS if name != "none"))


#: Names that bounds had before.
FORMER_NAMES = {"distribution-bound": "ages-only"}


def plays(name: str, workload: Workload, machine: Machine) -> Iterable[Placement]:
    """New policy objects, one per run; the result is the best run. Raises ValueError for an unknown name."""
    if name in PLACEMENTS:
        return [PLACEMENTS[name]()]
    if name in BOUNDS:
        return BOUNDS[name](workload, machine)
    if name in FORMER_NAMES:
        raise ValueError(f"{name!r} is called {FORMER_NAMES[name]} now")
    raise ValueError(f"no policy is called {name!r}: choose among {', '.join(CONTENDERS)}")
