"""Compiles and launches the kernels of pages.cu: stored slices to pages and back, and the rotation of keys.

A launch neither waits nor allocates. Sizes and alignments are checked here, before each launch; the page ids of a piece
table are checked where it is made (`geometry.piece_table`).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from math import gcd
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice_api.cuda.geometry import LayerPages, PageArray
from kvservice_api.cuda.runtime import DeviceAllocation, Gpu

_BLOCK_THREADS_MAX = 256
_WARP = 32
_UNITS_PER_THREAD = 4
_BLOCKS = 4096  # About as many are launched: enough for every GPU, and few that find nothing to do.
_GRID_Y_MAX = 65535
_INDEX_MAX = 2**31  # Kernels number the units of a piece in 32 bits.
_ROTATED_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_CACHED_ROTATIONS = 8
_VECTOR_BYTES = 16

# As pages.cu has them: every field is of 8 bytes.
_SIDE = np.dtype([(name, "<i8") for name in "pages page_stride head_stride token_stride dim_stride dim width".split()])
_LAYER = np.dtype([("keys", _SIDE), ("values", _SIDE), ("heads", "<i8"), ("item_bytes", "<i8")])
_FENCE = np.dtype([("address", "<i8"), ("value", "<i8")])
_STRETCH = np.dtype([(name, "<i8") for name in "first end row row_step".split()])
_ROTATION = np.dtype([(name, "<i8") for name in "stretches cos sin count half type interleaved in_fp32 width".split()])
_STRIDED = np.dtype(
    [
        (name, "<i8")
        for name in "address outer inner tokens dim outer_stride inner_stride token_stride dim_stride".split()
    ]
)


class StretchLike(Protocol):
    """Consecutive tokens [first, end). `cos` and `sin` are ``[1 or token, dims / 2]``, fp32."""

    @property
    def first(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def cos(self) -> NDArray[np.float32]: ...
    @property
    def sin(self) -> NDArray[np.float32]: ...


class RotationLike(Protocol):
    """What the adapter's `device.rotation.Rotation` is. It never changes."""

    @property
    def stretches(self) -> Sequence[StretchLike]: ...
    @property
    def pairing(self) -> str: ...
    @property
    def in_fp32(self) -> bool: ...


class ArrayLike(Protocol):
    """What the adapter's `device.arrays.ArrayView` is; strides in bytes."""

    @property
    def address(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def item_bytes(self) -> int: ...


class DeviceRotation:
    """A rotation's tables in device memory: of `half` pairs of dims. `PageKernels.rotation` makes it."""

    def __init__(self, memory: DeviceAllocation, argument: NDArray[np.void]) -> None:
        self.half = int(argument["half"])
        self.is_interleaved = bool(argument["interleaved"])
        self.used: dict[int, Any] = {}  # Stream -> the event of its last launch that reads the tables.
        self._memory = memory
        self._argument = argument

    def argument(self, dtype: str, width: int) -> NDArray[np.void]:
        """The kernels' argument, for elements of this type and accesses of `width` bytes."""
        argument = self._argument.copy()
        argument["type"] = _ROTATED_TYPES[dtype]
        argument["width"] = width
        return argument


class PageKernels:
    """The kernels on one device. Any thread may call it."""

    def __init__(self, gpu: Gpu) -> None:
        """Compiles all kernels, unless CuPy's cache on disk has them. Raises what CuPy raises where it cannot."""
        import cupy

        self._gpu = gpu
        self._lock = threading.Lock()
        self._rotations: OrderedDict[int, tuple[RotationLike, DeviceRotation]] = OrderedDict()
        # Memory of dropped rotations, and its last uses.
        self._free: list[tuple[DeviceAllocation, dict[int, Any]]] = []
        source = files("kvservice_api.cuda").joinpath("pages.cu").read_text()
        with gpu.current():
            module = cupy.RawModule(code=source, options=("--std=c++17",))
            self._kernels = {
                name: module.get_function(name) for name in ("scatter", "scatter_rotated", "gather", "rotate")
            }
            for kernel in self._kernels.values():
                kernel.compile()
            self._uploads = gpu.stream()

    def scatter(
        self,
        stream: Any,
        staging_address: int,
        pieces_address: int,
        count: int,
        pages: LayerPages,
        rotation: DeviceRotation | None = None,
        fence: tuple[int, int] | None = None,
    ) -> None:
        """Queue on a cupy.cuda.Stream the copy of stored slices in `staging_address` to pages; then turn the keys.

        `pieces_address` is that of `count` PIECEs in device memory. Their `slice` is the byte offset of the block's
        slice from `staging_address`: a multiple of `pages.token_bytes` or of 16. `fence`: (device address, value)
        of a 32-bit word. Once the word has another value, the kernel begins no further piece. Raises ValueError where
        elements are not aligned, or keys cannot be rotated.
        """
        if not count * pages.token_bytes:
            return
        word = np.zeros((), _FENCE)
        word["address"], word["value"] = fence or (0, 0)
        given = staging_address, pieces_address, np.int64(count), word[()]
        if rotation is None:
            layer, units = _layer(pages, staging_address % _VECTOR_BYTES)
            self._launch(stream, "scatter", units, count, (*given, layer[()]))
            return
        layer, units, width = _rotated_layer(
            pages, staging_address % _VECTOR_BYTES, rotation.half, rotation.is_interleaved
        )
        turned = rotation.argument(pages.dtype, width)
        self._launch(stream, "scatter_rotated", units, count, (*given, layer[()], turned[()]), rotation)

    def gather(self, stream: Any, pages: LayerPages, pieces_address: int, count: int, staging_address: int) -> None:
        """Queue the copy of pages to stored slices; as `scatter`."""
        if count * pages.token_bytes:
            layer, units = _layer(pages, staging_address % _VECTOR_BYTES)
            arguments = (staging_address, pieces_address, np.int64(count), layer[()])
            self._launch(stream, "gather", units, count, arguments)

    def rotate(self, stream: Any, keys: ArrayLike, rotation: DeviceRotation) -> None:
        """Queue the rotation of an array of keys ``[..., token, dim]`` in place; its tokens are those from 0 on.

        Raises ValueError where keys of this type or shape cannot be rotated.
        """
        if 0 in keys.shape or not rotation.half:
            return
        _check_rotated(keys.dtype, keys.shape[-1], rotation.half)
        *leading, tokens, dim = _without_single(keys.shape, keys.strides)
        axes = _merged(leading)
        (inner, inner_stride), (outer, outer_stride) = axes[-1], axes[-2]
        numbers = (keys.address, *(stride for _, stride in (*axes, tokens)))
        width = _pair_width(keys.item_bytes, dim, rotation.half, rotation.is_interleaved, numbers)
        units = inner * tokens[0] * rotation.half
        if units >= _INDEX_MAX:
            raise ValueError(f"keys of shape {keys.shape} are too large to be rotated at once")
        strided = np.zeros((), _STRIDED)
        strided["outer"], strided["outer_stride"] = outer, outer_stride
        strided["inner"], strided["inner_stride"] = inner, inner_stride
        strided["tokens"], strided["token_stride"] = tokens
        strided["dim"], strided["dim_stride"] = dim
        turned = rotation.argument(keys.dtype, width)
        for place in np.ndindex(*(size for size, _ in axes[:-2])):
            strided["address"] = keys.address + sum(
                number * stride for number, (_, stride) in zip(place, axes, strict=False)
            )
            self._launch(stream, "rotate", units, outer, (strided[()], turned[()]), rotation)

    def rotation(self, rotation: RotationLike) -> DeviceRotation:
        """The same rotation with its tables on the device. The last few are kept, by their identity.

        The first call with a rotation waits until its tables are there: not for the engine's thread. Raises ValueError
        for tables that do not belong together.
        """
        with self._lock:
            known = self._rotations.get(id(rotation))
            if known is None:
                known = self._rotations[id(rotation)] = rotation, self._uploaded(rotation)
                if len(self._rotations) > _CACHED_ROTATIONS:
                    self._rotations.popitem(last=False)
            self._rotations.move_to_end(id(rotation))
            return known[1]

    def _uploaded(self, rotation: RotationLike) -> DeviceRotation:
        from cupy.cuda import runtime

        stretches, cos, sin = _tables(rotation)
        parts = [np.frombuffer(part.tobytes(), np.uint8) for part in (stretches, cos, sin)]
        offsets = np.cumsum([0, *(-(-len(part) // _VECTOR_BYTES) * _VECTOR_BYTES for part in parts)])
        image = np.zeros(int(offsets[-1]), np.uint8)
        for part, offset in zip(parts, offsets, strict=False):
            image[offset : offset + len(part)] = part
        with self._gpu.current():
            memory = self._memory(len(image))
            if len(image):
                runtime.memcpyAsync(
                    memory.address, image.ctypes.data, len(image), runtime.memcpyHostToDevice, self._uploads.ptr
                )
            self._uploads.synchronize()
        argument = np.zeros((), _ROTATION)
        for name, offset in zip(("stretches", "cos", "sin"), offsets, strict=False):
            argument[name] = memory.address + offset
        argument["count"], argument["half"] = len(stretches), cos.shape[1]
        argument["interleaved"] = rotation.pairing == "interleaved"
        argument["in_fp32"] = rotation.in_fp32
        made = DeviceRotation(memory, argument)
        weakref.finalize(made, self._free.append, (memory, made.used)).atexit = False
        return made

    def _memory(self, nbytes: int) -> DeviceAllocation:
        """Memory of a rotation that is no longer used, or new memory: cudaMalloc and cudaFree may stop the device."""
        fitting = [entry for entry in self._free if entry[0].nbytes >= nbytes]
        if not fitting:
            return self._gpu.device_memory(1 << max(16, (nbytes - 1).bit_length()))
        entry = min(fitting, key=lambda entry: entry[0].nbytes)
        self._free.remove(entry)
        for event in entry[1].values():
            self._uploads.wait_event(event)
        return entry[0]

    def _launch(
        self,
        stream: Any,
        kernel: str,
        units: int,
        rows: int,
        arguments: tuple[Any, ...],
        rotation: DeviceRotation | None = None,
    ) -> None:
        """`units`: the most that one row of the grid has. A kernel strides over units and rows."""
        threads = min(-(-units // _WARP) * _WARP, _BLOCK_THREADS_MAX)
        columns = min(-(-units // (threads * _UNITS_PER_THREAD)), max(1, _BLOCKS // rows))
        with self._gpu.current(), stream:
            self._kernels[kernel]((columns, min(rows, _GRID_Y_MAX)), (threads,), arguments)
            if rotation is not None:
                event = rotation.used.get(stream.ptr)
                if event is None:
                    event = rotation.used[stream.ptr] = self._gpu.event()
                event.record(stream)


@lru_cache(maxsize=1024)
def _layer(pages: LayerPages, staging: int, first: int = 0) -> tuple[NDArray[np.void], int]:
    """The kernels' argument, and the units of a whole page. `first`: the first dim of keys that is only copied."""
    item, heads = pages.item_bytes, pages.heads
    argument = np.zeros((), _LAYER)
    argument["heads"], argument["item_bytes"] = heads, item
    most = 0
    sides = ("keys", pages.keys, first * item), ("values", pages.values, heads * pages.k_row_bytes)
    for name, array, offset in sides:
        side = argument[name]
        page, head, token, (dim, dim_stride) = _axes(pages, array)
        numbers = array.address, page[1], head[1], token[1], dim * item, staging, pages.token_bytes, offset
        width = _width(item, (dim, dim_stride), numbers)
        side["pages"], side["dim"], side["width"] = array.address, dim, width
        side["page_stride"], side["head_stride"], side["token_stride"] = page[1], head[1], token[1]
        side["dim_stride"] = dim_stride
        most = max(most, heads * pages.page_tokens * dim * item // width)
    if most >= _INDEX_MAX:
        raise ValueError(f"pages of {pages.page_tokens} tokens of {pages.token_bytes} bytes are too large")
    return argument, most


@lru_cache(maxsize=1024)
def _rotated_layer(
    pages: LayerPages, staging: int, half: int, is_interleaved: bool
) -> tuple[NDArray[np.void], int, int]:
    """`_layer` where the first 2 half dims of keys are turned, and the width of the accesses to them."""
    _check_rotated(pages.dtype, pages.keys.dim, half)
    layer, units = _layer(pages, staging, 2 * half)
    units += pages.heads * pages.page_tokens * half
    if units >= _INDEX_MAX:
        raise ValueError(f"pages of {pages.page_tokens} tokens of {pages.token_bytes} bytes are too large")
    *axes, dim = _axes(pages, pages.keys)
    numbers = pages.keys.address, *(stride for _, stride in axes), pages.k_row_bytes, staging, pages.token_bytes
    return layer, units, _pair_width(pages.item_bytes, dim, half, is_interleaved, numbers)


def _axes(pages: LayerPages, array: PageArray) -> list[tuple[int, int]]:
    if min(array.strides) < 0:
        raise ValueError(f"pages with strides {array.strides} are given")
    return _without_single((array.pages, pages.heads, pages.page_tokens, array.dim), array.strides)


def _without_single(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of each axis. An axis of one has no stride that matters."""
    return [(size, stride if size > 1 else 0) for size, stride in zip(shape, strides, strict=True)]


def _merged(axes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer axes with the same elements in the same order; at least two."""
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        else:
            merged.append((size, stride))
    return [(1, 0)] * (2 - len(merged)) + merged


def _width(item: int, dim: tuple[int, int], numbers: Sequence[int]) -> int:
    """Bytes of one access: the most, up to 16, that divides all numbers. `dim` is its size and stride.

    Raises ValueError where elements are not aligned.
    """
    size, stride = dim
    if not size:
        return item
    width = gcd(_VECTOR_BYTES, *numbers)
    if width < item or stride % item:
        raise ValueError(f"elements of {item} bytes are not aligned")
    return width if size == 1 or stride == item else item


def _pair_width(item: int, dim: tuple[int, int], half: int, is_interleaved: bool, numbers: Sequence[int]) -> int:
    width = _width(item, dim, (*numbers, half * item * (2 if is_interleaved else 1)))
    return width if width == _VECTOR_BYTES else item


def _check_rotated(dtype: str, dim: int, half: int) -> None:
    if dtype not in _ROTATED_TYPES:
        raise ValueError(f"keys of {dtype} cannot be rotated; recompute them")
    if 2 * half > dim:
        raise ValueError(f"a rotation of {2 * half} dims is given for keys of {dim} dims")


def _tables(rotation: RotationLike) -> tuple[NDArray[np.void], NDArray[np.float32], NDArray[np.float32]]:
    """The stretches' table, and their rows of cos and sin: ``[row, half]``."""
    stretches = np.zeros(len(rotation.stretches), _STRETCH)
    row = 0
    for entry, stretch in zip(stretches, rotation.stretches, strict=True):
        rows = len(stretch.cos)
        if stretch.cos.shape != stretch.sin.shape or rows not in (1, stretch.end - stretch.first):
            raise ValueError(f"tokens {stretch.first}..{stretch.end} have tables of shape {stretch.cos.shape}")
        entry["first"], entry["end"], entry["row"], entry["row_step"] = stretch.first, stretch.end, row, rows > 1
        row += rows
    if rotation.pairing not in ("half", "interleaved") or len({s.cos.shape[1] for s in rotation.stretches}) > 1:
        raise ValueError(f"a rotation of pairs {rotation.pairing!r} with tables of several widths is not supported")
    if not len(stretches):
        return stretches, np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    cos, sin = (
        np.concatenate([np.asarray(getattr(stretch, name), np.float32) for stretch in rotation.stretches])
        for name in ("cos", "sin")
    )
    return stretches, cos, sin
