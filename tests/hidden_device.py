"""A device whose memory the host cannot access: each access by its address ends the process.

The memory is mapped twice. Arrays carry addresses of a mapping without any permission; the device itself copies through
the other one. It gives its arrays by the CUDA array interface, as accelerators do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import CPU, ArrayView, bits_of, view_of
from kvservice_adapter.device.cpu import CpuDevice

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, *([ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long])]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class HiddenArray:
    """An array in the device's memory. It has an address and a shape, and no elements that the host can read."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": None,
            "typestr": typestr,
            "version": 3,
        }


class HiddenDevice(CpuDevice):
    """For one test; `close` it."""

    def __init__(self, size_bytes: int = 16 << 20) -> None:
        descriptor = os.memfd_create("hidden")
        os.ftruncate(descriptor, size_bytes)
        self._open = mmap.mmap(descriptor, size_bytes)
        self._open_address = np.frombuffer(self._open, np.uint8).ctypes.data
        self._hidden_address = int(_libc.mmap(None, size_bytes, _PROT_NONE, mmap.MAP_SHARED, descriptor, 0))
        os.close(descriptor)
        self._size_bytes = size_bytes
        self._used_bytes = 0
        self.accesses = 0  # Arrays that the device's own copies have accessed.

    def close(self) -> None:
        _libc.munmap(self._hidden_address, self._size_bytes)

    def array(self, values: NDArray[Any]) -> HiddenArray:
        """A new array with a copy of these values."""
        made = HiddenArray(self._hidden_address + self._used_bytes, values.shape, values.dtype.str)
        self._used_bytes += -(-values.nbytes // 256) * 256
        assert self._used_bytes <= self._size_bytes
        np.copyto(self.bits(view_of(made)).view(values.dtype), values)
        return made

    def read(self, array: HiddenArray, dtype: Any) -> NDArray[Any]:
        """A copy of an array's values."""
        values: NDArray[Any] = self.bits(view_of(array)).view(dtype).copy()
        return values

    def bits(self, view: ArrayView) -> NDArray[Any]:
        offset = view.address - self._hidden_address
        assert 0 <= offset < self._size_bytes, "the array is not in this device's memory"
        self.accesses += 1
        return bits_of(replace(view, address=self._open_address + offset, device=(CPU, 0)))
