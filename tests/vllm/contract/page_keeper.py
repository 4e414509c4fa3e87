"""A connector that keeps pages in this process: it shows that the rig finds what a connector does wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata


@dataclass
class Orders(KVConnectorMetadata):
    """Copies between pages and the store: (the tokens up to a page's end, the page)."""

    loads: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    saves: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    receiving: list[str] = field(default_factory=list)


class PageKeeper(KVConnectorBase_V1):
    """Options: `between_steps` loads asynchronously, `swaps` writes loaded pages in a wrong order, and `holds` keeps
    the pages of requests that have ended.
    """

    store: ClassVar[dict[tuple[int, ...], list[torch.Tensor]]] = {}

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._between_steps, self._swaps = options.get("between_steps", False), options.get("swaps", False)
        self._holds = options.get("holds", False)
        self._page_tokens = vllm_config.cache_config.block_size
        self._orders = Orders()
        self._requests: dict[str, Any] = {}

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._pages = list(kv_caches.values())

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if request.num_preemptions:
            return 0, False
        hit = num_computed_tokens
        while hit + self._page_tokens < request.num_tokens and self._key(request, hit) in self.store:
            hit += self._page_tokens
        return hit - num_computed_tokens, hit > num_computed_tokens and self._between_steps

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._requests[request.request_id] = request
        if not num_external_tokens:
            return
        end = (request.num_computed_tokens + num_external_tokens) // self._page_tokens
        page_ids = blocks.get_block_ids()[0][:end]
        first = end - num_external_tokens // self._page_tokens
        for index in range(first, end):
            self._orders.loads.append((self._key(request, index * self._page_tokens), page_ids[index]))
        if self._between_steps:
            self._orders.receiving.append(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders, self._orders = self._orders, Orders()
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            (page_ids,) = scheduler_output.kv_connector_block_state.get_block_ids(request_id)
            computed = request.num_computed_tokens
            for index in range(computed // self._page_tokens, (computed + scheduled) // self._page_tokens):
                orders.saves.append((self._key(request, index * self._page_tokens), page_ids[index]))
        return orders

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return self._holds, None

    def _key(self, request: Any, first_token: int) -> tuple[int, ...]:
        return tuple(request.all_token_ids[: first_token + self._page_tokens])

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads = self._get_connector_metadata().loads
        pages = [page for _, page in loads]
        for (key, _), page in zip(loads, reversed(pages) if self._swaps else pages, strict=True):
            for layer, kept in zip(self._pages, self.store[key], strict=True):
                layer[page] = kept

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        for key, page in self._get_connector_metadata().saves:
            self.store[key] = [layer[page].clone() for layer in self._pages]

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        return set(), set(self._get_connector_metadata().receiving)
