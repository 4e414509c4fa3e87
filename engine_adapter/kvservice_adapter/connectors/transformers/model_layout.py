"""What a model's KV looks like, and whether blocks of it can be given back exactly."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvservice_adapter.connectors.transformers.cache import StoredLayer
from kvservice_adapter.rope_frequencies import UnsupportedRotation
from kvservice_adapter.rope_of_model import rotary_of
from kvservice_api.layout import DTYPE_BYTES, Layout, Rotary


class UnsupportedModel(ValueError):
    """The model, or its cache, is of a kind whose KV this connector cannot keep and give back exactly."""


def layout_of(
    model: PreTrainedModel, *, model_id: str, model_revision: str, block_tokens: int, rotated: bool = True
) -> Layout:
    """The layout of a model's KV. Raises UnsupportedModel where blocks could not be given back exactly."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UnsupportedModel("the model reads more than tokens: their ids alone do not tell what its KV is")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModel("the model lies on several devices")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"the model computes in {dtype}; KV can be kept in {', '.join(DTYPE_BYTES)}")
    dynamic_layers(DynamicCache(config=config), config.num_hidden_layers)
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
        rotary=_rotary(model),
        rotated=rotated,
    )


def torch_dtype(layout: Layout) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return dtype


def dynamic_layers(cache: Cache, layer_count: int) -> list[DynamicLayer]:
    """The cache's layers. Raises UnsupportedModel where they are of another kind or number."""
    # Not isinstance: sliding, quantized and indexed layers are subclasses, and keep less, or more.
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and _is_kept(layer)]
    if len(layers) != len(cache.layers):
        strange = {type(layer).__name__ for layer in cache.layers if layer not in layers}
        raise UnsupportedModel(f"cache layers of kind {', '.join(sorted(strange))} cannot be kept, only DynamicLayer")
    if len(layers) != layer_count:
        raise UnsupportedModel(f"the cache has {len(layers)} layers; the model has {layer_count}")
    return layers


def _is_kept(layer: DynamicLayer) -> bool:
    return type(layer) is DynamicLayer or isinstance(layer, StoredLayer)


def _rotary(model: PreTrainedModel) -> Rotary:
    try:
        return rotary_of(model)
    except UnsupportedRotation as error:
        raise UnsupportedModel(str(error)) from error


def has_adapters(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False)) or hasattr(model, "peft_config")
