"""What an array says of its memory by DLPack: address, shape, strides, element type, device.

The struct is read here, because NumPy refuses element types that it does not have (bfloat16, float8), and so that
neither torch nor CuPy has to be imported for their arrays.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class DLPackTensor(Protocol):
    """A tensor that exports its memory by DLPack, as torch's, CuPy's and JAX's do."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class DLDevice(ctypes.Structure):
    _fields_: ClassVar = [("kind", ctypes.c_int32), ("number", ctypes.c_int32)]


class DType(ctypes.Structure):
    _fields_: ClassVar = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("dimensions", ctypes.c_int32),
        ("dtype", DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # In elements; null where compact.
        ("offset_bytes", ctypes.c_uint64),
    ]


# (type code, bits) of dlpack.h. NumPy's names; the 8-bit floats are those that a layout can have.
KINDS = {
    **{(0, bits): f"int{bits}" for bits in (8, 16, 32, 64)},
    **{(1, bits): f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{(2, bits): f"float{bits}" for bits in (16, 32, 64)},
    (4, 16): "bfloat16",
    (6, 8): "bool",
    (10, 8): "float8_e4m3fn",
    (12, 8): "float8_e5m2",
}
HOST_DEVICES = (1, 3, 11)  # kDLCPU, kDLCUDAHost and kDLROCMHost: pinned memory is host memory too.

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


class ExportedMemory(NamedTuple):
    """Memory that an array exports, valid while `capsule` is kept. The capsule is never marked as consumed, so its own
    destructor returns the array's reference.
    """

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    kind: str  # NumPy's name of the element type, or the DLPack code where it has none.
    item_bytes: int
    capsule: object


def exported_memory(tensor: Any, **options: Any) -> ExportedMemory:
    """The memory that `tensor` exports. `options` are passed to its ``__dlpack__``.

    Raises the error of the array's library if it cannot export the memory: BufferError, RuntimeError or ValueError.
    """
    capsule = tensor.__dlpack__(**options)  # Without a version: all libraries support the first form of the struct.
    described = Tensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(described.shape[: described.dimensions])
    code, bits, lanes = described.dtype.code, described.dtype.bits, described.dtype.lanes
    kind = KINDS.get((code, bits), f"DLPack code {code} with {bits} bits")
    item_bytes = bits * lanes // 8
    strides = described.strides[: described.dimensions] if described.strides else compact_strides(shape)
    return ExportedMemory(
        (described.data or 0) + described.offset_bytes,
        shape,
        tuple(stride * item_bytes for stride in strides),
        kind if lanes == 1 else f"{kind} in {lanes} lanes",
        item_bytes,
        capsule,
    )


def compact_strides(shape: tuple[int, ...], item: int = 1) -> tuple[int, ...]:
    """The strides of an array whose last index varies fastest, in elements of size `item`."""
    strides = []
    for size in reversed(shape):
        strides.append(item)
        item *= size
    return tuple(reversed(strides))


def is_compact(shape: tuple[int, ...], strides: tuple[int, ...], item: int = 1) -> bool:
    """Whether `strides` are `compact_strides`; those of dimensions of one element do not matter."""
    expected = compact_strides(shape, item)
    return all(size <= 1 or given == wanted for size, given, wanted in zip(shape, strides, expected, strict=True))
