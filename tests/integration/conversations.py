"""KV of invented conversations: layouts, chains, and bytes that identify their place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvservice_client import BlockCache, BlockChain, Layout, block_chain

_first_tokens = itertools.count(1000)


def small_layout(model_id: str = "small", layers: int = 4) -> Layout:
    """Slices of 1 KiB per full block: many fit into a frame."""
    return Layout(model_id, "bfloat16", layers, kv_heads=2, k_head_dim=16, v_head_dim=16, block_tokens=8)


def large_layout(model_id: str = "large") -> Layout:
    """Slices of 1.5 MiB per full block: each needs several frames."""
    return Layout(model_id, "float16", layers=8, kv_heads=6, k_head_dim=128, v_head_dim=128, block_tokens=512)


def new_chain(layout: Layout, token_count: int) -> BlockChain:
    """A chain that no other test has."""
    tokens = np.arange(token_count)
    tokens[0] = next(_first_tokens)
    return block_chain(layout, tokens, with_partial=True)


def layers_of(blocks: BlockCache, chain: BlockChain) -> list[NDArray[np.uint8]]:
    """One buffer per layer, different for every chain."""
    size_bytes = sum(map(blocks.slice_bytes, chain.token_counts))
    generator = np.random.default_rng(list(chain.keys[-1]))
    return [generator.integers(0, 256, size_bytes, np.uint8) for _ in range(blocks.shard.layers)]


def same(loaded: Sequence[NDArray[np.uint8]], saved: Sequence[NDArray[np.uint8]]) -> bool:
    return len(loaded) == len(saved) and all(map(np.array_equal, loaded, saved))
