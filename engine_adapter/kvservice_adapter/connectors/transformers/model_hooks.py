"""Reports each forward of a model to the cache it is given: which tokens it adds, when it begins, and when it has
ended.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvservice_adapter.connectors.transformers.cache import StoredCache
from kvservice_adapter.connectors.transformers.forward_saver import Forward


class ModelHooks:
    """Hooks on one model, for the caches that hold this object. Without references to it they are removed.

    A connector and its caches hold it, so a cache still works after its connector. Forwards with other caches
    are ignored. For the engine's thread.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        names = list(inspect.signature(model.forward).parameters)
        owner = weakref.ref(self)  # The model keeps the hooks; they must not keep this object.

        def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            return {**dict(zip(names, args, strict=False)), **kwargs}

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward = given(args, kwargs)
            cache = _cache_of(owner(), forward)
            if cache is not None:
                embeds = forward.get("inputs_embeds")
                input_ids = forward.get("input_ids") if embeds is None else None
                placed = forward.get("attention_mask"), forward.get("position_ids")
                cache.begin(Forward(input_ids, embeds, *placed, module.training))

        def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cache = _cache_of(owner(), given(args, kwargs))
            if cache is not None:
                cache.end(is_whole=output is not None)

        handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True, always_call=True),  # Of one that raised too.
        ]
        weakref.finalize(self, _remove, handles).atexit = False


def _cache_of(hooks: ModelHooks | None, forward: dict[str, Any]) -> StoredCache | None:
    cache: Cache | None = forward.get("past_key_values")
    return cache if isinstance(cache, StoredCache) and cache.hooks is hooks is not None else None


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
