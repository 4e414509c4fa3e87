"""A device for torch tensors that are not in host memory, and the only place where a device is chosen by default.

Its streams' threads copy with torch, through pageable host memory; the engine's thread copies nothing. Not tried on an
accelerator: the contract suite runs it on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kvservice_adapter.device.arrays import ArrayView
from kvservice_adapter.device.base import Device, Pages, Slices
from kvservice_adapter.device.cpu import CpuDevice, CpuEvent, CpuStream
from kvservice_adapter.device.rotation import Rotation

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def device_for(place: torch.device) -> Device:
    """The default device for an engine that computes on this torch device."""
    return CpuDevice() if place.type == "cpu" else TorchDevice()


class TorchDevice(CpuDevice):
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


class _TorchStream(CpuStream):
    def gather(
        self,
        pages: Pages,
        token_counts: Sequence[int],
        into: Slices,
        on_block: Callable[[int], None] | None = None,
    ) -> CpuEvent:
        tensor = pages.key_view.array
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            computed = torch.Event(device=tensor.device)
            computed.record()  # After the work that is queued on the engine's own stream.
            self.submit(computed.synchronize)
        return super().gather(pages, token_counts, into, on_block)
