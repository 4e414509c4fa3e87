"""The cost of a run at the paper's prices: dollars per hour, on demand."""

from __future__ import annotations

from kvservice.simulate.settings import GIB, Machine

GPU_DOLLARS = 5.0
DRAM_GB_DOLLARS = 0.0088
SSD_GB_DOLLARS = 0.000082


def storage_dollars_per_hour(dram_bytes: int, ssd_bytes: int) -> float:
    """Dollars per hour of both tiers."""
    return (dram_bytes * DRAM_GB_DOLLARS + ssd_bytes * SSD_GB_DOLLARS) / GIB


def dollars(hours: float, machine: Machine) -> float:
    """Dollars for `hours` of a machine, with all its GPUs and both tiers."""
    storage = storage_dollars_per_hour(machine.dram_bytes, machine.ssd_bytes)
    return hours * (machine.gpus * GPU_DOLLARS + storage)


def storage_share(machine: Machine) -> float:
    """The share of storage in the machine's cost, 0 to 1."""
    storage = storage_dollars_per_hour(machine.dram_bytes, machine.ssd_bytes)
    return storage / (machine.gpus * GPU_DOLLARS + storage)
