"""Bounds that run on the same simulator as the policies: store nothing, and store everything."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.settings import Machine

#: Larger than any workload.
_ENDLESS_BYTES = 2**62


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
