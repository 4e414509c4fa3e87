"""Layouts with `rotated=False`: keys are stored as they are before rotation, and rotated where they are read.

A cache receives keys that are rotated already. So hooks on the modules that compute the keys capture them before, and
each layer keeps both: rotated keys for the model, unrotated keys for the store. The stream that loads a history
rotates its keys.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvservice_adapter.connectors.transformers.cache import StoredCache, StoredLayer, whole_cache
from kvservice_adapter.connectors.transformers.history import grown
from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel
from kvservice_adapter.device.base import Device
from kvservice_adapter.device.rotation import Rotation
from kvservice_adapter.rope import ModelRopes, Rope
from kvservice_adapter.torch_device import turn
from kvservice_api.layout import Layout

_PROBE_TOKENS = 8
_DIFFERENCE_MAX = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # Share of the keys' norm.


class KeyHooks:
    """Hooks on one model that capture the keys of each layer before rotation. Without references they are removed.

    Each thread captures its own forward.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, ropes: ModelRopes) -> None:
        """Raises UnsupportedModel if the model computes its keys otherwise than in modules of their own, or where
        these keys, once rotated, are not those of its cache.
        """
        self._layout = layout
        self._ropes = ropes
        self._thread = threading.local()
        owner = weakref.ref(self)  # The model keeps the hooks; they must not keep this object.
        handles = [
            module.register_forward_hook(_capture(owner, index))
            for index, module in _key_modules(model, layout.layers).items()
        ]
        weakref.finalize(self, _remove, handles).atexit = False
        self._try_on(model)

    @property
    def into(self) -> dict[int, torch.Tensor] | None:
        """Where forwards of this thread leave their keys, ``[row, token, ...]`` of each layer; None: nowhere."""
        return getattr(self._thread, "into", None)

    @into.setter
    def into(self, captured: dict[int, torch.Tensor] | None) -> None:
        self._thread.into = captured

    @contextmanager
    def capturing(self, into: dict[int, torch.Tensor] | None) -> Iterator[None]:
        """Captures the forwards of this thread for as long, or does not."""
        before, self.into = self.into, into
        try:
            yield
        finally:
            self.into = before

    def placing(self, first_position: int, tokens: int) -> list[Rotation]:
        """What rotates captured keys of consecutive tokens, layer by layer."""
        positions = np.arange(first_position, first_position + tokens)
        made = {rope: rope.placing(positions, self._layout.dtype) for rope in dict.fromkeys(self._ropes.layers)}
        return [made[rope] for rope in self._ropes.layers]

    def captured_of(
        self,
        device: Device,
        pads: tuple[int, ...],
        made: dict[tuple[Rope, int], Rotation],
        index: int,
        keys: torch.Tensor,
    ) -> torch.Tensor:
        """Keys ``[row, head, column, dim]`` of a layer as they were before rotation, up to rounding.

        `made` keeps rotations for the layers after it: a device has their tables then.
        """
        raw, rope = keys.clone(), self._ropes.layers[index]
        for row, pad in enumerate(pads):
            tokens = raw.shape[2] - pad
            if (rope, tokens) not in made:
                made[rope, tokens] = rope.unplacing(np.arange(tokens))
            turn(device, raw[row, :, pad:], made[rope, tokens])
        return raw

    @torch.no_grad()
    def _try_on(self, model: PreTrainedModel) -> None:
        tokens = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] % model.config.vocab_size
        cache, captured = whole_cache(model.config), dict[int, torch.Tensor]()
        with self.capturing(captured):
            model(tokens, past_key_values=cache)
        layers: list[Any] = cache.layers
        for index, (layer, rotation) in enumerate(zip(layers, self.placing(0, _PROBE_TOKENS), strict=True)):
            given, cached = captured.get(index), layer.keys.cpu()
            if given is None or given.numel() != cached.numel():
                raise UnsupportedModel(f"layer {index} shows no keys before rotation; keep them rotated")
            keys = as_states(given.cpu(), self._layout, index).clone()
            rotation.apply(keys)
            difference = float((keys.float() - cached.float()).norm() / cached.float().norm())
            if not difference <= _DIFFERENCE_MAX[keys.dtype]:
                raise UnsupportedModel(
                    f"layer {index} does more to its keys than to rotate them: they differ by {difference:.2g}; "
                    "keep them rotated"
                )


def _capture(owner: weakref.ref[KeyHooks], index: int) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        hooks = owner()
        into = hooks.into if hooks is not None else None
        if into is not None:
            into[index] = output

    return hook


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


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


def as_states(captured: torch.Tensor, layout: Layout, index: int) -> torch.Tensor:
    """What a module gave, ``[row, token, head * dim]`` or ``[row, token, head, dim]``, as a cache has it."""
    rows, tokens = captured.shape[:2]
    group = layout.group_of(index)
    return captured.view(rows, tokens, group.kv_heads, group.k_head_dim).transpose(1, 2)


class UnrotatedLayer(StoredLayer):
    """Keeps its keys as they were before rotation too."""

    def __init__(self, index: int, cache: UnrotatedCache, layout: Layout, is_sliding: bool) -> None:
        self._layout = layout
        self._captured = cache.captured
        self._raw: torch.Tensor | None = None  # A buffer with room, as long as nothing was changed.
        super().__init__(index, cache.history, cache.saver, is_sliding)

    @property
    def raw_keys(self) -> torch.Tensor | None:
        """``[row, head, column, dim]``. None if they are not known."""
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
            self._saver.stop("keys were not seen before they were rotated")
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

    def __init__(self, layout: Layout, key_hooks: KeyHooks, *given: Any, **options: Any) -> None:
        """`given` and `options` are what a `StoredCache` is made of."""
        super().__init__(*given, **options)
        self._key_hooks = key_hooks
        self.captured: dict[int, torch.Tensor] = {}
        self.layers = [UnrotatedLayer(index, self, layout, each) for index, each in enumerate(self.is_sliding)]

    def begin(self, forward: Any) -> None:
        self._key_hooks.into = self.captured
        super().begin(forward)

    def end(self, *, is_whole: bool) -> None:
        self._key_hooks.into = None
        self.captured.clear()  # Forwards are not nested, so any keys left are of an interrupted forward.
        super().end(is_whole=is_whole)
