"""The identity and the geometry of a vLLM model's KV.

The same model has the same layout as in the transformers connector, where the given `model_id` and `model_revision` are
the same: then both engines share blocks.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvservice_adapter.connectors.vllm.settings import ConnectorSettings
from kvservice_adapter.device.rotation import UnsupportedRotation
from kvservice_adapter.rope_of_model import rotaries_of_config
from kvservice_api.layout import DTYPE_BYTES, LayerGroup, Layout, Shard

log = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json")
_HASH_PIECE_BYTES = 64 * 2**20


class ModelRefused(ValueError):
    """The model, or the way it is run, is one whose KV this connector cannot store and restore exactly."""


class PageGroup(NamedTuple):
    """One of vLLM's KV cache groups: layers whose pages of the same tokens have the same numbers."""

    page_tokens: int
    window: int  # vLLM frees pages all of whose tokens are before the sliding window of so many tokens; 0: it does not.


class LayerPlace:
    """The layers of a model in vLLM's terms: their names in order, each one's spec, and its group."""

    def __init__(self, kv_cache_config: Any, layer_count: int) -> None:
        """Raises ModelRefused where vLLM caches something else than each token's KV in each layer."""
        found: dict[int, tuple[str, Any, int]] = {}
        self.groups: list[PageGroup] = []
        for number, group in enumerate(kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            specs = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
            for name in group.layer_names:
                index = _layer_index(name)
                if index in found:
                    raise ModelRefused(f"layers {found[index][0]} and {name} have one number: models of several parts")
                found[index] = name, _supported(name, specs[name]), number
            windows = [getattr(each, "sliding_window", 0) for each in specs.values() if _is_freed(each)]
            self.groups.append(PageGroup(spec.block_size, min(windows, default=0)))
        if sorted(found) != list(range(layer_count)):
            raise ModelRefused(f"vLLM caches the layers {sorted(found)}; the model has {layer_count}")
        of_layers = [found[index] for index in range(layer_count)]
        self.names = [name for name, _, _ in of_layers]
        self.specs = [spec for _, spec, _ in of_layers]
        self.group_of_layer = [number for _, _, number in of_layers]

    @property
    def is_plain(self) -> bool:
        """Whether there is one group, whose pages stay until the request's end."""
        return len(self.groups) == 1 and not self.groups[0].window


def _layer_index(name: str) -> int:
    numbers = [part for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise ModelRefused(f"the layer {name} has no number of its own")
    return int(numbers[0])


def _is_freed(spec: Any) -> bool:
    return type(spec).__name__ == "SlidingWindowSpec"


def _supported(name: str, spec: Any) -> Any:
    kind = type(spec).__name__
    if kind not in ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec"):
        what = "keeps a state, not the KV of tokens (Mamba)" if "Mamba" in kind else f"is of kind {kind}"
        raise ModelRefused(f"layer {name} {what}: its cache cannot be stored")
    if getattr(spec, "attention_chunk_size", None):
        raise ModelRefused(f"layer {name} has chunked attention, which is not supported")
    if getattr(spec, "non_causal", False):
        raise ModelRefused(f"layer {name} is not causal: a token's KV depends on later tokens")
    mode = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    if mode != "NONE":
        raise ModelRefused(f"layer {name} has a quantized KV cache ({mode}), which is not supported yet")
    if spec.num_head_slots is not None or spec.state_content_bytes is not None or spec.tokens_per_state != 1:
        raise ModelRefused(f"layer {name} has packed pages")
    return spec


def layout_of(vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> tuple[Layout, LayerPlace]:
    """The layout of the whole model, of which a worker may have a part. Raises ModelRefused, InvalidLayout."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    _check_configuration(vllm_config)
    config = _published(model.hf_text_config)
    place = LayerPlace(kv_cache_config, model.get_total_num_hidden_layers())
    try:
        # A latent vector is rotated in a part of it.
        rotated = [config.qk_rope_head_dim if _is_latent(spec) else spec.head_size for spec in place.specs]
        rotaries = rotaries_of_config(config, _model_class(config), rotated)
    except UnsupportedRotation as error:
        raise ModelRefused(str(error)) from error
    groups = []
    for spec, window, rotary in zip(place.specs, _windows(config, len(place.specs)), rotaries, strict=True):
        dtype = str(spec.dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise ModelRefused(f"the KV cache is of {dtype}; KV can be kept in {', '.join(DTYPE_BYTES)}")
        heads = 1 if _is_latent(spec) else _total_heads(spec.num_kv_heads, model, parallel)
        groups.append(LayerGroup(1, heads, spec.head_size, spec.head_size_v, dtype, window, rotary))
    model_id, revision = _identity(vllm_config, settings)
    return Layout(model_id, groups=groups, model_revision=revision, block_tokens=settings.block_tokens), place


def _published(config: Any) -> Any:
    """The configuration before vLLM's DeepSeek models have renamed their rotary encoding, which only the workers do."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "deepseek_yarn":
        return config
    config = copy.copy(config)
    config.rope_parameters = {**parameters, "rope_type": "yarn"}
    return config


def _model_class(config: Any) -> type | None:
    """The class of transformers' own model of this configuration, if it has one."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def _is_latent(spec: Any) -> bool:
    return type(spec).__name__ == "MLAAttentionSpec"


def _windows(config: Any, layer_count: int) -> list[int]:
    """The sliding window of each layer, 0 for none: as transformers makes it of the same configuration.

    vLLM's specs lack it where layers with a window and without one are one group.
    """
    try:
        layers: list[Any] = DynamicCache(config=config).layers
    except Exception as error:  # The library's code may raise any exception for a configuration it does not know.
        raise ModelRefused(
            f"which layers have a sliding window is not known: {type(error).__name__}: {error}"
        ) from error
    if len(layers) not in (0, layer_count):
        raise ModelRefused(f"the configuration describes {len(layers)} layers; vLLM caches {layer_count}")
    return [int(layer.sliding_window) if getattr(layer, "is_sliding", False) else 0 for layer in layers] or [
        0
    ] * layer_count


def check_window(name: str, used: int | None, window: int, model_tokens: int) -> None:
    """Raises ModelRefused if vLLM computes a layer with another window than its layout has. `used` is vLLM's."""
    # A window that no prompt fills has no effect.
    attended, described = (min(each or model_tokens, model_tokens) for each in (used, window))
    if attended != described:
        raise ModelRefused(f"{name} attends to {attended} tokens in vLLM, and to {described} by the configuration")


def shard_of(layout: Layout, parallel_config: Any) -> tuple[Shard, bool]:
    """The part of a block that this worker's pages have, and whether it is this worker that stores it.

    Of ranks that have the same heads, the first stores them.
    """
    rank, size = parallel_config.rank % parallel_config.tensor_parallel_size, parallel_config.tensor_parallel_size
    heads = layout.kv_heads
    if heads % size == 0:
        each = heads // size
        return Shard(0, layout.layers, rank * each, (rank + 1) * each), True
    if size % heads:
        raise ModelRefused(f"{heads} KV heads cannot be divided among {size} tensor-parallel ranks")
    replicas = size // heads
    head = rank // replicas
    return Shard(0, layout.layers, head, head + 1), rank % replicas == 0


def _total_heads(rank_heads: int, model: Any, parallel: Any) -> int:
    total = int(model.get_total_num_kv_heads())
    size = parallel.tensor_parallel_size
    if rank_heads != max(1, total // size):
        raise ModelRefused(f"a rank has {rank_heads} KV heads of {total}, which {size} ranks do not explain")
    return total


def _check_configuration(vllm_config: Any) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ModelRefused("pipeline parallelism is not supported yet")
    if max(parallel.decode_context_parallel_size, getattr(parallel, "prefill_context_parallel_size", 1)) > 1:
        raise ModelRefused("context parallelism is not supported yet")
    if model.is_encoder_decoder:
        raise ModelRefused("encoder-decoder models are not supported: a decoder's KV depends on the encoder's input")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise ModelRefused("with calculate_kv_scales the same tokens have another KV in each run")


def _identity(vllm_config: Any, settings: ConnectorSettings) -> tuple[str, str]:
    """The layout's `model_id` and `model_revision`. Raises ModelRefused if it is not known which weights these are."""
    model = vllm_config.model_config
    folder = Path(model.model)
    model_id = settings.model_id or (folder.resolve().name if folder.exists() else model.model)
    revision = settings.model_revision
    if not revision:
        if model.hf_overrides:
            raise ModelRefused("hf_overrides may change the model's KV: set model_revision to a name of their own")
        if vllm_config.load_config.load_format == "dummy":
            raise ModelRefused("with load_format dummy the weights are not the folder's: set model_revision")
        commit = getattr(model.hf_config, "_commit_hash", None)
        if commit:
            revision = str(commit)
        elif folder.is_dir():
            revision = _content_hash(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
        elif folder.is_file():
            revision = _content_hash([folder])
        else:
            raise ModelRefused(f"which weights {model.model} has is not known: set model_revision")
    if model.quantization:
        described = str(getattr(model.hf_config, "quantization_config", None))
        revision += f" {model.quantization}:{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    return model_id, revision


def _content_hash(files: Iterable[Path]) -> str:
    """A hash of the files' contents, at the speed of reading them. It is not of use against an attacker."""
    digest = xxhash.xxh3_128()
    log.info("reading all of the model's files to name its weights; model_revision in the configuration saves it")
    for path in sorted(files):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb", buffering=0) as opened:
            while piece := opened.read(_HASH_PIECE_BYTES):
                digest.update(piece)
    return f"xxh3:{digest.hexdigest()}"
