"""Where a client says that its pages are in GPU memory, and the checks of that. Uses no GPU.

A wrong offset or stride would make the daemon write into other memory of the client, or end the daemon's use of CUDA.
So each array must be within the allocation that its handle opens, by the size that CUDA says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from kvservice_api.cuda.geometry import LayerPages, PageArray
from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import Layout, Shard

HANDLE_BYTES = 64
FENCE_BYTES = 4
_ALLOCATIONS_MAX = 4096
_BUS_ID = re.compile(r"[0-9a-fA-F]{1,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9a-fA-F]")
_PAGES_MAX, _PAGE_TOKENS_MAX = 2**31 - 1, 2**16


class ArrayPlace(NamedTuple):
    """Keys or values ``[page, kv head, token, dim]`` of one layer, in an allocation. Strides in bytes."""

    allocation: int
    offset_bytes: int
    strides: tuple[int, int, int, int]


class LayerArrays(NamedTuple):
    keys: ArrayPlace
    values: ArrayPlace | None  # None where the layout's values have no dims.
    pages: int
    page_tokens: int
    group: int


class FencePlace(NamedTuple):
    """Words of 4 bytes, by which the client ends the daemon's writes."""

    allocation: int
    offset_bytes: int
    words: int


class MemoryPlaces(NamedTuple):
    """What a client registers: the layers of its shard, in order."""

    bus_id: str
    handles: Sequence[bytes]
    layers: Sequence[LayerArrays]
    fence: FencePlace


def check_places(places: MemoryPlaces, shard: Shard) -> None:
    """Raises InvalidRequest for what is wrong whatever the handles open."""
    handles, layers, fence = places.handles, places.layers, places.fence
    if not _BUS_ID.fullmatch(places.bus_id):  # A message with all of it could be larger than a transport's header.
        raise InvalidRequest("the PCI bus id is none such as 0000:3b:00.0", field="pci_bus_id")
    if not 1 <= len(handles) <= _ALLOCATIONS_MAX or any(len(handle) != HANDLE_BYTES for handle in handles):
        raise InvalidRequest(
            f"there must be 1 to {_ALLOCATIONS_MAX} handles of {HANDLE_BYTES} bytes", field="allocations"
        )
    if len(set(handles)) != len(handles):
        raise InvalidRequest("a handle appears twice", field="allocations")
    if len(layers) != shard.layers:
        raise InvalidRequest(f"{len(layers)} layers are given; the shard has {shard.layers}", field="layers")
    page_tokens_of: dict[int, int] = {}
    for number, layer in enumerate(layers):
        if not 1 <= layer.pages <= _PAGES_MAX or not 1 <= layer.page_tokens <= _PAGE_TOKENS_MAX:
            raise InvalidRequest(
                f"layer {number} has {layer.pages} pages of {layer.page_tokens} tokens", field="layers", layer=number
            )
        if layer.group >= len(layers) or page_tokens_of.setdefault(layer.group, layer.page_tokens) != layer.page_tokens:
            raise InvalidRequest(
                f"layer {number} is in group {layer.group}, which does not exist or has pages of another size",
                field="layers",
                layer=number,
            )
    if set(page_tokens_of) != set(range(len(page_tokens_of))):
        raise InvalidRequest("a group has no layer", field="layers")
    used = [*(array.allocation for layer in layers for array in (layer.keys, layer.values) if array), fence.allocation]
    if max(used) >= len(handles):
        raise InvalidRequest(f"allocation {max(used)} is not one of {len(handles)}", field="allocations")
    if not fence.words or fence.offset_bytes % FENCE_BYTES:
        raise InvalidRequest("the fence has no words, or they are not aligned", field="fence")


def group_count(layers: Sequence[LayerArrays]) -> int:
    return max(layer.group for layer in layers) + 1


def opened_pages(
    places: MemoryPlaces, layout: Layout, shard: Shard, opened: Sequence[tuple[int, int]]
) -> list[LayerPages]:
    """The pages of each layer. `opened`: address and size of each allocation in this process.

    Raises InvalidRequest where an array is not within its allocation.
    """
    pages = []
    for number, layer in enumerate(places.layers):
        group = layout.group_of(shard.layer_begin + number)
        begin, end = layout.heads_of(shard, shard.layer_begin + number)
        item_bytes = group.dtype_bytes
        shape = layer.pages, end - begin, layer.page_tokens
        if (layer.values is None) != (group.v_head_dim == 0):
            raise InvalidRequest(f"layer {number} has values of {group.v_head_dim} dims", field="layers", layer=number)
        keys, values = (
            _opened(array, (*shape, dim), item_bytes, opened, number)
            for array, dim in ((layer.keys, group.k_head_dim), (layer.values, group.v_head_dim))
        )
        pages.append(LayerPages(keys, values, end - begin, layer.page_tokens, item_bytes, group.dtype))
    return pages


def opened_fence(fence: FencePlace, opened: Sequence[tuple[int, int]]) -> int:
    """The address of the first fence word. Raises InvalidRequest."""
    base, size = opened[fence.allocation]
    if fence.offset_bytes + fence.words * FENCE_BYTES > size:
        raise InvalidRequest("the fence is not within its allocation", field="fence")
    return base + fence.offset_bytes


def _opened(
    array: ArrayPlace | None,
    shape: tuple[int, int, int, int],
    item_bytes: int,
    opened: Sequence[tuple[int, int]],
    layer: int,
) -> PageArray:
    if array is None:
        return PageArray(0, shape[0], (0, 0, 0, item_bytes), 0)
    base, size = opened[array.allocation]
    # Python's integers: no product of a client's numbers overflows.
    last = sum((count - 1) * stride for count, stride in zip(shape, array.strides, strict=True))
    if array.offset_bytes + last + item_bytes > size:
        raise InvalidRequest(
            f"pages of layer {layer} reach to byte {array.offset_bytes + last + item_bytes} of an allocation of {size}",
            field="layers",
            layer=layer,
        )
    # A stride that is never used may be any number. The kernels access elements, which must be aligned.
    pages, heads, tokens, dims = (
        stride if count > 1 else own
        for count, stride, own in zip(shape, array.strides, (0, 0, 0, item_bytes), strict=True)
    )
    address = base + array.offset_bytes
    if any(number % item_bytes for number in (address, pages, heads, tokens, dims)):
        raise InvalidRequest(f"elements of layer {layer} are not aligned", field="layers", layer=layer)
    return PageArray(address, shape[0], (pages, heads, tokens, dims), shape[3])
