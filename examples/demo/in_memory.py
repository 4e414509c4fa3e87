"""A conversation's KV kept in this process, as an engine without a store keeps it: cut, rotated, and continued.

history = HistoryInMemory(rope)
cache = history.cache()                 # for the next forward; its keys are rotated to their positions
...
history.extend(cache)                   # the KV that the model computed since then
history.cut(keep_on_overflow(history.token_count, window=1024, new_tokens=200))
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvservice_adapter.rope import Rope
from kvservice_adapter.truncation import kept_tokens


class HistoryInMemory:
    """Stores keys as the model rotated them, with their positions, and rotates a copy for each cache."""

    def __init__(self, rope: Rope | None) -> None:
        """Without a `rope` keys are not rotated. That is wrong after a cut; a benchmark measures the error."""
        self._rope = rope
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # [row, head, token, dim] each.
        self._positions = np.empty(0, np.int64)

    @property
    def token_count(self) -> int:
        return len(self._positions)

    def cache(self) -> DynamicCache:
        """A copy as a cache, its keys rotated to positions 0, 1, 2, ..."""
        rotation = self._rope.rotation(self._positions, np.arange(self.token_count)) if self._rope else None
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._layers):
            rotated = keys.clone()
            if rotation is not None:
                rotation.apply(rotated)
            cache.update(rotated, values.clone(), index)
        return cache

    def extend(self, cache: DynamicCache) -> None:
        """Add the KV that the model appended to a cache of this history. A token's position is its index there."""
        before, after = self.token_count, cache.get_seq_length()
        grown = []
        for index, layer in enumerate(cache.layers):
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            new = layer.keys[:, :, before:], layer.values[:, :, before:]
            old = self._layers[index] if self._layers else tuple(part[:, :, :0] for part in new)
            keys, values = (torch.cat(parts, dim=2) for parts in zip(old, new, strict=True))
            grown.append((keys, values))
        self._layers = grown
        self._positions = np.concatenate([self._positions, np.arange(before, after)])

    def cut(self, keep: Sequence[tuple[int, int]]) -> None:
        """Keep only these ranges of tokens, (first, count) each."""
        kept = kept_tokens(keep)
        index = torch.from_numpy(kept)
        self._layers = [(keys[:, :, index], values[:, :, index]) for keys, values in self._layers]
        self._positions = self._positions[kept]
