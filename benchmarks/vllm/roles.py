"""The connector's two roles with vLLM's own objects and pages, and without an engine: what hooks cost by themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read by vLLM when it is imported.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")

import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from kvservice_adapter.connectors.vllm.metadata import StepOrders
from kvservice_adapter.connectors.vllm.scheduler_role import SchedulerRole
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings
from kvservice_adapter.connectors.vllm.worker_role import WorkerRole


class _Layer(AttentionLayerBase):
    """What the worker role needs of vLLM's attention layer."""

    def __init__(self) -> None:
        self.isa, self._k_scale_float, self._v_scale_float = "vec", 1.0, 1.0
        self.impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
        self.impl.attn_type, self.impl.kv_cache_dtype = "decoder", "auto"

    def get_attn_backend(self) -> Any:
        return CPUAttentionBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError  # vLLM asks for it where it makes the pages itself.


class Roles:
    """A scheduler and one worker of a model, on one daemon. The caller is vLLM: it calls the hooks in its order."""

    def __init__(self, model: Path, address: str, *, page_tokens: int = 128, pages: int = 64, **settings: Any) -> None:
        transfer = KVTransferConfig(
            kv_connector="KVServiceConnector",
            kv_connector_module_path="kvservice_adapter.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )
        arguments = EngineArgs(
            model=str(model), enforce_eager=True, dtype="float32", block_size=page_tokens, kv_transfer_config=transfer
        )
        self.config = arguments.create_engine_config()
        config, model_config = self.config, self.config.model_config
        heads, dim = model_config.get_total_num_kv_heads(), model_config.get_head_size()
        self.page_tokens = page_tokens
        spec = FullAttentionSpec(block_size=page_tokens, num_kv_heads=heads, head_size=dim, dtype=torch.float32)
        layers = range(model_config.get_total_num_hidden_layers())
        names = [f"model.layers.{layer}.self_attn.attn" for layer in layers]
        cache = KVCacheConfig(num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])
        config.compilation_config.static_forward_context.update({name: _Layer() for name in names})
        given = ConnectorSettings.of({"address": address, "model_revision": "measured", **settings})
        self.scheduler = SchedulerRole(config, cache, given)
        self.worker = WorkerRole(config, cache, given)
        self.pages = {name: torch.randn(pages, heads, page_tokens, 2 * dim) for name in names}
        self.worker.register(self.pages)
        self._page_ids: dict[str, list[int]] = {}
        manager = SimpleNamespace(get_block_ids=lambda request_id: (self._page_ids[request_id],))
        self.scheduler.bind_manager(manager)

    def request(self, request_id: str, token_ids: Sequence[int], kept: Any = None, **given: Any) -> Request:
        """`kept` are the connector's parameters of the request; `given` are of vLLM's Request."""
        extra = {"kv_transfer_params": {"kvservice": kept}} if kept is not None else None
        return Request(request_id, list(token_ids), SamplingParams(max_tokens=8, extra_args=extra), None, **given)

    def give_pages(self, request: Request) -> list[int]:
        """Pages 1, 2, ...: one request at a time."""
        count = -(-request.num_tokens // self.page_tokens)
        self._page_ids[request.request_id] = list(range(1, count + 1))
        return self._page_ids[request.request_id]

    def compute(self, request: Request) -> list[int]:
        """Schedule all of a request in one step, whose forward leaves the pages as they are. Returns them."""
        pages = self.give_pages(request)
        self.orders([request])
        request.num_computed_tokens = request.num_tokens
        return pages

    def orders(self, scheduled: Sequence[Request] = ()) -> StepOrders:
        return self.scheduler.orders_of_step(
            SimpleNamespace(
                num_scheduled_tokens={each.request_id: 1 for each in scheduled}, preempted_req_ids=set[str]()
            )
        )

    def step(self, orders: StepOrders) -> None:
        """A worker's hooks around a forward that does nothing."""
        self.worker.before_step(orders)
        self.worker.start_loads(orders)
        for name in self.pages:
            self.worker.wait_for_layer(name)
        self.worker.end_step()

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()
