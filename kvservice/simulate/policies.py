"""Policies and bounds by name, as a run needs them."""

from __future__ import annotations

from kvservice.policy import PLACEMENTS
from kvservice.policy.placement import Placement
from kvservice.simulate.distribution_bound import DistributionBound
from kvservice.simulate.settings import Machine
from kvservice.simulate.think_times import return_times
from kvservice.simulate.workload import Workload

CONTENDERS = (*PLACEMENTS, DistributionBound.name)


def make(name: str, workload: Workload, machine: Machine) -> Placement:
    """A fresh policy for one run. Raises ValueError for an unknown name."""
    if name in PLACEMENTS:
        return PLACEMENTS[name]()
    if name == DistributionBound.name:
        return DistributionBound(*return_times(workload))
    raise ValueError(f"no policy is called {name!r}: choose among {', '.join(CONTENDERS)}")
