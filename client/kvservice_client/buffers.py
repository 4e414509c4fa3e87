"""Caller's memory as flat bytes: the buffer protocol, NumPy and DLPack, without a copy.

Torch is not imported: its CPU tensors come by DLPack, whose struct is read here, because NumPy
refuses element types that it does not have (bfloat16, float8).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import InvalidRequest

Bytes = NDArray[np.uint8]


@runtime_checkable
class DLPackTensor(Protocol):
    """A tensor that lends its memory by DLPack, as torch's, CuPy's and JAX's do."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


if TYPE_CHECKING:
    from typing_extensions import Buffer  # In collections.abc from Python 3.12 on.

    Source = Buffer | NDArray[Any] | DLPackTensor
else:
    Source = object


def readable(source: object, what: str, size_bytes: int) -> Bytes:
    """The source's bytes. Raises InvalidRequest where it is not contiguous or has another size."""
    view = _flat(source, what)
    if view.size != size_bytes:
        raise InvalidRequest(f"{what} has {view.size} bytes; it must have {size_bytes}", field=what)
    return view


def writable(target: object, what: str, size_bytes: int) -> Bytes:
    """The target's bytes, to be written. Raises InvalidRequest as `readable`, or where it is read-only."""
    view = readable(target, what, size_bytes)
    if not view.flags.writeable:
        raise InvalidRequest(f"{what} is read-only", field=what)
    return view


def _flat(source: Any, what: str) -> Bytes:
    if isinstance(source, np.ndarray):
        return _flat_array(source, what)
    try:
        memory = memoryview(source)
    except TypeError:
        if isinstance(source, DLPackTensor):
            return _flat_tensor(source, what)
        kind = type(source).__name__
        raise InvalidRequest(f"{what} is a {kind}: it has neither a buffer nor DLPack", field=what) from None
    if not memory.c_contiguous:
        raise InvalidRequest(f"{what} is not contiguous", field=what)
    return np.frombuffer(memory, np.uint8)


def _flat_array(array: NDArray[Any], what: str) -> Bytes:
    if not array.flags.c_contiguous:
        raise InvalidRequest(f"{what} is not contiguous", field=what)
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat


class _Device(ctypes.Structure):
    _fields_: ClassVar = [("kind", ctypes.c_int32), ("number", ctypes.c_int32)]


class _DType(ctypes.Structure):
    _fields_: ClassVar = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # In elements; null where compact.
        ("offset_bytes", ctypes.c_uint64),
    ]


_HOST_DEVICES = (1, 3, 11)  # kDLCPU, kDLCUDAHost and kDLROCMHost: pinned memory is host memory too.

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


class _Lent:
    """Memory that a DLPack capsule lends. NumPy keeps this object, and it keeps the capsule.

    The capsule is never marked as consumed, so its own destructor gives the tensor back.
    """

    def __init__(self, capsule: object, address: int, size_bytes: int) -> None:
        self._capsule = capsule
        self.__array_interface__ = {"data": (address, False), "shape": (size_bytes,), "typestr": "|u1", "version": 3}


def _flat_tensor(tensor: DLPackTensor, what: str) -> Bytes:
    try:
        kind, _ = tensor.__dlpack_device__()
        if kind not in _HOST_DEVICES:
            raise InvalidRequest(f"{what} is not in host memory; copy it there first", field=what)
        capsule = tensor.__dlpack__()  # Without a version: the first form of the struct, which all can give.
        described = _Tensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    except (BufferError, RuntimeError, ValueError) as error:
        raise InvalidRequest(f"{what} cannot be lent by DLPack: {error}", field=what) from error
    shape = described.shape[: described.dimensions]
    if described.strides and not _is_compact(shape, described.strides[: described.dimensions]):
        raise InvalidRequest(f"{what} is not contiguous", field=what)
    count = int(np.prod(shape, dtype=np.int64))
    size_bytes = count * described.dtype.bits * described.dtype.lanes // 8
    if not size_bytes:
        return np.empty(0, np.uint8)
    return np.asarray(_Lent(capsule, described.data + described.offset_bytes, size_bytes))


def _is_compact(shape: list[int], strides: list[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
