"""How blocks of a load order are stored: where the requested bytes are in their images, as tables for copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvservice_api.copying import Table
from kvservice_api.errors import InvalidRequest
from kvservice_api.image import BlockGeometry, SliceGeometry, block_geometry
from kvservice_api.layout import Layout, Shard
from kvservice_client.transports.base import LoadOrder

SHARD_BYTES = 8  # Of an encoded shard.
_KEPT_SLICES_MAX = 8192  # Of a load whose tables are kept: they have up to a MiB.


@dataclass(frozen=True, slots=True)
class Form:
    """What blocks of one stored shard and size have in common."""

    shard: Shard
    geometry: BlockGeometry
    slices: tuple[SliceGeometry, ...]  # Of the requested layers.
    is_whole: bool  # Whether all heads of its slices are requested.

    @classmethod
    def of(cls, order: LoadOrder, shard: Shard, token_count: int) -> Self:
        geometry = block_geometry(order.layout, shard, token_count)
        first = order.shard.layer_begin - shard.layer_begin
        slices = geometry.slices[first : first + order.layer_count]
        return cls(shard, geometry, slices, shard.heads == order.shard.heads)  # Each shard covers the request's.

    def runs(self, order: LoadOrder, layer: int) -> list[tuple[int, int]] | None:
        """The requested bytes of one slice: keys, then values. None if all bytes are requested."""
        stored = self.slices[layer]
        wanted = order.layout.heads_of(order.shard, layer + order.shard.layer_begin)
        if self.is_whole or (stored.head_begin, stored.head_end) == wanted:
            return None
        return list(stored.head_runs(*wanted))

    def shape(self) -> tuple[int, int, tuple[int, int]]:
        """Of all slices as one array: where it begins in the image, the distance of two layers, the shape."""
        begins, ends = np.array([each[:2] for each in self.slices], np.int64).T
        sizes, steps = set((ends - begins).tolist()), set(np.diff(begins).tolist())
        if len(sizes) > 1 or len(steps) > 1:
            raise InvalidRequest("the layers of this layout differ in size: use `slices`")
        (size,) = sizes
        return int(begins[0]), steps.pop() if steps else size, (len(self.slices), size)


class CopyTables(NamedTuple):
    """Slices and runs for `copy_slices`, layer after layer, with images that begin at 0. Do not change them."""

    slices: Table
    runs: Table  # Each layer has a target of its own.
    are_alike: bool  # Whether the runs of all layers are the same, except for the target.


def copy_tables(layout: Layout, wanted: Shard, packed_shards: bytes, token_counts: tuple[int, ...]) -> CopyTables:
    """Where the wanted bytes of blocks are that were stored with these shards and token counts."""
    is_small = wanted.layers * len(token_counts) <= _KEPT_SLICES_MAX
    make = _copy_tables if is_small else _copy_tables.__wrapped__
    return make(layout, wanted, packed_shards, token_counts)


@lru_cache(maxsize=16)  # Loads of as many blocks as before begin a tenth of a millisecond earlier.
def _copy_tables(layout: Layout, wanted: Shard, packed_shards: bytes, token_counts: tuple[int, ...]) -> CopyTables:
    shards = [packed_shards[at : at + SHARD_BYTES] for at in range(0, len(packed_shards), SHARD_BYTES)]
    blocks = list(zip(shards, token_counts, strict=True))
    found = {block: _runs_of(layout, wanted, Shard.decode(block[0]), block[1]) for block in dict.fromkeys(blocks)}
    tables = [found[block] for block in blocks]
    ranges = np.stack([table[0] for table in tables], axis=1)  # [layer, block, begin and end]
    needed = np.stack([table[1] for table in tables], axis=1)  # [layer, block, run, begin and size]
    if not needed[:, :, 1, 1].any():
        needed = needed[:, :, :1]
    slices = np.zeros((ranges.shape[0] * ranges.shape[1], 4), np.int64)
    slices[:, 1] = ranges[..., 0].ravel()
    slices[:, 2] = (ranges[..., 1] - ranges[..., 0]).ravel()
    slices[:, 3] = needed.shape[2]
    sizes = needed[..., 1].reshape(len(needed), -1)
    runs = np.zeros((sizes.size, 6), np.int64)
    runs[:, 0] = np.repeat(np.arange(len(sizes)), sizes.shape[1])
    runs[:, 1] = (np.cumsum(sizes, axis=1) - sizes).ravel()
    runs[:, 2] = needed[..., 0].ravel()
    runs[:, 3] = 1
    runs[:, 4] = sizes.ravel()
    by_layer = runs.reshape(len(sizes), -1, 6)[:, :, 1:]
    return CopyTables(slices, runs, bool((by_layer == by_layer[0]).all()))


@lru_cache(maxsize=1024)
def _runs_of(
    layout: Layout, wanted: Shard, stored: Shard, token_count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the wanted part of a block is in its image.

    For each wanted layer begin and end of its slice, shape [layer, 2]; and begin in the slice and size of the wanted
    keys, and of the wanted values, shape [layer, 2, 2]. Where all of a slice is wanted, it is all in the first.
    """
    ranges, runs = [], []
    slices = block_geometry(layout, stored, token_count).slices[wanted.layer_begin - stored.layer_begin :]
    for layer, each in zip(range(wanted.layer_begin, wanted.layer_end), slices, strict=False):
        heads = layout.heads_of(wanted, layer)
        ranges.append((each.start, each.end))
        if heads == (each.head_begin, each.head_end):
            runs.append(((0, each.end - each.start), (0, 0)))
        else:
            keys, values = each.head_runs(*heads)
            runs.append(((keys[0], keys[1] - keys[0]), (values[0], values[1] - values[0])))
    return np.array(ranges, np.int64), np.array(runs, np.int64)
