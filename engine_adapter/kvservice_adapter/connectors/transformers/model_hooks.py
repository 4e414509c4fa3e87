"""Tells a cache of ours about each forward of its model: which tokens come, when it begins, when it has ended."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from kvservice_adapter.connectors.transformers.cache import Forward, StoredCache

_WATCHED: WeakSet[torch.nn.Module] = WeakSet()


def watch(model: PreTrainedModel) -> None:
    """Have the model's forwards tell the caches that they are given. Of use once a model; caches of others pass by."""
    if model in _WATCHED:
        return
    names = list(inspect.signature(model.forward).parameters)

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        if isinstance(cache, StoredCache):
            embeds = given.get("inputs_embeds")
            input_ids = given.get("input_ids") if embeds is None else None
            placed = given.get("attention_mask"), given.get("position_ids")
            cache.begin(Forward(input_ids, embeds, *placed, module.training))

    def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = {**dict(zip(names, args, strict=False)), **kwargs}.get("past_key_values")
        if isinstance(cache, StoredCache):
            cache.end(is_whole=output is not None)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True, always_call=True)  # Of one that raised too.
    _WATCHED.add(model)
