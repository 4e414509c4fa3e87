"""Pages of one layer in device memory, as engines keep them, and the same bytes on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.device.rotation import Rotation
from kvservice_api.cuda.geometry import LayerPages, PageArray, piece_table
from kvservice_api.cuda.page_kernels import DeviceRotation, PageKernels
from kvservice_api.cuda.runtime import Gpu
from tests.contracts.device import WAIT_S, noise

MARGIN_BYTES = 64  # Before and after the pages: other memory.


@dataclass(frozen=True, slots=True)
class Shape:
    pages: int = 7
    heads: int = 2
    tokens: int = 4  # Per page.
    k_dim: int = 8
    v_dim: int = 4


# Offset in elements, and strides in elements of page, head, token and dim.
Placed = tuple[int, tuple[int, int, int, int]]


def _token_major(shape: Shape) -> tuple[Placed, Placed]:
    """[page][token][head][key and value]"""
    row = shape.k_dim + shape.v_dim
    strides = shape.tokens * shape.heads * row, row, shape.heads * row, 1
    return (0, strides), (shape.k_dim, strides)


def _head_major(shape: Shape) -> tuple[Placed, Placed]:
    """[page][head][token][key and value]"""
    row = shape.k_dim + shape.v_dim
    strides = shape.heads * shape.tokens * row, shape.tokens * row, row, 1
    return (0, strides), (shape.k_dim, strides)


def _padded(shape: Shape) -> tuple[Placed, Placed]:
    """Token-major, in pages that are twice as large: two layers share an allocation, page by page."""
    (k_first, strides), (v_first, _) = _token_major(shape)
    doubled = 2 * strides[0], *strides[1:]
    return (k_first, doubled), (v_first, doubled)


def _apart(shape: Shape) -> tuple[Placed, Placed]:
    """[keys, values][page][head][token][dim], with room after each: a view of transformers' buffers."""
    k_page, v_page = (shape.heads * (shape.tokens + 1) * dim for dim in (shape.k_dim, shape.v_dim))
    return (
        (0, (k_page, (shape.tokens + 1) * shape.k_dim, shape.k_dim, 1)),
        (shape.pages * k_page, (v_page, (shape.tokens + 1) * shape.v_dim, shape.v_dim, 1)),
    )


def _transposed_keys(shape: Shape) -> tuple[Placed, Placed]:
    """[page][head]: keys [dim][token], then values [token][dim]"""
    head = shape.tokens * (shape.k_dim + shape.v_dim)
    page = shape.heads * head
    values = shape.tokens * shape.k_dim
    return (0, (page, head, 1, shape.tokens)), (values, (page, head, shape.v_dim, 1))


LAYOUTS: dict[str, Callable[[Shape], tuple[Placed, Placed]]] = {
    "token-major": _token_major,
    "head-major": _head_major,
    "padded pages": _padded,
    "keys and values apart": _apart,
    "transposed keys": _transposed_keys,
}


def on_device(cupy: Any, values: NDArray[Any]) -> Any:
    """A copy in device memory, which every stream may use at once."""
    array = cupy.asarray(values)
    cupy.cuda.get_current_stream().synchronize()
    return array


class PagesOnBoth:
    """Random bits in pages, with other memory around them: on the device, and the same bytes on the host."""

    def __init__(self, cupy: Any, layout: str, shape: Shape, item_bytes: int, dtype: str, seed: int = 0) -> None:
        placed = LAYOUTS[layout](shape)
        ends = [
            first + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
            for (first, strides), sizes in zip(placed, self._sizes(shape), strict=True)
            if 0 not in sizes
        ]
        self.host = noise(2 * MARGIN_BYTES + max(ends) * item_bytes, seed)
        self.device = on_device(cupy, self.host)
        self.dtype = dtype
        self._sizes_of = self._sizes(shape)
        self._placed = [
            (MARGIN_BYTES + first * item_bytes, tuple(stride * item_bytes for stride in strides))
            for first, strides in placed
        ]
        self._item_bytes = item_bytes
        keys, values = (
            PageArray(self.device.data.ptr + first, shape.pages, (strides[0], strides[1], strides[2], strides[3]), dim)
            for (first, strides), dim in zip(self._placed, (shape.k_dim, shape.v_dim), strict=True)
        )
        self.layer = LayerPages(keys, values, shape.heads, shape.tokens, item_bytes, dtype)

    @staticmethod
    def _sizes(shape: Shape) -> list[tuple[int, ...]]:
        return [(shape.pages, shape.heads, shape.tokens, dim) for dim in (shape.k_dim, shape.v_dim)]

    def on_host(self, page_ids: Sequence[int], first_token: int, copied: tuple[int, int] | None) -> Pages:
        keys, values = (
            np.ndarray(sizes, f"u{self._item_bytes}", self.host.data, first, strides)
            if prod(sizes)
            else np.empty(sizes, f"u{self._item_bytes}")
            for (first, strides), sizes in zip(self._placed, self._sizes_of, strict=True)
        )
        return Pages(keys, values, page_ids, first_token, self.dtype, copied)


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of tokens, and the pages that they are in."""

    counts: tuple[int, ...] = (5, 5, 3, 1)
    page_ids: tuple[int, ...] = (6, 0, 3, 5, 1)
    first_token: int = 2
    copied: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        return sum(self.counts)


class Copier:
    """Copies by the kernels, and on the host by the adapter's CPU device."""

    def __init__(self, cupy: Any, gpu: Gpu, kernels: PageKernels, staging_offset: int = 0) -> None:
        self._cupy = cupy
        self._kernels = kernels
        self._offset = staging_offset
        self._stream = gpu.stream()

    def scatter(
        self, slices: NDArray[np.uint8], pages: PagesOnBoth, run: Run, rotation: Rotation | None = None
    ) -> None:
        staging, pieces = self._staged(slices), self.pieces(pages, run)
        turned = None if rotation is None else self._kernels.rotation(rotation)
        self._scatter(staging, pieces, pages, turned)
        self._stream.synchronize()
        event = (
            CpuDevice()
            .stream("reference")
            .scatter(slices, run.counts, pages.on_host(run.page_ids, run.first_token, run.copied), rotation)
        )
        assert event.wait(WAIT_S)
        assert event.error is None

    def _scatter(self, staging: Any, pieces: Any, pages: PagesOnBoth, rotation: DeviceRotation | None) -> None:
        address = staging.data.ptr + self._offset
        self._kernels.scatter(self._stream, address, pieces.data.ptr, len(pieces) // 32, pages.layer, rotation)

    def gather(
        self, pages: PagesOnBoth, run: Run, into: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """What the kernel and the host make of `into`, which has room for the slices."""
        staging, pieces = self._staged(into), self.pieces(pages, run)
        address = staging.data.ptr + self._offset
        self._kernels.gather(self._stream, pages.layer, pieces.data.ptr, len(pieces) // 32, address)
        self._stream.synchronize()
        event = (
            CpuDevice()
            .stream("reference")
            .gather(pages.on_host(run.page_ids, run.first_token, run.copied), run.counts, into)
        )
        assert event.wait(WAIT_S)
        assert event.error is None
        gathered: NDArray[np.uint8] = staging.get()[self._offset : self._offset + len(into)]
        return gathered, into

    def _staged(self, slices: NDArray[np.uint8]) -> Any:
        return on_device(self._cupy, np.concatenate([np.zeros(self._offset, np.uint8), slices]))

    def pieces(self, pages: PagesOnBoth, run: Run) -> Any:
        """The piece table in device memory, for slices that lie one after another."""
        layer = pages.layer
        table = piece_table(run.page_ids, layer.page_tokens, run.first_token, run.counts, run.copied, layer.keys.pages)
        starts = np.cumsum([0, *run.counts]) * layer.token_bytes
        table["slice"] = starts[table["slice"]]
        return on_device(self._cupy, table.view(np.uint8))
