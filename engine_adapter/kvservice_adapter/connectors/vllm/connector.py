"""The class that vLLM makes: once in the scheduler's process, and once in each worker."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvservice_adapter.connectors.vllm.metadata import StepOrders, StepReport
from kvservice_adapter.connectors.vllm.scheduler_role import SchedulerRole
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings, LoadMode
from kvservice_adapter.connectors.vllm.stats import PrometheusMetrics, TransferStats
from kvservice_adapter.connectors.vllm.worker_role import WorkerRole

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def guarded(otherwise: Callable[[KVServiceConnector], Any]) -> Callable[[F], F]:
    """A hook whose errors never reach vLLM, which would end the engine: they are logged and counted.

    `otherwise` makes what the hook returns then. An error in a step of a worker fails that step's loads.
    """

    def decorate(hook: F) -> F:
        @functools.wraps(hook)
        def call(self: KVServiceConnector, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:
                self._hook_raised(hook.__name__, error)
                return otherwise(self)

        return cast(F, call)

    return decorate


def _transfers(finished: set[str], failed: set[str]) -> KVConnectorTransferResults:
    return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)


def _none(connector: KVServiceConnector) -> None:
    return None


class KVServiceConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV cache in a KVService daemon. A failure of the daemon costs a computation, never a request.

    Its constructor, and `register_kv_caches`, raise for a configuration, a model or an attention backend that is not
    supported. Of the other methods only `update_state_after_alloc` could: if it can neither order a load nor report it
    as failed, the engine's end is better than wrong tokens.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._errors_logged: set[str] = set()
        settings = ConnectorSettings.of(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: SchedulerRole | None = None
        self._worker: WorkerRole | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerRole(vllm_config, kv_cache_config, settings)
            if self._kv_transfer_config.kv_load_failure_policy != "recompute":
                log.warning(
                    "kv_load_failure_policy is %r: vLLM fails a request whose stored KV cannot be loaded. "
                    'Set "kv_load_failure_policy": "recompute" in --kv-transfer-config',
                    self._kv_transfer_config.kv_load_failure_policy,
                )
        else:
            self._worker = WorkerRole(vllm_config, kv_cache_config, settings)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a save that is lost is a later miss."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Loads layer by layer run Python code between layers."""
        return extra_config.get("load") == LoadMode.LAYERS

    # Scheduler

    @guarded(_none)
    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._of_scheduler.bind_manager(kv_cache_manager)

    @guarded(_none)
    def on_new_request(self, request: Any) -> None:
        self._of_scheduler.on_new(request)

    @guarded(lambda self: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._of_scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        try:
            self._of_scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)
        except Exception as error:
            self._hook_raised("update_state_after_alloc", error)
            if num_external_tokens:  # vLLM expects them: the worker must report that they are not there.
                self._of_scheduler.fail_load(request, blocks.get_block_ids(), num_external_tokens)

    @guarded(lambda self: self._of_scheduler.take_orders())
    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        return self._of_scheduler.orders_of_step(scheduler_output)

    @guarded(_none)
    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        report = meta if isinstance(meta, StepReport) else None
        if connector_output.invalid_block_ids:
            self._of_scheduler.on_bad_pages(connector_output.invalid_block_ids, report)
        self._of_scheduler.on_output(report, set(connector_output.finished_recving or ()))

    @guarded(lambda self: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._of_scheduler.finished(request, block_ids)
        return False, None

    @guarded(lambda self: False)
    def reset_cache(self) -> bool | None:
        return self._of_scheduler.reset()

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._of_worker.register(kv_caches)

    @guarded(_none)
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """vLLM calls it first in each step, before it changes a page."""
        self._of_worker.before_step(kv_connector_metadata)

    @guarded(_none)
    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._of_worker.before_step(connector_metadata)

    @guarded(_none)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._of_worker.start_loads(self._get_connector_metadata())

    @guarded(_none)
    def wait_for_layer_load(self, layer_name: str) -> None:
        self._of_worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are saved a step later, when vLLM knows which of their tokens it keeps."""

    @guarded(_none)
    def wait_for_save(self) -> None:
        self._of_worker.end_step()

    @guarded(lambda self: _transfers(*self._of_worker.finished_anyway()))
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return _transfers(*self._of_worker.take_finished())

    @guarded(lambda self: self._of_worker.pages_in_doubt())
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._of_worker.take_bad_pages()

    @guarded(_none)
    def build_connector_worker_meta(self) -> StepReport | None:
        return self._of_worker.take_report()

    # Both

    @guarded(_none)
    def get_kv_connector_stats(self) -> TransferStats | None:
        if self._worker is not None:
            return self._worker.take_stats()
        return self._of_scheduler.take_stats()

    @guarded(_none)
    def shutdown(self) -> None:
        for role in (self._scheduler, self._worker):
            if role is not None:
                role.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        return TransferStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> PrometheusMetrics:
        return PrometheusMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def take_events(self) -> Iterable[Any]:
        return ()

    @property
    def _of_scheduler(self) -> SchedulerRole:
        assert self._scheduler is not None, "this is a worker's connector"
        return self._scheduler

    @property
    def _of_worker(self) -> WorkerRole:
        assert self._worker is not None, "this is the scheduler's connector"
        return self._worker

    def _hook_raised(self, hook: str, error: Exception) -> None:
        """Log it once per hook and kind of error; fail the step's loads."""
        name = f"{hook} {type(error).__name__}"
        if name not in self._errors_logged:
            self._errors_logged.add(name)
            log.error("KVService: %s failed, and its work is left out: %s", hook, error, exc_info=error)
        role = self._worker or self._scheduler
        if role is not None:
            role.count_error()
        if self._worker is not None and hook in ("start_load_kv", "wait_for_layer_load", "wait_for_save"):
            orders = self._connector_metadata
            if isinstance(orders, StepOrders):
                self._worker.fail_loads(orders, error)
