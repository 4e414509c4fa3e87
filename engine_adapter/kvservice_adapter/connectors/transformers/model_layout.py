"""What a model's KV looks like, and whether blocks of it can be given back exactly."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvservice_api.layout import DTYPE_BYTES, Layout, Rotary
from kvservice_adapter.connectors.transformers.cache import StoredLayer

# With these, where a key is rotated to depends on the length of the whole prompt: no prefix can be reused.
_LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


class UnsupportedModel(ValueError):
    """The model, or its cache, is of a kind whose KV this connector cannot keep and give back exactly."""


def layout_of(model: PreTrainedModel, *, model_id: str, model_revision: str, block_tokens: int) -> Layout:
    """The layout of a model's KV. Raises UnsupportedModel where blocks could not be given back exactly."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UnsupportedModel("the model reads more than tokens: their ids alone do not tell what its KV is")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModel("the model lies on several devices")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"the model computes in {dtype}; KV can be kept in {', '.join(DTYPE_BYTES)}")
    _dynamic_layers(DynamicCache(config=config), config.num_hidden_layers)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Layout(
        model_id=model_id,
        model_revision=model_revision,
        dtype=dtype,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        k_head_dim=head_dim,
        v_head_dim=head_dim,
        block_tokens=block_tokens,
        rotary=_rotary(model, getattr(config, "rope_parameters", None) or {}),
    )


def _rotary(model: PreTrainedModel, parameters: Mapping[str, Any]) -> Rotary:
    """How the model rotates its keys. The dims are counted where the model keeps its frequencies."""
    frequencies = [getattr(module, "inv_freq", None) for module in model.modules()]
    dims = {2 * each.numel() for each in frequencies if isinstance(each, torch.Tensor)}
    if not parameters and not dims:
        return Rotary()
    kind = parameters.get("rope_type")
    if not isinstance(kind, str) or len(dims) != 1 or kind in _LENGTH_DEPENDENT_ROTARY:
        raise UnsupportedModel(f"keys rotated by {dict(parameters)} cannot be reused in another prompt")
    numbers = {name: value for name, value in parameters.items() if name not in ("rope_type", "rope_theta")}
    if not all(value is None or isinstance(value, (int, float)) for value in numbers.values()):
        raise UnsupportedModel(f"the rotary parameters {numbers} are not plain numbers")
    return Rotary(
        kind=kind,
        pairing=_pairing(model),
        dims=dims.pop(),
        base=float(parameters["rope_theta"]),
        parameters=tuple((name, float(value)) for name, value in numbers.items() if value is not None),
    )


def _pairing(model: PreTrainedModel) -> str:
    """Which two dims turn together, asked of the model's own code: no configuration says it."""
    rotate_half = getattr(sys.modules[type(model).__module__], "rotate_half", None)
    if rotate_half is None:
        raise UnsupportedModel(f"how {type(model).__name__} pairs the dims of its rotary encoding is not known")
    rotated = rotate_half(torch.arange(1.0, 5.0)).tolist()
    known = {(-3.0, -4.0, 1.0, 2.0): "half", (-2.0, 1.0, -4.0, 3.0): "interleaved"}
    if tuple(rotated) not in known:
        raise UnsupportedModel(f"{type(model).__name__} pairs the dims of its rotary encoding in an unknown way")
    return known[tuple(rotated)]


def _dynamic_layers(cache: Cache, layer_count: int) -> list[DynamicLayer]:
    """The cache's layers. Raises UnsupportedModel where they are of another kind or number."""
    # Not isinstance: sliding, quantized and indexed layers are subclasses, and keep less, or more.
    layers = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    if len(layers) != len(cache.layers):
        strange = {type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__}
        raise UnsupportedModel(f"cache layers of kind {', '.join(sorted(strange))} cannot be kept, only DynamicLayer")
    if len(layers) != layer_count:
        raise UnsupportedModel(f"the cache has {len(layers)} layers; the model has {layer_count}")
    return layers


