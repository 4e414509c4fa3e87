"""Layouts with `rotated=False`: keys are stored as they are before rotation, and rotated where they are read.

What a cache is given is rotated already. So the modules that compute the keys are watched, and each layer keeps
both: rotated for the model, as they were for the store. Where a history comes in, its keys are rotated by the
stream that loads them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from transformers import PreTrainedModel

from kvservice_adapter.connectors.transformers.cache import StoredCache, StoredLayer, grown, whole_cache
from kvservice_adapter.connectors.transformers.history import Buffers
from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel
from kvservice_adapter.device.base import Pages
from kvservice_adapter.rope import Rope
from kvservice_api.layout import Layout

_CAPTURED = threading.local()  # `into`: where this thread's forward leaves its keys, layer by layer.
_WATCHED: WeakSet[torch.nn.Module] = WeakSet()
_PROBE_TOKENS = 8
_DIFFERENCE_MAX = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # Share of the keys' norm.


@contextmanager
def capturing(into: dict[int, torch.Tensor] | None) -> Iterator[None]:
    """Forwards of this thread leave their keys here, ``[row, token, ...]`` of each layer; None: nowhere."""
    before = getattr(_CAPTURED, "into", None)
    _CAPTURED.into = into
    try:
        yield
    finally:
        _CAPTURED.into = before


def watch_keys(model: PreTrainedModel, layout: Layout, rope: Rope) -> None:
    """Have the model's layers show their keys before rotation.

    Raises UnsupportedModel where it computes them otherwise than in modules of their own, or where these keys,
    once rotated, are not those of its cache.
    """
    sources = _key_modules(model, layout.layers)
    if model not in _WATCHED:
        for index, module in sources.items():
            module.register_forward_hook(_leave(index))
        _WATCHED.add(model)
    _try_on(model, layout, rope)


def _leave(index: int) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        into = getattr(_CAPTURED, "into", None)
        if into is not None:
            into[index] = output

    return hook


def _key_modules(model: PreTrainedModel, layer_count: int) -> dict[int, torch.nn.Module]:
    """For each layer the module whose output is the key that is rotated next."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        source = getattr(module, "k_norm", None) or getattr(module, "k_proj", None)
        if isinstance(index, int) and isinstance(source, torch.nn.Module):
            found[index] = source
    if sorted(found) != list(range(layer_count)):
        raise UnsupportedModel(f"{type(model).__name__} shows no keys before rotation; keep them rotated")
    return found


@torch.no_grad()
def _try_on(model: PreTrainedModel, layout: Layout, rope: Rope) -> None:
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] % model.config.vocab_size
    cache, captured = whole_cache(model.config), dict[int, torch.Tensor]()
    with capturing(captured):
        model(tokens, past_key_values=cache)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        given = captured.get(index)
        if given is None or given.numel() != layer.keys.numel():
            raise UnsupportedModel(f"layer {index} shows no keys before rotation; keep them rotated")
        keys = as_states(given, layout, index).clone()
        rope.rotate(keys, np.arange(_PROBE_TOKENS))
        difference = float((keys.float() - layer.keys.float()).norm() / layer.keys.float().norm())
        if not difference <= _DIFFERENCE_MAX[keys.dtype]:
            raise UnsupportedModel(
                f"layer {index} does more to its keys than to rotate them: they differ by {difference:.2g}; "
                "keep them rotated"
            )


def as_states(captured: torch.Tensor, layout: Layout, index: int) -> torch.Tensor:
    """What a module gave, ``[row, token, head * dim]`` or ``[row, token, head, dim]``, as a cache has it."""
    rows, tokens = captured.shape[:2]
    group = layout.group_of(index)
    return captured.view(rows, tokens, group.kv_heads, group.k_head_dim).transpose(1, 2)


class UnrotatedLayer(StoredLayer):  # type: ignore[no-untyped-call]  # The library's own class hook has no types.
    """Keeps its keys as they were before rotation too."""

    def __init__(self, index: int, cache: UnrotatedCache, layout: Layout, is_sliding: bool) -> None:
        self._layout = layout
        self._captured = cache.captured
        self._raw: torch.Tensor | None = None  # A buffer with room, as long as nothing was changed.
        super().__init__(index, cache.history, cache.writing, is_sliding)

    @property
    def raw_keys(self) -> torch.Tensor | None:
        """``[row, head, column, dim]``. None where they are not known."""
        self._arrive()
        return self._raw[..., : self.get_seq_length(), :] if self._raw is not None else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        captured = self._captured.pop(self._index, None)
        first = self.get_seq_length()
        self._arrive()
        end = first + key_states.shape[-2]
        if captured is None or captured.shape[1] != key_states.shape[-2] or captured.numel() != key_states.numel():
            self._raw = None
            self._writing.stop("keys were not seen before they were rotated")
        elif self._raw is not None or not first:
            states = as_states(captured, self._layout, self._index)
            if self._raw is None or end > self._raw.shape[-2]:
                self._raw = grown(states[..., :0, :] if self._raw is None else self._raw, first, end)
            self._raw[..., first:end, :].copy_(states)
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self._raw is not None:
            self._raw = self._raw[..., : self.get_seq_length(), :]  # As the rest: it grows into new memory.

    def _arrive(self) -> None:
        if self._is_awaited:
            super()._arrive()
            self._raw = self._history.raw_keys(self._index)

    def _change(self, is_dropped: bool) -> None:
        super()._change(is_dropped)
        self._raw = None

    def _wrote(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._raw is not None:
            super()._wrote(first, self._raw, values)


class UnrotatedCache(StoredCache):
    """A `StoredCache` of such layers."""

    def __init__(self, layout: Layout, *given: Any) -> None:
        """`given` is what a `StoredCache` is made of."""
        super().__init__(*given)
        self.captured: dict[int, torch.Tensor] = {}
        self.layers = [UnrotatedLayer(index, self, layout, each) for index, each in enumerate(self.is_sliding)]

    def begin(self, forward: Any) -> None:
        _CAPTURED.into = self.captured
        super().begin(forward)

    def end(self, *, is_whole: bool) -> None:
        _CAPTURED.into = None  # Whatever was there is of a forward that was broken off: they are not nested.
        self.captured.clear()
        super().end(is_whole=is_whole)


class RotatesOnLoad:
    """Where one row's stored keys go, and rotated ones come from. Layers are loaded one after another."""

    def __init__(self, buffers: Buffers, row: int, column: int, position: int, rope: Rope) -> None:
        """The first token that is loaded has this column and this position."""
        self._buffers = buffers
        self._row = row
        self._column = column
        self._position = position
        self._rope = rope
        self._layer = 0

    def pages(self, layer: int) -> Pages:
        """The target of a layer's bytes: keys as they are stored."""
        self._layer = layer
        return Pages(self._buffers.raw_keys(layer), self._buffers.of(layer)[1], [self._row], self._column)

    def apply(self, keys: torch.Tensor, first: int = 0) -> None:
        """Put tokens from the `first`-th on, ``[head, token, dim]``, rotated where the model reads them."""
        tokens = keys.shape[-2]
        begin = self._column + first
        rotated = self._buffers.of(self._layer)[0][self._row, :, begin : begin + tokens]
        rotated.copy_(keys)
        self._rope.rotate(rotated, np.arange(self._position + first, self._position + first + tokens))
