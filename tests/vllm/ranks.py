"""vLLM's ranks without its engine: its own configuration, attention layers, specs and cache update, and our two roles.

No model runs. What a forward would compute is given (`KV`), and written by the attention backend's own cache update.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read by vLLM when it is imported.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")

import torch
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from kvservice_adapter.connectors.vllm.metadata import StepOrders, StepReport
from kvservice_adapter.connectors.vllm.scheduler_role import SchedulerRole
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings
from kvservice_adapter.connectors.vllm.worker_role import WorkerRole
from kvservice_client import ChainBuilder
from tests.daemon import until

LAYERS, QUERY_HEADS, KV_HEADS, DIM = 3, 8, 4, 32
PAGES = 16
CANARY = 77.0  # In each element of the pages that nothing has written.


def model_folder(folder: Path) -> Path:
    """The configuration of a small Llama, as vLLM reads it."""
    LlamaConfig(
        vocab_size=1000,
        hidden_size=QUERY_HEADS * DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


def vllm_config(
    model: Path, *, dtype: str = "float32", page_tokens: int = 32, parallel: dict[str, Any] | None = None, **more: Any
) -> VllmConfig:
    """vLLM's configuration with the connector, on a CPU."""
    given = ModelConfig(model=str(model), skip_tokenizer_init=True, dtype=dtype, max_model_len=1024)
    return VllmConfig(
        model_config=given,
        cache_config=CacheConfig(block_size=page_tokens),
        parallel_config=ParallelConfig(**(parallel or {})),
        scheduler_config=SchedulerConfig(max_model_len=given.max_model_len, is_encoder_decoder=False),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVServiceConnector",
            kv_connector_module_path="kvservice_adapter.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
        **more,
    )


def cache_config(config: VllmConfig) -> KVCacheConfig:
    """vLLM's KV cache configuration of the attention layers that were made under a configuration."""
    layers: dict[str, Any] = config.compilation_config.static_forward_context
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    return KVCacheConfig(PAGES, [], get_kv_cache_groups(config, specs))


class KV:
    """Keys and values of some tokens in all layers and heads: ``[layer, token, kv head, dim]``."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.keys, self.values = torch.randn(2, LAYERS, tokens, KV_HEADS, DIM).to(dtype)


class Rank:
    """One rank's worker role, with pages of its own."""

    def __init__(
        self, model: Path, settings: ConnectorSettings, *, rank: int, size: int, page_tokens: int, dtype: str
    ) -> None:
        parallel = {"tensor_parallel_size": size, "rank": rank}
        config = vllm_config(model, dtype=dtype, page_tokens=page_tokens, parallel=parallel)
        heads = max(1, KV_HEADS // size)
        self._first_head = rank * KV_HEADS // size
        with set_current_vllm_config(config):
            self._layers = {
                name: Attention(QUERY_HEADS // size, DIM, 1.0, heads, cache_config=config.cache_config, prefix=name)
                for name in (f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS))
            }
        caches = cache_config(config)
        group = caches.kv_cache_groups[0]
        builder = next(iter(self._layers.values())).get_attn_backend().get_builder_cls()
        with set_current_vllm_config(config):
            builder(group.kv_cache_spec, group.layer_names, config, torch.device("cpu"))  # It sets the layers' `isa`.
        self._page_tokens = page_tokens
        self._heads = slice(self._first_head, self._first_head + heads)
        shape = (PAGES, heads, page_tokens, 2 * DIM)
        self.pages = {name: torch.full(shape, CANARY, dtype=config.model_config.dtype) for name in self._layers}
        self.worker = WorkerRole(config, caches, settings)
        self.worker.register(self.pages)

    def clear(self) -> None:
        for pages in self.pages.values():
            pages.fill_(CANARY)

    def write(self, kv: KV, page_ids: Sequence[int], first: int = 0, end: int | None = None) -> None:
        """What the forwards of tokens ``[first, end)`` write into a request's pages."""
        self._write(self.pages, kv, page_ids, first, end)

    def has_only(self, kv: KV, page_ids: Sequence[int], first: int = 0, end: int | None = None) -> bool:
        """Whether the pages are those that `write` makes of empty ones, in each byte."""
        expected = {name: torch.full_like(pages, CANARY) for name, pages in self.pages.items()}
        self._write(expected, kv, page_ids, first, end)
        return all(torch.equal(pages, expected[name]) for name, pages in self.pages.items())

    def _write(
        self, pages: dict[str, torch.Tensor], kv: KV, page_ids: Sequence[int], first: int, end: int | None
    ) -> None:
        size = self._page_tokens
        tokens = range(first, kv.keys.shape[1] if end is None else end)
        slots = torch.tensor([page_ids[token // size] * size + token % size for token in tokens], dtype=torch.int64)
        for layer, (name, attention) in enumerate(self._layers.items()):
            keys, values = (each[layer, first:end, self._heads].contiguous() for each in (kv.keys, kv.values))
            attention.impl.do_kv_cache_update(attention, keys, values, pages[name], slots)

    def step(self, orders: StepOrders) -> StepReport:
        """A step of the engine with these orders, which reach a worker as bytes."""
        received: StepOrders = pickle.loads(pickle.dumps(orders))
        self.worker.before_step(received)
        self.worker.start_loads(received)
        self.worker.end_step()
        return self.worker.take_report() or StepReport()

    def page_ids(self, tokens: int) -> list[int]:
        """Pages for a request of so many tokens, in no order."""
        count = -(-tokens // self._page_tokens)
        return [*range(PAGES - 1, 0, -2), *range(2, PAGES, 2)][:count]

    def close(self) -> None:
        self.worker.close()


class Ranks:
    """The ranks of one engine, and its scheduler role."""

    def __init__(
        self, model: Path, address: str, *, size: int, page_tokens: int = 32, dtype: str = "float32", **more: Any
    ) -> None:
        settings = settings_of(address, **more)
        given = {"size": size, "page_tokens": page_tokens, "dtype": dtype}
        self.all = [Rank(model, settings, rank=rank, **given) for rank in range(size)]  # type: ignore[arg-type]
        config = vllm_config(
            model, dtype=dtype, page_tokens=page_tokens, parallel={"tensor_parallel_size": size, "rank": 0}
        )
        heads = max(1, KV_HEADS // size)
        with set_current_vllm_config(config):
            for layer in range(LAYERS):
                Attention(QUERY_HEADS // size, DIM, 1.0, heads, prefix=f"model.layers.{layer}.self_attn.attn")
        self.scheduler = SchedulerRole(config, cache_config(config), settings)
        until(lambda: self.scheduler.is_ready)  # Before that, requests are neither looked up nor saved.

    def page_ids(self, tokens: int) -> list[int]:
        return self.all[0].page_ids(tokens)

    def clear(self) -> None:
        for rank in self.all:
            rank.clear()

    def save(self, prompt: Sequence[int], kv: KV, **given: Any) -> StepOrders:
        """Write the KV of a request into all ranks' pages, and order its save. Returns the orders, not carried out."""
        pages = self.page_ids(len(prompt))
        for rank in self.all:
            rank.clear()
            rank.write(kv, pages, 0, len(prompt))
        return saves_of(self.scheduler, request_of(prompt, **given), pages)

    def load(self, prompt: Sequence[int], own_tokens: int = 0) -> tuple[int, list[StepReport]]:
        """Load what is found of a prompt after `own_tokens`. Returns the number of tokens, and the ranks' reports."""
        request, pages = request_of(prompt), self.page_ids(len(prompt))
        tokens = found_tokens(self.scheduler, request, own_tokens)
        self.scheduler.allocated(request, (pages,), tokens)
        orders = self.scheduler.take_orders()
        return tokens, [rank.step(orders) for rank in self.all]

    def close(self) -> None:
        for rank in self.all:
            rank.close()
        self.scheduler.close()


def settings_of(address: str, **more: Any) -> ConnectorSettings:
    """Settings with which a lookup or a load is never too late on a busy machine."""
    given = {"model_id": "tiny", "model_revision": "1", "block_tokens": 48, "lookup_wait_s": 60.0, "wait_s": 60.0}
    return ConnectorSettings.of({"address": address, "layer_wait_s": 60.0, **given, **more})


_requests = 0


def request_of(prompt: Sequence[int], mode: str = "whole", **given: Any) -> Request:
    """vLLM's own request, as its scheduler gets it."""
    global _requests
    _requests += 1
    extra = {"kv_transfer_params": {"kvservice": {"load": mode}}}
    parameters = SamplingParams(max_tokens=8, extra_args=extra)
    return Request(f"request-{_requests}", list(prompt), parameters, None, **given)


def found_tokens(scheduler: SchedulerRole, request: Request, own_tokens: int = 0) -> int:
    """Ask for a new request until there is an answer."""
    scheduler.on_new(request)
    while (tokens := scheduler.matched_tokens(request, own_tokens)[0]) is None:
        pass
    return tokens


def saves_of(scheduler: SchedulerRole, request: Request, page_ids: list[int]) -> StepOrders:
    """The orders after a request has ended whose prompt was computed."""
    scheduler.on_new(request)
    tokens = {request.request_id: request.num_tokens}
    scheduler.orders_of_step(SimpleNamespace(num_scheduled_tokens=tokens, preempted_req_ids=None))
    request.num_computed_tokens = request.num_tokens
    scheduler.finished(request, (page_ids,))
    return scheduler.take_orders()


def chain_of(scheduler: SchedulerRole, tokens: Sequence[int]) -> Any:
    builder = ChainBuilder(scheduler.layout)
    builder.extend(tokens)
    return builder.prefix(len(tokens))
