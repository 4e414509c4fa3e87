"""Where an array of any library has its elements: NumPy's, what gives DLPack (torch, CuPy, JAX), and what has a
`__cuda_array_interface__`. None of these libraries is imported but NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice_client.dlpack import HOST_DEVICES, compact_strides, exported_memory

CPU, CUDA = 1, 2  # Kinds of devices, as DLPack numbers them.

# Elements are copied as integers of their size: NumPy has no bfloat16 or float8, and no bit of a NaN may change.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True, eq=False)
class ArrayView:
    """An array's memory, which is where `device` says: (DLPack's kind, number). Valid while the view is kept."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # In bytes.
    dtype: str  # NumPy's name of the element type, or "bfloat16", "float8_e4m3fn", "float8_e5m2".
    item_bytes: int
    device: tuple[int, int]
    array: object  # The given object: it keeps the memory alive, with `capsule`.
    capsule: object = None  # DLPack's handle of the export.

    @property
    def is_on_host(self) -> bool:
        """Whether the processor may touch it."""
        return self.device[0] in HOST_DEVICES

    def named(self, dtype: str) -> ArrayView:
        """The same elements under another name of the same size, for libraries that lack the type."""
        return replace(self, dtype=dtype)


def view_of(array: Any) -> ArrayView:
    """Costs microseconds, copies nothing and waits for no stream: the caller orders its work.

    Raises ValueError if it is not an array, or if its memory cannot be exported.
    """
    if isinstance(array, ArrayView):
        return array
    if isinstance(array, np.ndarray):
        return ArrayView(
            array.ctypes.data, array.shape, array.strides, array.dtype.name, array.itemsize, (CPU, 0), array
        )
    if getattr(array, "requires_grad", False):  # torch does not export the memory of tensors that require gradients.
        array = array.detach()
    try:
        if hasattr(array, "__dlpack__"):
            return _by_dlpack(array)
        described = array.__cuda_array_interface__
    except (BufferError, RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"a {type(array).__name__} does not export its memory: {error}") from error
    element = np.dtype(described["typestr"])
    shape = tuple(described["shape"])
    strides = described.get("strides") or compact_strides(shape, element.itemsize)
    return ArrayView(described["data"][0], shape, tuple(strides), element.name, element.itemsize, (CUDA, 0), array)


def bits_of(view: ArrayView) -> NDArray[Any]:
    """Elements in host memory as unsigned integers of their size.

    Raises ValueError if the host may not touch them.
    """
    if not view.is_on_host:
        raise ValueError(f"memory of device {view.device} cannot be read by the host")
    element = np.dtype(_BITS[view.item_bytes])
    if 0 in view.shape:
        return np.empty(view.shape, element)
    return np.asarray(_OnHost(view, element.str))


class _OnHost:
    """NumPy keeps this object, and it keeps the memory."""

    def __init__(self, view: ArrayView, typestr: str) -> None:
        self._view = view
        is_read_only = isinstance(view.array, np.ndarray) and not view.array.flags.writeable
        self.__array_interface__ = {
            "data": (view.address, is_read_only),
            "shape": view.shape,
            "strides": view.strides,
            "typestr": typestr,
            "version": 3,
        }


def _by_dlpack(array: Any) -> ArrayView:
    kind, number = array.__dlpack_device__()
    # -1: no stream waits for another.
    memory = exported_memory(array) if kind in HOST_DEVICES else exported_memory(array, stream=-1)
    place = int(kind), int(number)
    return ArrayView(
        memory.address,
        memory.shape,
        memory.strides_bytes,
        memory.kind,
        memory.item_bytes,
        place,
        array,
        memory.capsule,
    )
