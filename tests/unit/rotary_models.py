"""Tiny models with random weights, one per kind of rotary encoding, and the keys that their own code computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    GlmConfig,
    GlmForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CONTEXT_TOKENS = 512
OPTIONS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,  # So that scores differ enough to show a key at a wrong place.
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def scaled_llama(kind: str) -> Any:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS.get(kind, {})}
    return LlamaForCausalLM(LlamaConfig(**OPTIONS, rope_parameters=parameters))


# fmt: off
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: scaled_llama("default"),
    **{f"llama, {kind}": lambda kind=kind: scaled_llama(kind) for kind in SCALINGS},  # type: ignore[misc]
    "gpt-neox, a quarter of the dims": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**OPTIONS)),
    "phi, half of the dims": lambda: PhiForCausalLM(PhiConfig(**OPTIONS)),
    "cohere, interleaved": lambda: CohereForCausalLM(CohereConfig(**OPTIONS, logit_scale=1.0)),
    "glm, interleaved, half of the dims": lambda: GlmForCausalLM(GlmConfig(**OPTIONS, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**OPTIONS)),
    "qwen3, keys normed before": lambda: Qwen3ForCausalLM(Qwen3Config(**OPTIONS, head_dim=16)),
}
# fmt: on


def rotary_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def computed(model: Any, token_ids: torch.Tensor, first_position: int = 0) -> DynamicCache:
    """The cache of some tokens at consecutive positions."""
    cache = DynamicCache(config=model.config)
    positions = torch.arange(first_position, first_position + token_ids.shape[1])[None]
    model(token_ids, past_key_values=cache, position_ids=positions)
    return cache


@torch.inference_mode()
def logits_after(
    model: Any, cache: DynamicCache, token_ids: torch.Tensor, first_position: int | None = None
) -> torch.Tensor:
    """Logits of further tokens, ``[token, vocabulary]``; by default at the positions after the cache's length."""
    first = cache.get_seq_length() if first_position is None else first_position
    positions = torch.arange(first, first + token_ids.shape[1])[None]
    logits: torch.Tensor = model(token_ids, past_key_values=cache, position_ids=positions).logits
    return logits[0].float()


def picked(cache: DynamicCache, kept: NDArray[np.int64]) -> DynamicCache:
    """A cache with some of another cache's tokens, unchanged, in memory of its own."""
    index = torch.from_numpy(kept)
    chosen = DynamicCache()
    for layer, (keys, values) in enumerate(states(cache)):
        chosen.update(keys[:, :, index], values[:, :, index], layer)
    return chosen


def states(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    each: Any = cache
    return [(keys, values) for keys, values, _ in each]


class RecordedKeys:
    """The input and output of the model's own rotation of each layer's keys."""

    def __init__(self, model: Any, patch: pytest.MonkeyPatch) -> None:
        self.unrotated: list[torch.Tensor] = []
        self._model = model
        module = sys.modules[type(model).__module__]
        self._rotate = module.apply_rotary_pos_emb

        def recording(queries: torch.Tensor, keys: torch.Tensor, *rest: Any, **options: Any) -> Any:
            self.unrotated.append(keys.clone())
            return self._rotate(queries, keys, *rest, **options)

        patch.setattr(module, "apply_rotary_pos_emb", recording)

    @torch.inference_mode()
    def rotated_at(self, layer: int, kept: NDArray[np.int64], positions: Sequence[int]) -> torch.Tensor:
        """The keys of some tokens, rotated by the model's own code: ``[1, head, token, dim or rotary dim]``."""
        keys = self.unrotated[layer][:, :, torch.from_numpy(kept)]
        [rotary] = [each for each in self._model.modules() if hasattr(each, "inv_freq")]
        cos, sin = rotary(keys, torch.tensor(positions)[None])
        _, rotated = self._rotate(keys, keys, cos, sin)
        return torch.as_tensor(rotated)
