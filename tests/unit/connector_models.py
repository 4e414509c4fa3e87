"""Tiny models with random weights, and blocks kept in this process instead of a daemon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.rates import Rates
from kvservice_client import (
    BlockChain,
    ChainBuilder,
    Clock,
    Durability,
    KVError,
    Layout,
    LoadedLayer,
    RequestReport,
    ResidencyRun,
    SaveResult,
    Shard,
    Stats,
)

BLOCK_TOKENS = 4


def tiny_llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": None,
            **options,
        }
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


class NothingMeasured(Rates):
    """Learns nothing, so that stored KV is always loaded, also if computing it is faster."""

    def observe_load(self, *measured: Any, **more: Any) -> None:
        pass

    def observe_prefill(self, *measured: Any) -> None:
        pass


def connector(client: Any, model: Any, **options: Any) -> TransformersConnector:
    given = {"model_id": "tiny", "model_revision": "1", "block_tokens": BLOCK_TOKENS, "wait_s": 10.0, **options}
    given.setdefault("rates", NothingMeasured())
    return TransformersConnector(client, model, **given)


def prompt(token_count: int) -> torch.Tensor:
    return torch.randint(0, 97, (1, token_count), generator=torch.Generator().manual_seed(token_count))


def computed(model: Any, token_ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(token_ids, past_key_values=cache)
    return cache


def states(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer."""
    each: Any = cache
    return [(keys, values) for keys, values, _ in each]


class KeptBlocks:
    """A client and its block cache in one object: saved blocks are in a dict, layer by layer."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.stored: dict[bytes, list[bytes]] = {}
        self.saves: list[int] = []  # The number of blocks per save.
        self.failing: KVError | None = None
        self.layout: Layout | None = None
        self.reports: list[RequestReport] = []

    def open_layout(self, layout: Layout) -> Self:
        self.layout = layout
        return self

    def ping(self, timeout_s: float) -> None:
        self._fail()

    def stats(self) -> Stats:
        return Stats({}, {}, 0, "")

    def report_request(self, report: RequestReport) -> None:
        self.reports.append(report)

    @property
    def shard(self) -> Shard:
        return Shard.whole(self._layout)

    def slice_bytes(self, token_count: int) -> int:
        return self._layout.slice_bytes(self._layout.kv_heads, token_count)

    def contains(self, chain: BlockChain) -> int:
        self._fail()
        hits = 0
        while hits < len(chain) and chain.keys[hits] in self.stored:
            hits += 1
        return hits

    def save(self, chain: BlockChain, layers: Sequence[NDArray[np.uint8]], durability: Durability) -> SaveResult:
        self._fail()
        assert len(layers) == self._layout.layers
        self.saves.append(len(chain))
        for block, key in enumerate(chain):
            start = sum(chain.token_counts[:block]) * self._token_bytes
            end = start + chain.token_counts[block] * self._token_bytes
            self.stored[key] = [layer[start:end].tobytes() for layer in layers]
        return SaveResult(len(chain), 0, [])

    def lookup(self, chain: BlockChain | ChainBuilder, *, timeout_s: float, request_id: str) -> KeptLease:
        """As of a daemon that lists all tails."""
        found = chain.chain if isinstance(chain, ChainBuilder) else chain
        found = found[: self.contains(found)]
        if isinstance(chain, ChainBuilder):
            first, size = found.token_count + 1, self._layout.block_tokens
            longer = [chain.prefix(end) for end in range(first, min(first + size, chain.token_count + 1))]
            longer = [each for each in longer if each.keys[-1] in self.stored]
            found = longer[-1] if longer else found
        return KeptLease(found, [self.stored[key] for key in found], self._layout)

    @property
    def _token_bytes(self) -> int:
        return self._layout.slice_bytes(self._layout.kv_heads, 1)

    @property
    def _layout(self) -> Layout:
        assert self.layout is not None
        return self.layout

    def _fail(self) -> None:
        if self.failing is not None:
            raise self.failing


class KeptLease:
    def __init__(self, chain: BlockChain, blocks: list[list[bytes]], layout: Layout) -> None:
        self._blocks, self._layout = blocks, layout
        self.hit_blocks = len(blocks)
        self.hit_tokens = chain.token_count
        self.token_counts = chain.token_counts
        self.residency = [ResidencyRun(len(blocks), dram=True, ssd=False)]

    def load(self, first_block: int, block_count: int) -> Iterator[LoadedLayer]:
        for layer in range(self._layout.layers):
            data = b"".join(block[layer] for block in self._blocks[first_block : first_block + block_count])
            yield LoadedLayer(layer, np.frombuffer(bytearray(data), np.uint8), self._layout.group_of(layer))

    def release(self) -> None:
        pass
