"""vLLM's configuration, attention layers and pages for a model of numbers, on the CPU platform, without weights."""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from packaging.version import Version
from vllm import __version__
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import KVCacheConfig

from tests.vllm.contract.numbers import VOCABULARY, NumberedModel

_PLANNING = import_module(f"vllm.v1.core.kv_cache_{'planning' if Version(__version__) >= Version('0.33') else 'utils'}")

MAX_TOKENS = 4096

_MODEL = NumberedModel()


@dataclass(frozen=True)
class Setup:
    """What an engine is started with."""

    connector: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)  # kv_connector_extra_config.
    model: NumberedModel = _MODEL
    pages: int = 200
    page_tokens: int = 32
    step_tokens: int = 512  # At most so many in one step: a longer prompt is computed in chunks.
    failure_policy: str = "recompute"
    is_asynchronous: bool = False  # A step is scheduled before the tokens of the last one are known, as on a GPU.
    drafted: int = 0  # Speculative decoding: so many tokens are drafted after each one, and verified in the next step.

    def vllm_config(self) -> VllmConfig:
        model_config = _model_config(self.model)
        config = VllmConfig(
            model_config=model_config,
            speculative_config=SpeculativeConfig(
                method="ngram",
                num_speculative_tokens=self.drafted,
                prompt_lookup_max=2,
                prompt_lookup_min=1,
                target_model_config=model_config,
                target_parallel_config=ParallelConfig(),
            )
            if self.drafted
            else None,
            scheduler_config=SchedulerConfig(
                max_num_seqs=16,
                max_num_batched_tokens=self.step_tokens,
                max_model_len=MAX_TOKENS,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
            cache_config=CacheConfig(block_size=self.page_tokens, enable_prefix_caching=True),
            kv_transfer_config=KVTransferConfig(
                kv_connector=self.connector,
                kv_connector_module_path=self.module,
                kv_role="kv_both",
                kv_load_failure_policy=self.failure_policy,
                kv_connector_extra_config=dict(self.options),
            ),
            device_config=DeviceConfig("cpu"),
        )
        config.cache_config.kv_cache_layout = (
            "LBHNC"  # An engine asks its attention backend: CPU_ATTN has this one only.
        )
        config.cache_config.num_gpu_blocks = self.pages
        config.cache_config.num_gpu_blocks_override = self.pages
        config.scheduler_config.async_scheduling = self.is_asynchronous  # The CPU platform would have turned it off.
        return config


def attention_layers(config: VllmConfig, model: NumberedModel) -> dict[str, Any]:
    """vLLM's own attention layers, as loading a model makes them, by their names."""
    with set_current_vllm_config(config):
        layers = [
            Attention(
                model.kv_heads,
                model.dim(index),
                model.dim(index) ** -0.5,
                num_kv_heads=model.kv_heads,
                cache_config=config.cache_config,
                per_layer_sliding_window=model.window(index) or None,
                prefix=f"model.layers.{index}.self_attn.attn",
            )
            for index in range(model.layers)
        ]
    for index, layer in enumerate(layers):
        layer.isa = _get_attn_isa(torch.float32, config.cache_config.block_size, model.dim(index))
    return {layer.layer_name: layer for layer in layers}


def kv_cache_config(config: VllmConfig, layers: Mapping[str, Any]) -> KVCacheConfig:
    """The groups of pages that vLLM makes."""
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    groups = _PLANNING.get_kv_cache_groups(config, specs)
    made: KVCacheConfig = _PLANNING.get_kv_cache_config_from_groups(config, groups, 2**30)
    return made


def pages_of(config: KVCacheConfig) -> dict[str, torch.Tensor]:
    """A tensor of pages per layer, as the CPU worker registers them: layers of several groups share their memory. No
    number has the value that they begin with.
    """
    memory = torch.full((max(each.size for each in config.kv_cache_tensors) // 4,), -1.0)
    groups = {name: group.kv_cache_spec for group in config.kv_cache_groups for name in group.layer_names}
    pages = {}
    for placed in config.kv_cache_tensors:
        for index, name in enumerate(placed.layers):
            group = groups[name]
            spec = getattr(group, "kv_cache_specs", {}).get(name, group)
            shape = (config.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
            strides = (placed.block_stride // 4, *torch.empty(shape[1:], device="meta").stride())
            pages[name] = memory.as_strided(shape, strides, (placed.offset + index * placed.layer_stride) // 4)
    return dict(sorted(pages.items()))


@lru_cache  # vLLM looks at the model's class in a process of its own, for some seconds.
def _model_config(model: NumberedModel) -> ModelConfig:
    folder = Path(mkdtemp(prefix="kvservice-numbers-"))
    atexit.register(rmtree, folder)
    settings = {
        **({"architectures": ["LlamaForCausalLM"], "model_type": "llama"} if not model.windows else _windows(model)),
        "hidden_size": model.kv_heads * model.head_dim,
        "num_attention_heads": model.kv_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "num_hidden_layers": model.layers,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return ModelConfig(model=str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=MAX_TOKENS)


def _windows(model: NumberedModel) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": max(model.windows),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in model.windows],
    }
