"""The cache that a model computes with: its history may still be loading, and new tokens are saved meanwhile.

A layer's keys and values are in buffers with space for more tokens, ``[row, head, column, dim]``::

    | history: loaded, or computed again | new tokens ...        | room |
    0                                    history.columns         |
                                                        keys.shape[-2]

Columns that were written once are not written again, so they may be read later on another thread, to be saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from kvservice_adapter.connectors.transformers.forward_saver import Forward, ForwardSaver
from kvservice_adapter.connectors.transformers.history import History, Tensors, grown


class WholeLayer(DynamicLayer):
    """A layer that keeps all tokens, with sliding-window attention too: there the mask excludes what is before
    the window, where a layer of the library's own drops it.
    """

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding


def whole_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache of the library's that keeps every token in every layer."""
    cache = DynamicCache(config=config)
    cache.layers = [WholeLayer(is_sliding) for is_sliding in cache.is_sliding]
    return cache


class StoredLayer(DynamicLayer):
    """One layer. The first access to its keys or values waits for the history."""

    is_initialized = False

    def __init__(self, index: int, history: History, saver: ForwardSaver, is_sliding: bool) -> None:
        self.is_sliding = is_sliding  # Masks are made for it; all tokens are kept, as in `WholeLayer`.
        self._index = index
        self._history = history
        self._saver = saver
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._buffers: Tensors | None = None  # With room for more tokens; `_keys` and `_values` are their beginnings.
        self._is_awaited = False
        super().__init__()
        if history.columns:
            self.dtype, self.device = history.dtype, history.device
            self.is_initialized = self._is_awaited = True

    @property
    def keys(self) -> torch.Tensor | None:
        self._arrive()
        return self._keys

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._change(states is None)
        self._keys = states

    @property
    def values(self) -> torch.Tensor | None:
        self._arrive()
        return self._values

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._change(states is None)
        self._values = states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        if self._is_awaited:
            return self._history.columns
        if self._keys is None or self._keys.numel() == 0:
            return 0
        return int(self._keys.shape[-2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new tokens' states `[row, head, token, dim]`. Returns all keys and values of the layer."""
        self._arrive()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None and self._values is not None
        if not (_continues(self._keys, key_states) and _continues(self._values, value_states)):
            self._saver.stop("states of another kind were added to the cache")
            self._buffers = None
            self._keys = torch.cat([self._keys, key_states], dim=-2)
            self._values = torch.cat([self._values, value_states], dim=-2)
            return self._keys, self._values
        first = self.get_seq_length()
        end = first + key_states.shape[-2]
        if self._buffers is None or end > min(each.shape[-2] for each in self._buffers):
            self._buffers = grown(self._keys, first, end), grown(self._values, first, end)
        keys, values = self._buffers
        keys[..., first:end, :].copy_(key_states)
        values[..., first:end, :].copy_(value_states)
        self._keys, self._values = keys[..., :end, :], values[..., :end, :]
        self._wrote(first, keys, values)
        return self._keys, self._values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)  # Returns without effect, or raises with the reason.
            return
        self._arrive()
        assert self._keys is not None and self._values is not None
        self._keys = self._keys[..., :tokens_to_remove, :]
        self._values = self._values[..., :tokens_to_remove, :]
        self._buffers = None  # A save may still read the columns after it, so they must not be overwritten.
        self._saver.crop(self.get_seq_length())

    def reset(self) -> None:
        self._is_awaited = False
        super().reset()

    def _arrive(self) -> None:
        if self._is_awaited:
            keys, values = self._history.layer(self._index)
            columns = self._history.columns
            self._buffers = keys, values
            self._keys, self._values = keys[..., :columns, :], values[..., :columns, :]
            self._is_awaited = False

    def _wrote(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._saver.layer(self._index, first, keys, values)

    def _change(self, is_dropped: bool) -> None:
        """Keys or values are replaced from outside: rows were reordered, repeated, selected, or moved."""
        self._buffers = None
        if self.is_initialized or not is_dropped:
            self._arrive()
            self._saver.stop("the cache was changed from outside")


class StoredCache(DynamicCache):
    """A `DynamicCache` of such layers. A copy of it (`copy.deepcopy`) is a plain one that holds the same."""

    def __init__(
        self,
        config: PretrainedConfig,
        history: History,
        saver: ForwardSaver,
        on_forward: Callable[[int, int, float], None],
        hooks: object,
    ) -> None:
        """`hooks` call `begin` and `end` for forwards of the model, as long as they are kept: the cache keeps them.

        `on_forward` is called after each forward that raised nothing: its tokens, those before, seconds without waits.
        """
        super().__init__(config=config)
        self.history = history
        self.saver = saver
        self.hooks = hooks
        self.layers = [StoredLayer(index, history, saver, each) for index, each in enumerate(self.is_sliding)]
        self._on_forward = on_forward
        self._began = 0, 0.0, 0.0

    def begin(self, forward: Forward) -> None:
        """A forward with this cache begins."""
        columns = self.get_seq_length()
        if columns == self.history.columns:
            other = self.saver.other_mask(forward, columns)
            if other is not None and self.history.compute_masked(other):
                self.saver.adopt(other)
            self.history.begin()
        self.saver.begin(forward, columns)
        self._began = columns, time.perf_counter(), self.history.lost_s

    def end(self, *, is_whole: bool) -> None:
        """It has ended; `is_whole` where it raised nothing."""
        self.saver.end(is_whole=is_whole)
        columns, began_s, lost_s = self._began
        if is_whole:
            taken_s = time.perf_counter() - began_s - (self.history.lost_s - lost_s)
            self._on_forward(self.get_seq_length() - columns, columns, taken_s)

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicCache:
        copied = DynamicCache()
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, StoredLayer)
            if layer.keys is not None and layer.values is not None:
                copied.update(layer.keys.clone(), layer.values.clone(), index)
        return copied


def _continues(states: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether new states can be written after these: one kind of tensor, and no gradient is asked of them."""
    return (
        states.shape[:2] == new.shape[:2]
        and states.shape[-1] == new.shape[-1]
        and states.dtype == new.dtype
        and states.device == new.device
        and not (torch.is_grad_enabled() and (new.requires_grad or states.requires_grad))
    )
