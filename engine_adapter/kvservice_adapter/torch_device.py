"""A device for torch tensors that are not in host memory, and the only place where a device is chosen by default.

Its streams' threads copy with torch, through pageable host memory; the engine's thread copies nothing. It serves
accelerators for which there is no device of ours, and CUDA without CuPy. Not tried on an accelerator: the contract
suite runs it on tensors of the CPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvservice_adapter.device.arrays import ArrayView
from kvservice_adapter.device.base import Computed, Device, NotTurned
from kvservice_adapter.device.cpu import CpuDevice, CpuStream
from kvservice_adapter.device.cuda import CudaUnavailable, open_device
from kvservice_adapter.device.rotation import Rotation

log = logging.getLogger(__name__)

_EXTRA = "The extra cuda13, or cuda12, by the CUDA version of the driver, installs CuPy"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def device_for(place: torch.device) -> Device:
    """The default device for an engine that computes on this torch device.

    On a GPU without CuPy, or without memory for its staging, copies are slow: a log line says why.
    """
    if place.type == "cpu":
        return CpuDevice()
    if place.type == "cuda":
        ordinal = torch.cuda.current_device() if place.index is None else place.index
        try:
            return open_device(ordinal, lambda: torch.cuda.current_stream(ordinal).cuda_stream)
        except CudaUnavailable as why:
            log.warning("KV is copied through pageable memory, slowly: %s. %s", why, _EXTRA)
    return TorchDevice(place)


def turn(device: Device, keys: torch.Tensor, rotation: Rotation) -> None:
    """As `device.rotate`. Where the device fails, the processor turns the keys, once the engine has computed them."""
    try:
        device.rotate(keys, rotation)
    except NotTurned as why:
        log.warning("keys are turned by the processor, slowly: %s", why)
        TorchDevice(keys.device).rotate(keys, rotation)


class TorchDevice(CpuDevice):
    def __init__(self, place: torch.device | None = None) -> None:
        """`place` is where the engine computes; None for the CPU."""
        self._place = place

    def computed(self) -> Computed:
        if self._place is None:
            return Computed()
        try:
            if self._place.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return Computed("the engine's work is being captured in a CUDA graph")
            event = torch.Event(device=self._place)
            event.record()  # After the work that is queued on the engine's own stream.
        except RuntimeError as error:
            return Computed(f"no event can be recorded: {error}")
        return _TorchComputed(event=event)

    def stream(self, name: str) -> CpuStream:
        return _TorchStream(self, name)

    def bits(self, view: ArrayView) -> Any:
        assert isinstance(view.array, torch.Tensor)
        return view.array.detach().view(_BITS[view.item_bytes])

    def copy(self, source: Any, target: Any) -> None:
        if isinstance(source, np.ndarray) and isinstance(target, torch.Tensor):
            source = torch.from_numpy(np.ascontiguousarray(source).view(f"i{source.itemsize}")).view(target.dtype)
        if isinstance(target, torch.Tensor):
            target.copy_(source)
        else:
            np.copyto(target, source.cpu().numpy().view(target.dtype))

    def rotate_bits(self, keys: Any, dtype: str, rotation: Rotation, first_token: int) -> None:
        if not isinstance(keys, torch.Tensor):
            super().rotate_bits(keys, dtype, rotation, first_token)
            return
        on_host = keys.cpu().numpy().view(f"u{keys.element_size()}").copy()
        super().rotate_bits(on_host, dtype, rotation, first_token)
        self.copy(on_host, keys)


@dataclass(frozen=True, slots=True)
class _TorchComputed(Computed):
    event: torch.Event | None = None


class _TorchStream(CpuStream):
    def after(self, computed: Computed) -> None:
        super().after(computed)
        if isinstance(computed, _TorchComputed) and computed.event is not None:
            self.submit(computed.event.synchronize)
