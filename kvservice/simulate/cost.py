"""What a run costs, in dollars."""

from __future__ import annotations

from dataclasses import dataclass

from kvservice.simulate.settings import GIB, Machine


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars per hour and GiB, and per hour and GPU. The defaults are the paper's: AWS, on demand."""

    dram_gb: float = 0.0088
    ssd_gb: float = 0.000082
    gpu: float = 5.0

    def storage(self, dram_gb: float, ssd_gb: float) -> float:
        """Dollars per hour of both tiers."""
        return dram_gb * self.dram_gb + ssd_gb * self.ssd_gb

    def dollars(self, gpu_hours: float, storage_dollars_per_h: float, gpus: int) -> float:
        """Dollars of the GPUs for the time that they work, and of the storage for the same time."""
        return gpu_hours * (self.gpu + storage_dollars_per_h / gpus)


PAPER_PRICES = Prices()


def dollars(hours: float, machine: Machine) -> float:
    """Dollars for `hours` of a machine, with all its GPUs and both tiers, at the paper's prices."""
    return PAPER_PRICES.dollars(hours * machine.gpus, _storage(machine), machine.gpus)


def storage_share(machine: Machine) -> float:
    """The share of storage in the machine's cost, 0 to 1, at the paper's prices."""
    return _storage(machine) / dollars(1.0, machine)


def _storage(machine: Machine) -> float:
    return PAPER_PRICES.storage(machine.dram_bytes / GIB, machine.ssd_bytes / GIB)
