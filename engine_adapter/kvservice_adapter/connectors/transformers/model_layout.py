"""The layout of a model's KV, and whether its blocks can be restored exactly."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvservice_adapter.connectors.transformers.cache import StoredLayer
from kvservice_adapter.connectors.transformers.model_probe import NotProbed, probe, window_of
from kvservice_adapter.device.rotation import UnsupportedRotation
from kvservice_adapter.rope_of_model import rotaries_of
from kvservice_api.layout import DTYPE_BYTES, LayerGroup, Layout


class UnsupportedModel(ValueError):
    """The model, or its cache, is of a kind whose KV this connector cannot store and restore exactly."""


def layout_of(model: Any, *, model_id: str, model_revision: str, block_tokens: int, rotated: bool = True) -> Layout:
    """The layout of a model's KV.

    Decided by the configuration first, then by a probe (`model_probe`): the model computes a few tokens in its
    first layers. Raises UnsupportedModel, with the reason, for any object whose KV could not be restored exactly,
    and InvalidLayout for a `model_id`, a `model_revision` or a `block_tokens` that no layout can have.
    """
    try:
        geometry = _geometry(model)
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except (NotProbed, UnsupportedRotation) as error:
        raise UnsupportedModel(str(error)) from error
    except Exception as error:  # The model's code may raise any exception, and none may end the engine's start.
        why = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"{type(model).__name__} could not be examined: {why}") from error
    return Layout(
        model_id=model_id, model_revision=model_revision, block_tokens=block_tokens, rotated=rotated, groups=geometry
    )


def _geometry(model: Any) -> list[LayerGroup]:
    """What of a layout the model decides: each layer as a group of its own."""
    if not isinstance(model, PreTrainedModel):
        hint = "; give its base model (`get_base_model()`) and the adapter's `lora_id`"
        is_wrapped = hasattr(model, "peft_config") or hasattr(model, "get_base_model")
        raise UnsupportedModel(f"{type(model).__name__} is no transformers model{hint if is_wrapped else ''}")
    config = model.config
    _check_configuration(config)
    if getattr(getattr(model, "generation_config", None), "use_cache", None) is False:
        # `generate` would pass all tokens to the model at each step, although the cache has their KV already.
        raise UnsupportedModel("`generate` would use no cache: set `model.generation_config.use_cache = True`")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModel("the model is on several devices")
    if any(device.type == "meta" for device in devices):
        raise UnsupportedModel("the model has no weights: it is on the meta device")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"the model computes in {dtype}; KV can be kept in {', '.join(DTYPE_BYTES)}")
    cache = DynamicCache(config=config)
    windows = [window_of(layer) for layer in _kept_layers(cache, config)]
    rotaries = rotaries_of(model, len(windows))
    return [
        LayerGroup(1, shape.kv_heads, shape.k_head_dim, shape.v_head_dim, dtype, window, rotary)
        for shape, window, rotary in zip(probe(model, cache), windows, rotaries, strict=True)
    ]


def _kept_layers(cache: DynamicCache, config: Any) -> list[Any]:
    """The layers of a model's own cache. Raises UnsupportedModel if they keep anything but each token's KV."""
    layers: list[Any] = cache.layers
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)  # Not isinstance: subclasses keep other states beside, or less.
    strange = sorted({type(layer).__name__ for layer in layers if type(layer) not in kinds})
    if strange:
        raise UnsupportedModel(f"cache layers of kind {', '.join(strange)} cannot be kept, only the KV of tokens")
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModel(f"the cache has {len(layers)} layers; the model has {config.num_hidden_layers}")
    return layers


def _check_configuration(config: Any) -> None:
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UnsupportedModel("the model reads more than tokens: its KV does not follow from token ids alone")
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModel("the model attends to an encoder's states: its KV does not follow from token ids alone")
    decoder_layers = getattr(config, "decoder_layers", None)
    if decoder_layers not in (None, config.num_hidden_layers):
        raise UnsupportedModel(
            f"its decoder has {decoder_layers} layers; the library makes a cache of {config.num_hidden_layers}, as "
            f"many as an encoder would have: set encoder_layers to {decoder_layers}"
        )
    types = getattr(config, "layer_types", None) or ()
    if "chunked_attention" in types or (not types and getattr(config, "attention_chunk_size", None)):
        raise UnsupportedModel("chunked attention is not supported: a layer's mask begins again with every chunk")
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if bidirectional in (True, "all") or getattr(config, "is_causal", True) is False:
        raise UnsupportedModel("its configuration says that attention is not causal")


def torch_dtype(layout: Layout) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return dtype


def dynamic_layers(cache: Cache, layer_count: int) -> list[DynamicLayer]:
    """The cache's layers. Raises UnsupportedModel if they are of another kind or number."""
    # Not isinstance: sliding, quantized and indexed layers are subclasses, and keep less, or more. A sliding-window
    # layer of ours keeps all tokens.
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and _is_kept(layer)]
    if len(layers) != len(cache.layers):
        strange = {type(layer).__name__ for layer in cache.layers if layer not in layers}
        raise UnsupportedModel(f"cache layers of kind {', '.join(sorted(strange))} cannot be kept, only DynamicLayer")
    if len(layers) != layer_count:
        raise UnsupportedModel(f"the cache has {len(layers)} layers; the model has {layer_count}")
    return layers


def _is_kept(layer: DynamicLayer) -> bool:
    return type(layer) is DynamicLayer or isinstance(layer, StoredLayer)


def has_adapters(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False)) or hasattr(model, "peft_config")
