"""A conversation's KV kept in this process, as an engine without a store keeps it: cut, rotated, and continued.

history = HistoryInMemory(rope)
cache = history.cache()                 # for the next forward; its keys are rotated to their positions
...
history.extend(cache)                   # the KV that the model computed since then
history.cut(keep_on_overflow(history.token_count, window=1024, new_tokens=200))
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from examples.demo.generation import generate, kept_in, new_token_ids, without_end
from examples.demo.script import Message
from examples.models import LoadedModel
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


class EngineInMemory:
    """Answers without the daemon: cuts and rotates the KV in this process."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._history = HistoryInMemory(Rope.from_model(loaded.model))
        self._token_ids: list[int] = []
        self._unread: list[int] = []

    def cache(self) -> DynamicCache:
        """The KV of the remaining conversation, as a cache for the model."""
        return self._history.cache()

    def answer(self, messages: Sequence[Message], window: int) -> tuple[list[int], float]:
        """The tokens of an answer to the last message, and the TTFT when all remaining tokens are recomputed."""
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        began_s = time.perf_counter()
        new = self._unread + new_token_ids(tokenizer, messages)
        keep = kept_in(window, len(self._token_ids), len(new))
        prompt_ids = [*(self._token_ids[at] for at in kept_tokens(keep).tolist()), *new]
        prompt = torch.tensor([prompt_ids])
        recomputed = generate(model, prompt, None, began_s, answer_tokens_max=1)
        if len(prompt_ids) < len(self._token_ids) + len(new):
            self._history.cut(keep)
        cache = self._history.cache()
        token_ids = generate(model, prompt, cache, began_s).token_ids
        self._history.extend(cache)
        known = self._history.token_count
        self._token_ids = token_ids[:known]
        self._unread = without_end(tokenizer, token_ids[known:])
        return token_ids[len(prompt_ids) :], recomputed.ttft_s
