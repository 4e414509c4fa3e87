"""Which stored shards together give a wanted range of layers and heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from kvservice_api.layout import Shard


class HeadRun(NamedTuple):
    """Heads `begin` to `end` of one layer are taken from the stored shard number `source`."""

    source: int
    begin: int
    end: int


def cover(stored: Sequence[Shard], wanted: Shard) -> list[list[HeadRun]] | None:
    """For each wanted layer its runs of heads, in order; None if some are missing.

    The answer is shared between calls: do not change it.
    """
    return _cover(tuple(stored), wanted)


@functools.lru_cache(maxsize=4096)  # All blocks of one model are cut in the same way.
def _cover(stored: tuple[Shard, ...], wanted: Shard) -> list[list[HeadRun]] | None:
    layers: list[list[HeadRun]] = []
    for layer in range(wanted.layer_begin, wanted.layer_end):
        runs: list[HeadRun] = []
        head = wanted.head_begin
        while head < wanted.head_end:
            best = HeadRun(-1, head, head)
            for source, shard in enumerate(stored):
                has_layer = shard.layer_begin <= layer < shard.layer_end
                if has_layer and shard.head_begin <= head and shard.head_end > best.end:
                    best = HeadRun(source, head, min(shard.head_end, wanted.head_end))
            if best.end == head:
                return None
            runs.append(best)
            head = best.end
        layers.append(runs)
    return layers
