"""Computes the KV of a history in place of loading it, in the middle of a forward if need be.

The model's body is called once more, with a cache of its own, while the outer forward waits. Its modules keep no state
between layers, so the outer forward is not changed by it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from kvservice_adapter.connectors.transformers.cache import whole_cache
from kvservice_adapter.connectors.transformers.history import Tensors
from kvservice_adapter.device.base import Device
from kvservice_adapter.rope import ModelRopes
from kvservice_adapter.session import Conversation
from kvservice_adapter.torch_device import turn
from kvservice_adapter.truncation import kept_tokens


@torch.no_grad()
def computed(model: PreTrainedModel, token_ids: NDArray[Any], visible: NDArray[np.bool_]) -> list[Tensors]:
    """Each layer's keys and values of tokens ``[row, column]``, under the attention mask `visible` of that shape."""
    cache = whole_cache(model.config)
    _forward(model, token_ids, cache, visible)
    return _layers(cache)


@torch.no_grad()
def replayed(
    model: PreTrainedModel,
    device: Device,
    conversation: Conversation,
    ropes: Callable[[], ModelRopes],
    token_count: int,
) -> list[Tensors]:
    """As `computed`, of the first `token_count` tokens of a conversation, cut where it was cut.

    What a cut has dropped is computed too: the rest was computed with it in sight. `ropes` is called where
    keys are to be rotated.
    """
    cache = whole_cache(model.config)
    for cut in conversation.cuts:
        _forward(model, cut.tokens[None], cache)
        _cut(cache, device, cut.kept_ranges, ropes)
    _forward(model, conversation.tokens_since_cut[None, : token_count - conversation.kept_tokens], cache)
    return _layers(cache)


def _cut(cache: DynamicCache, device: Device, kept: Sequence[tuple[int, int]], ropes: Callable[[], ModelRopes]) -> None:
    at = kept_tokens(kept)
    places = np.arange(len(at))
    rotations = ropes().rotations(at, places) if (at != places).any() else None
    layers: list[Any] = cache.layers
    index = torch.from_numpy(at).to(layers[0].keys.device)
    for number, layer in enumerate(layers):
        layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)
        if rotations is not None:
            turn(device, layer.keys, rotations[number])


def _forward(
    model: PreTrainedModel, token_ids: NDArray[Any], cache: DynamicCache, visible: NDArray[np.bool_] | None = None
) -> None:
    if not token_ids.shape[1]:
        return
    body: Any = model.base_model
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(model.device)
    # `generate` always gives positions, and some models count in another way where they are given none.
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1) + cache.get_seq_length()
    given: dict[str, Any] = {"position_ids": positions}
    if visible is not None and not visible.all():
        mask = torch.from_numpy(visible).to(ids.device)
        positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)  # As `generate` places them.
        given = {"attention_mask": mask.long(), "position_ids": positions}
    given = {name: value for name, value in given.items() if name in inspect.signature(body.forward).parameters}
    body(input_ids=ids, past_key_values=cache, use_cache=True, **given)


def _layers(cache: DynamicCache) -> list[Tensors]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
