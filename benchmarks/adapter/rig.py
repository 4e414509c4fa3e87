"""Shared parts of the measurements: a daemon, a model, and a cache whose layers wait for loads and queue saves."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from benchmarks.client import parts
from kvservice_adapter.device.base import Pages
from kvservice_client import Layout

BLOCK_TOKENS = 256
# SmolLM2-135M's shape; quick runs take a part of it. The weights are random: how long it takes is the same.
SHAPE = {"layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152}
QUICK_SHAPE = {**SHAPE, "layers": 12, "vocabulary": 1024}


def random_model(shape: dict[str, int]) -> Any:
    """A Llama with random weights, computing in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def layout_of(model: Any, name: str) -> Layout:
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    return Layout(
        f"bench/{name}", "float32", config.num_hidden_layers, heads, k_head_dim=dim, v_head_dim=dim,
        block_tokens=BLOCK_TOKENS,
    )  # fmt: skip


def some_tokens(model: Any, count: int, seed: int) -> torch.Tensor:
    """A prompt, ``[1, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (1, count), generator=generator)


class WatchedLayer(DynamicLayer):
    """Waits for its history at its first use, and queues the KV that the model computed."""

    def __init__(self, index: int, history_tokens: int, wait: Wait | None, hand_over: HandOver | None) -> None:
        super().__init__()
        self._index = index
        self._history_tokens = history_tokens
        self._wait = wait
        self._hand_over = hand_over

    def get_seq_length(self) -> int:
        if self._wait is not None:
            return self._history_tokens
        length: int = super().get_seq_length()
        return length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._wait is not None:
            pages = self._wait(self._index)
            self.lazy_initialization(pages.keys, pages.values)
            self.keys, self.values = pages.keys, pages.values
            self._wait = None
        states = super().update(key_states, value_states, *args, **kwargs)
        if self._hand_over is not None:
            self._hand_over(self._index, *states)
        return states


Wait = Callable[[int], Pages]
HandOver = Callable[[int, torch.Tensor, torch.Tensor], None]


def watched_cache(
    model: Any, history_tokens: int = 0, wait: Wait | None = None, hand_over: HandOver | None = None
) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [
        WatchedLayer(index, history_tokens, wait, hand_over) for index in range(model.config.num_hidden_layers)
    ]
    return cache


@torch.inference_mode()
def forward(model: Any, tokens: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
    """The logits of the last token."""
    logits: torch.Tensor = model(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits
    return logits


def seconds(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def median(values: list[float]) -> float:
    return float(np.median(values))


@contextmanager
def a_core_for_loading() -> Iterator[None]:
    """The model computes on one core less, where it has two or more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def daemon(dram_bytes: int) -> Iterator[str]:
    """A new daemon with almost no SSD traffic. Yields its address."""
    with (
        tempfile.TemporaryDirectory(prefix="kvservice-bench-") as folder,
        parts.daemon(Path(folder), Path("/dev/shm"), dram_bytes) as running,
    ):
        yield running.address
