"""vLLM's worker with numbers in place of a model: its runners' own code calls the connector, in their order."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from tests.vllm.contract.cpu_platform import define_kernel
from tests.vllm.contract.numbers import NumberedModel, Numbers, states_of
from tests.vllm.contract.setup import attention_layers, pages_of


class Runner(StrEnum):
    """vLLM's two model runners, which call a worker's connector in somewhat different ways."""

    V1 = "v1"
    V2 = "v2"


@dataclass
class _Row:
    """A request, as the worker knows it from the scheduler's outputs."""

    tokens: list[int]
    prompt_count: int
    page_ids: list[list[int]]  # Per KV cache group.
    computed: int
    drafted: list[int] = field(default_factory=list)  # After `tokens`, to be verified in this step.
    _states: list[int] = field(default_factory=list)

    def states(self) -> npt.NDArray[np.int64]:
        """`states_of` the tokens. Those that are computed do not change."""
        del self._states[self.computed :]
        last = self._states[-1] if self._states else 0
        self._states += states_of([*self.tokens, *self.drafted][len(self._states) :], last).tolist()
        return np.array(self._states, np.int64)


@dataclass(frozen=True)
class WrongPage:
    """A page that a forward read, and that had another number than the model computes there."""

    request_id: str
    layer: str
    token: int
    page_id: int


class Worker:
    """One rank, with the worker's role of the connector. Close it: vLLM knows one connector per process."""

    def __init__(self, config: VllmConfig, caches: KVCacheConfig, model: NumberedModel, runner: Runner) -> None:
        self._config, self._model, self._runner = config, model, runner
        define_kernel()
        self.layers = attention_layers(config, model)
        self.pages = pages_of(caches)
        self._groups = {
            name: number for number, group in enumerate(caches.kv_cache_groups) for name in group.layer_names
        }
        for name, layer in self.layers.items():
            layer.kv_cache = self.pages[name]
        self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, caches)
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        self._active = ActiveKVConnector(config, self.pages)  # It registers the pages, as runner V1 does.
        self._rows: dict[str, _Row] = {}
        self._forward_of_step: list[tuple[str, range]] = []  # Each request's tokens to compute.
        self._attention = maybe_transfer_kv_layer(self._attend)
        self.wrong_pages: list[WrongPage] = []  # Of the last step.
        self.unchecked_pages: set[int] = set()  # That a test has changed.
        self.checks_pages = True

    def close(self) -> None:
        """As vLLM does at its end, where it comes to that."""
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        self.connector.shutdown()

    def execute(self, step: Any) -> ModelRunnerOutput:
        """One step of the scheduler's. Its metadata arrives pickled, as from another process."""
        step.kv_connector_metadata = pickle.loads(pickle.dumps(step.kv_connector_metadata))
        self.wrong_pages = []
        run = self._execute_v1 if self._runner is Runner.V1 else self._execute_v2
        output, kv_output = run(step)
        if kv_output is not None:
            meta = kv_output.kv_connector_worker_meta
            kv_output.kv_connector_worker_meta = pickle.loads(pickle.dumps(meta))
            output.kv_connector_output = kv_output
        return output

    def _execute_v1(self, step: Any) -> tuple[ModelRunnerOutput, KVConnectorOutput | None]:
        self.connector.handle_preemptions(step.kv_connector_metadata)
        self._update_rows(step)
        if not step.total_num_scheduled_tokens:
            output = KVConnectorModelRunnerMixin.kv_connector_no_forward(step, self._config)
            return output, output.kv_connector_output
        drafts = self._config.speculative_config is not None
        with (
            self._forward_context(step),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(step, defer_finalize=drafts) as kv_output,
        ):
            tokens = self._forward()
        if drafts:  # After the draft model's forward.
            KVConnectorModelRunnerMixin.finalize_kv_connector()
        return self._sampled(tokens), kv_output

    def _execute_v2(self, step: Any) -> tuple[ModelRunnerOutput, KVConnectorOutput | None]:
        self._update_rows(step)
        if not step.total_num_scheduled_tokens:
            output = self._active.no_forward(step)
            return output, output.kv_connector_output
        batch = SimpleNamespace(
            idx_mapping=torch.arange(len(self._forward_of_step)),
            req_ids=[request_id for request_id, _ in self._forward_of_step],
            num_tokens=step.total_num_scheduled_tokens,
        )
        self._active.pre_forward(step, batch)
        with self._forward_context(step):
            tokens = self._forward()
        self._active.finish_forward()
        return self._sampled(tokens), self._active.post_forward(step.finished_req_ids)

    def _forward_context(self, step: Any) -> Any:
        metadata = {name: SimpleNamespace() for name in self.layers}
        return set_forward_context(
            metadata,
            self._config,
            num_tokens=step.total_num_scheduled_tokens,
            slot_mapping=dict.fromkeys(self.layers),
        )

    def _update_rows(self, step: Any) -> None:
        for request_id in step.finished_req_ids:
            self._rows.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            page_ids = [list(ids) for ids in new.block_ids]
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            self._rows[new.req_id] = _Row(tokens, len(new.prompt_token_ids), page_ids, new.num_computed_tokens)
        cached = step.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            row = self._rows[request_id]
            row.computed = cached.num_computed_tokens[index]
            new_pages = cached.new_block_ids[index]
            if request_id in cached.all_token_ids:
                row.tokens = list(cached.all_token_ids[request_id])
            del row.tokens[row.prompt_count + cached.num_output_tokens[index] :]  # Sampled after a load that failed.
            if request_id in cached.resumed_req_ids:
                row.page_ids = [[] for _ in row.page_ids]
            for ids, more in zip(row.page_ids, new_pages or (), strict=False):
                ids += more
        for request_id, tokens in step.scheduled_spec_decode_tokens.items():
            self._rows[request_id].drafted = list(tokens)
        self._forward_of_step = [
            (request_id, range(self._rows[request_id].computed, self._rows[request_id].computed + count))
            for request_id, count in step.num_scheduled_tokens.items()
        ]

    def _forward(self) -> list[list[int]]:
        """Every layer in turn; then a token of each request whose tokens are all computed."""
        for name in self.layers:
            self._update_pages(name)
            self._attention(name)
        sampled: list[list[int]] = []
        for request_id, positions in self._forward_of_step:
            row = self._rows[request_id]
            drafted, row.drafted = row.drafted, []
            if positions.stop < len(row.tokens) + len(drafted):
                sampled.append([])
                continue
            begin = len(row.tokens)
            for draft in [*drafted, None]:  # The KV of drafts that are not accepted stays in the pages.
                first = self._model.seen(len(row.tokens) - 1, list(self.layers).index(name))
                keys, _ = self._read(name, row, first, len(row.tokens))
                row.tokens.append(self._model.next_token(float(keys.sum(dtype=np.float64))))
                if row.tokens[-1] != draft:
                    break
            sampled.append(row.tokens[begin:])
        return sampled

    def _update_pages(self, name: str) -> None:
        """Write the new tokens' keys and values by the backend's own update, before the layer's load is waited for."""
        index, page_tokens = list(self.layers).index(name), self.pages[name].shape[2]
        keys: list[Numbers] = []
        values: list[Numbers] = []
        slots: list[int] = []
        for request_id, positions in self._forward_of_step:
            row = self._rows[request_id]
            states = row.states()[positions.start : positions.stop]
            for into, numbers in zip((keys, values), self._model.keys_and_values(states, index), strict=True):
                into.append(numbers)
            page_ids = row.page_ids[self._groups[name]]
            slots += [page_ids[place // page_tokens] * page_tokens + place % page_tokens for place in positions]
        layer = self.layers[name]
        arrays = (torch.from_numpy(np.concatenate(each)) for each in (keys, values))
        layer.impl.do_kv_cache_update(layer, *arrays, self.pages[name], torch.tensor(slots))

    def _attend(self, layer_name: str) -> None:
        """Read all pages that attention reads, and compare every number."""
        index = list(self.layers).index(layer_name)
        page_tokens = self.pages[layer_name].shape[2]
        for request_id, positions in self._forward_of_step:
            row = self._rows[request_id]
            first = self._model.seen(positions.start, index)
            found = self._read(layer_name, row, first, positions.stop)
            right = self._model.keys_and_values(row.states()[first : positions.stop], index)
            wrong = [(each != known).any(axis=(1, 2)) for each, known in zip(found, right, strict=True)]
            for token in np.flatnonzero(wrong[0] | wrong[1]).tolist():
                page_id = row.page_ids[self._groups[layer_name]][(first + token) // page_tokens]
                if self.checks_pages and page_id not in self.unchecked_pages:
                    self.wrong_pages.append(WrongPage(request_id, layer_name, first + token, page_id))

    def _read(self, name: str, row: _Row, first: int, end: int) -> tuple[Numbers, Numbers]:
        """Keys and values of tokens ``[first, end)``, each ``[token, head, dim]``: per page and head, keys
        ``[dim][token]``, then values ``[token][dim]``. The shape of vLLM's tensor does not show it.
        """
        _, heads, page_tokens, both = self.pages[name].shape
        dim = both // 2
        used = row.page_ids[self._groups[name]][first // page_tokens : -(-end // page_tokens)]
        halves = self.pages[name].numpy()[used].reshape(len(used), heads, 2, page_tokens * dim)
        keys = halves[:, :, 0].reshape(-1, heads, dim, page_tokens).transpose(0, 3, 1, 2)
        values = halves[:, :, 1].reshape(-1, heads, page_tokens, dim).transpose(0, 2, 1, 3)
        of_pages = slice(first % page_tokens, first % page_tokens + end - first)
        return keys.reshape(-1, heads, dim)[of_pages], values.reshape(-1, heads, dim)[of_pages]

    def _sampled(self, tokens: list[list[int]]) -> ModelRunnerOutput:
        ids = [request_id for request_id, _ in self._forward_of_step]
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={each: index for index, each in enumerate(ids)}, sampled_token_ids=tokens
        )
