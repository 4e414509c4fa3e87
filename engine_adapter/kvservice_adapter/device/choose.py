"""The one place where a device is chosen for an engine that is given none."""

from __future__ import annotations

from kvservice_adapter.device.base import Device
from kvservice_adapter.device.cpu import CpuDevice


def device_for(kind: str) -> Device:
    """The device for arrays on a `kind` of machine, as engines call it: "cpu".

    Raises ValueError for a kind that no device here is for.
    """
    if kind == "cpu":
        return CpuDevice()
    raise ValueError(f"there is no device for arrays on {kind!r}; give one, or have the engine compute on the CPU")
