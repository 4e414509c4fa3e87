"""Caller's memory as flat bytes: the buffer protocol, NumPy and DLPack, checked against the layout, without a copy.

Torch is not imported: its CPU tensors are read by DLPack (`dlpack`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import LayerGroup, Layout, Shard
from kvservice_client.dlpack import HOST_DEVICES, DLPackTensor, exported_memory, is_compact

Bytes = NDArray[np.uint8]

_BYTE = np.dtype(np.uint8)
_RAW = ("uint8", "bytes8")  # Element types of plain bytes, in one dimension.
# NumPy lacks these: `BlockCache.layer_arrays` returns integers for them, and integers are accepted for them.
_NUMPY_STAND_INS = {
    "bfloat16": ("int16", "uint16"),
    "float8_e4m3fn": ("int8", "uint8"),
    "float8_e5m2": ("int8", "uint8"),
}


if TYPE_CHECKING:
    from typing_extensions import Buffer  # In collections.abc from Python 3.12 on.

    Source = Buffer | NDArray[Any] | DLPackTensor
else:
    Source = object


class Slices(NamedTuple):
    """The content of a KV buffer: one layer of one or more blocks, slice after slice."""

    group: LayerGroup
    heads: int
    token_counts: Sequence[int]

    @classmethod
    def of(cls, layout: Layout, shard: Shard, layer: int, token_counts: Sequence[int]) -> Slices:
        """`layer` counts from the shard's first."""
        begin, end = layout.heads_of(shard, shard.layer_begin + layer)
        return cls(layout.group_of(shard.layer_begin + layer), end - begin, token_counts)

    @property
    def size_bytes(self) -> int:
        return self.group.slice_bytes(self.heads, sum(self.token_counts))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes that an array of more than one dimension may have; empty if the slices differ in shape.

        ``[blocks, 2, kv_heads, tokens, dim]``, for one block also without the first dimension. Latent vectors have 1
        instead of 2. If K and V have different dims, or the last block is partial, there is no such shape.
        """
        group, tokens = self.group, set(self.token_counts)
        if len(tokens) > 1 or group.v_head_dim not in (0, group.k_head_dim):
            return []
        one = (2 if group.v_head_dim else 1, self.heads, *tokens, group.k_head_dim)
        return [(len(self.token_counts), *one), *([one] if len(self.token_counts) == 1 else [])]

    def check(self, kind: str, stand_ins: Collection[str], shape: Sequence[int], what: str) -> None:
        """Raises InvalidRequest if an array of elements `kind` cannot be these slices.

        `stand_ins` are the element types that the array's library uses instead of a type that it lacks.
        """
        is_raw = kind in _RAW and len(shape) == 1
        dtype = self.group.dtype
        if not is_raw and kind != dtype and kind not in stand_ins:
            raise InvalidRequest(f"{what} has elements of {kind}; its layer has {dtype}", field=what)
        if len(shape) == 1 or tuple(shape) in self.shapes:
            return
        expected = " or ".join(str(list(each)) for each in self.shapes) or "one dimension: its slices are not alike"
        order = "[blocks, 2, kv_heads, tokens, dim]"
        raise InvalidRequest(f"{what} has shape {list(shape)}; it must be {order}: {expected}", field=what)


def readable(source: object, what: str, slices: Slices) -> Bytes:
    """The source's bytes, without a copy.

    An array of one dimension has the layout's elements, or raw bytes (uint8). One of more dimensions has the
    layout's elements and one of `Slices.shapes`. Raises InvalidRequest for another element type, shape or size,
    and if the memory is not contiguous or not host memory.
    """
    view = _flat(source, what, slices)
    if view.size != slices.size_bytes:
        raise InvalidRequest(f"{what} has {view.size} bytes; it must have {slices.size_bytes}", field=what)
    return view


def is_plain(target: object, size_bytes: int) -> bool:
    """Whether it is what `writable` returns for it: the usual buffer of a layer, found out in a microsecond."""
    if type(target) is not np.ndarray or target.dtype != _BYTE or target.shape != (size_bytes,):
        return False
    return target.flags.c_contiguous and target.flags.writeable


def writable(target: object, what: str, slices: Slices) -> Bytes:
    """The target's bytes, writable. Raises InvalidRequest as `readable`, or if the target is read-only."""
    view = readable(target, what, slices)
    if not view.flags.writeable:
        raise InvalidRequest(f"{what} is read-only", field=what)
    return view


def _flat(source: Any, what: str, slices: Slices) -> Bytes:
    if isinstance(source, np.ma.MaskedArray):
        raise InvalidRequest(f"{what} is a masked array: its mask would be lost", field=what)
    if isinstance(source, np.ndarray):
        return _flat_array(source, what, slices)
    try:
        memory = memoryview(source)
    except TypeError:
        if isinstance(source, DLPackTensor):
            return _flat_tensor(source, what, slices)
        kind = type(source).__name__
        raise InvalidRequest(f"{what} is a {kind}: it has neither a buffer nor DLPack", field=what) from None
    if not memory.c_contiguous:
        raise InvalidRequest(f"{what} is not contiguous", field=what)
    try:
        array = np.asarray(memory)
    except (ValueError, NotImplementedError) as error:
        raise InvalidRequest(f"{what} has elements of a kind that NumPy lacks: {error}", field=what) from error
    return _flat_array(array, what, slices)


def _flat_array(array: NDArray[Any], what: str, slices: Slices) -> Bytes:
    if not array.flags.c_contiguous:
        raise InvalidRequest(f"{what} is not contiguous", field=what)
    slices.check(_kind(array.dtype), _NUMPY_STAND_INS.get(slices.group.dtype, ()), array.shape, what)
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat


@lru_cache(maxsize=256)  # NumPy composes the name each time it is read.
def _kind(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else f"{dtype.name} of the other byte order"


class _Flat:
    """Memory that a DLPack capsule exports. NumPy keeps this object, and it keeps the capsule."""

    def __init__(self, capsule: object, address: int, size_bytes: int) -> None:
        self._capsule = capsule
        self.__array_interface__ = {"data": (address, False), "shape": (size_bytes,), "typestr": "|u1", "version": 3}


def _flat_tensor(tensor: DLPackTensor, what: str, slices: Slices) -> Bytes:
    try:
        if tensor.__dlpack_device__()[0] not in HOST_DEVICES:
            raise InvalidRequest(f"{what} is not in host memory; copy it there first", field=what)
        memory = exported_memory(tensor)
    except (BufferError, RuntimeError, ValueError) as error:
        raise InvalidRequest(f"{what} cannot be exported by DLPack: {error}", field=what) from error
    if not is_compact(memory.shape, memory.strides_bytes, memory.item_bytes):
        raise InvalidRequest(f"{what} is not contiguous", field=what)
    slices.check(memory.kind, (), memory.shape, what)
    size_bytes = int(np.prod(memory.shape, dtype=np.int64)) * memory.item_bytes
    if not size_bytes:
        return np.empty(0, np.uint8)
    return np.asarray(_Flat(memory.capsule, memory.address, size_bytes))


def cut(data: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """Views of so many bytes each, one after the other."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [data[start:end] for start, end in pairwise(ends)]
