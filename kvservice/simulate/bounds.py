"""What no policy can do, played on the same simulator: recompute everything, keep everything, know the future."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.settings import Machine

#: More than any workload can fill.
_ENDLESS_BYTES = 2**62


class Bound(Placement):
    """A policy that may have another machine than it is given."""

    def plays_on(self, machine: Machine) -> Machine:
        return machine

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return np.zeros(len(rows))


class NothingKept(Bound):
    """Every request computes all of its history again. It pays for no storage."""

    name: ClassVar[str] = "none"

    def plays_on(self, machine: Machine) -> Machine:
        return replace(machine, dram_bytes=0, ssd_bytes=0)


class EverythingKept(Bound):
    """DRAM without an end. It pays for what the machine has."""

    name: ClassVar[str] = "infinite"

    def plays_on(self, machine: Machine) -> Machine:
        return replace(machine, dram_bytes=_ENDLESS_BYTES, ssd_bytes=0)
