"""The worker's role: copies KV between vLLM's pages and the daemon."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from kvservice_adapter.breaker import Breaker, answered, probe_of
from kvservice_adapter.connectors.vllm.metadata import FailedLoad, PageLoadOrder, PageSaveOrder, StepOrders, StepReport
from kvservice_adapter.connectors.vllm.model_layout import ModelRefused, check_window, layout_of, shard_of
from kvservice_adapter.connectors.vllm.page_layouts import UnsupportedPages, check_backend, proven_views
from kvservice_adapter.connectors.vllm.request_progress import EndedLoad
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings, LoadMode
from kvservice_adapter.connectors.vllm.stats import BreakerStats, TransferStats
from kvservice_adapter.device.arrays import view_of
from kvservice_adapter.device.cuda_ipc import exported_pages
from kvservice_adapter.engine.metrics import reason_of
from kvservice_adapter.engine.page_loads import AnswerWait, PagedLayers, PrefixLoad, Waits, release_on, stop_all
from kvservice_adapter.engine.page_saves import Gathering, PageSave, PageSaver
from kvservice_adapter.load import LayerLoader, LoadFailed
from kvservice_adapter.torch_device import device_for
from kvservice_api import spans
from kvservice_api.errors import Cancelled, KVError
from kvservice_client import Client, SaveResult
from kvservice_client.device_memory import DeviceMemory
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.transports.in_place import Verify

log = logging.getLogger(__name__)

_LATE_S = 0.01  # How much later than its deadline a call may return.
_CLOSED_S = 2.0  # At vLLM's end: for the last saves.
_GATHERED_S = 30.0  # For copies out of the pages, from memory to memory.


class WorkerRole:
    """One rank. All methods are called on vLLM's worker thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> None:
        """Makes no call to the daemon. Raises ModelRefused."""
        self._vllm_config, self._settings = vllm_config, settings
        self.layout, self._place = layout_of(vllm_config, kv_cache_config, settings)
        self._shard, self._is_writer = shard_of(self.layout, vllm_config.parallel_config)
        self._client = Client(settings.address, name=_client_name(vllm_config), transport=settings.transport)
        self._clock = self._client.clock
        self._blocks = self._client.open_layout(self.layout, self._shard)
        self._breaker = Breaker(probe_of(self._blocks), clock=self._clock)
        self._breaker_stats = BreakerStats(self._breaker)
        self._answer_wait = self._new_wait()
        self._unanswered_s = 0.0  # How long this step has waited for the daemon in vain, before its loads.
        self._lines = RateLimitedLog(log)
        self._layers: PagedLayers | None = None
        self._memory: DeviceMemory | None = None
        self._lock = threading.Lock()  # Of what loads between steps report.
        self._finished: set[str] = set()
        self._bad_pages: set[int] = set()
        self._failed_requests: set[str] = set()
        self._report = StepReport()
        self._stats = TransferStats()
        self._loaders: list[tuple[PageLoadOrder, PrefixLoad, LayerLoader]] = []
        self._between_steps: dict[str, PrefixLoad] = {}  # By request.
        self._gathering: Gathering | None = None
        self._saver: PageSaver | None = None
        self._orders: StepOrders | None = None
        self._open: dict[str, PageLoadOrder] = {}  # By request: the loads of this step that have not ended.
        self._is_silent = False  # In this step the daemon did not answer in time: no load waits for it any more.

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Find keys and values in vLLM's pages. Raises UnsupportedPages, ModelRefused."""
        place = self._place
        missing = sorted(set(place.names) - set(kv_caches))
        if missing:
            raise ModelRefused(f"vLLM registered no pages of {', '.join(missing)}")
        modules = get_layers_from_vllm_config(self._vllm_config, AttentionLayerBase, place.names)
        keys, values, dtypes = [], [], []
        model_tokens = self._vllm_config.model_config.max_model_len
        for layer, (name, spec) in enumerate(zip(place.names, place.specs, strict=True)):
            if name not in modules:
                raise UnsupportedPages(f"{name} is no attention layer of this model")
            window = getattr(modules[name], "sliding_window", None)
            check_window(name, window, self.layout.group_of(layer).window, model_tokens)
            check_backend(name, modules[name])
            views = proven_views(name, modules[name], kv_caches[name], spec.head_size, spec.head_size_v)
            page_tokens = place.groups[place.group_of_layer[layer]].page_tokens
            if views.keys.shape[2] != page_tokens:
                raise UnsupportedPages(f"{name} has pages of {views.keys.shape[2]} tokens, not {page_tokens}")
            keys.append(view_of(views.keys))
            values.append(view_of(views.values))
            dtypes.append(str(spec.dtype).removeprefix("torch."))
        self._layers = PagedLayers(keys, values, dtypes, place.group_of_layer)
        device = device_for(next(iter(kv_caches.values())).device)
        self._device = device
        pages = exported_pages(device, keys, values, place.group_of_layer)
        if pages is not None and self._settings.transport == "auto":
            self._memory = self._blocks.device_memory(pages)
        if device.arena_observer is not None:
            self._client.observe_arenas(device.arena_observer)
        self._copying, self._loading = device.stream("kvservice-copy"), device.stream("kvservice-load")
        self._loading_between_steps = device.stream("kvservice-load-between")  # They may wait longer than a step.
        self._release = release_on(device.stream("kvservice-release"))
        self._layer_of_name = {name: index for index, name in enumerate(place.names)}
        if self._settings.save and self._is_writer:
            self._saver = PageSaver(
                device,
                self._blocks,
                self._layers,
                self._breaker,
                self._clock,
                staging_bytes=self._settings.staging_bytes,
                on_saved=self._saved,
                on_dropped=self._save_dropped,
                on_lost=self._save_lost,
                memory=self._memory,
            )
        threading.Thread(target=self._attach, name="kvservice-start", daemon=True).start()

    def _attach(self) -> None:
        """Attach before the first request needs it, and say which way bytes will move."""
        try:
            self._blocks.ping()
        except KVError as error:
            log.warning("KVService is not used until the daemon answers: %s", error)
            return
        if self._memory is not None:
            self._memory.register()
        why = self._client.stats().shm_refused_because
        log.info(
            "connected to the KVService daemon at %s, layout %s%s",
            self._settings.address,
            self.layout.fingerprint.hex()[:12],
            f"; not by shared memory: {why}" if why else "",
        )

    # A step, in vLLM's order

    def before_step(self, orders: StepOrders) -> None:
        """Before vLLM changes any page: copy out the blocks to save."""
        if not self._begin_step(orders):
            return
        former, self._gathering = self._gathering, None
        self._wait(former)  # If `end_step` was not called, or has failed.
        freed = self._gather([save for save in orders.saves if save.is_freed])
        try:
            self._gathering = self._gather([save for save in orders.saves if not save.is_freed])
        finally:  # After an error too, vLLM writes into the freed pages.
            self._wait(freed)
        self._unanswered_s = 0.0 if freed is None else freed.unanswered_s

    def _gather(self, orders: list[PageSaveOrder]) -> Gathering | None:
        if self._saver is None or not orders:
            return None
        saves = [
            PageSave(each.chain, each.first_token, each.page_ids, spans.of_headers(each.trace_headers), each.request_id)
            for each in orders
        ]
        return self._saver.gather(saves, self._settings.wait_s / 2)  # The loads of the step have the other half.

    def _wait(self, gathering: Gathering | None) -> None:
        """Until vLLM may write into the pages."""
        if gathering is not None and not gathering.wait(_GATHERED_S):
            self._lines.warning("blocks were not copied out of vLLM's pages in time: they are not saved")

    def _saved(self, result: SaveResult) -> None:
        """On a thread of the saver's."""
        self._count(saved_blocks=result.stored, already_stored_blocks=result.already_stored)

    def _save_dropped(self, reason: str, blocks: int) -> None:
        """On any thread."""
        with self._lock:
            self._stats.add("dropped_save_blocks", blocks, reason)

    def _save_lost(self, save: PageSave) -> None:
        """On any thread."""
        with self._lock:
            self._report.dropped_saves.append((save.request_id, save.first_token))

    def _begin_step(self, orders: StepOrders) -> bool:
        """False if the step of these orders has begun already."""
        if orders is self._orders:
            return False
        self._orders, self._is_silent, self._unanswered_s = orders, False, 0.0
        self._open = {order.request_id: order for order in orders.loads}
        return True

    def start_loads(self, orders: StepOrders) -> None:
        """Copy in what the step's forward needs, and begin what later steps need."""
        self._begin_step(orders)
        # vLLM's own work between these hooks, such as its image encoder, was no wait for the daemon.
        self._answer_wait = self._new_wait(self._unanswered_s)
        for order in list(self._open.values()):
            if not order.ticket:
                self._failed(order, "INTERNAL", "the scheduler's role has failed", is_unanswered=False)
            elif not self._may_ask:
                self._not_asked(order)
            elif order.mode is LoadMode.BETWEEN_STEPS:
                waits = Waits(self._new_wait(), self._settings.layer_wait_s, self._settings.layer_wait_s)
                load = self._between_steps[order.request_id] = self._load(order, waits)
                self._loading_between_steps.submit(partial(self._load_between_steps, order, load))
                self._open.pop(order.request_id, None)  # The loading thread reports it, and may have done so.
            elif order.mode is LoadMode.LAYERS:
                self._loaders.append((order, *self._begin_layers(order)))
            else:
                self._load_whole(order, self._load(order, self._waits_of_step))
                if not self._is_silent:
                    self._answer_wait.restart()  # Its copies were no wait for the daemon.
        for request_id in orders.cancelled:
            if (running := self._between_steps.get(request_id)) is not None:
                running.cancel()

    @property
    def _may_ask(self) -> bool:
        return self._breaker.allow() and not self._is_silent

    def _new_wait(self, used_s: float = 0.0) -> AnswerWait:
        return AnswerWait(self._settings.wait_s, self._clock, used_s=used_s)

    @property
    def _waits_of_step(self) -> Waits:
        return Waits(self._answer_wait, self._settings.layer_wait_s, self._settings.wait_s)

    def _load(self, order: PageLoadOrder, waits: Waits) -> PrefixLoad:
        tokens = (min(order.begins), order.end_token)
        trace = spans.of_headers(order.trace_headers)
        verify: Verify = "once" if self._device.reads_in_place else "always"
        load = PrefixLoad(
            self._copying,
            self._blocks,
            order.ticket,
            tokens,
            waits,
            self._release,
            trace,
            verify=verify,
            memory=self._memory,
        )
        load.after(self._device.computed())
        return load

    def _load_whole(self, order: PageLoadOrder, load: PrefixLoad) -> None:
        assert self._layers is not None
        began_s = self._clock.now_s()
        try:
            for _ in load.begin(load.pages_of_layer(self._layers, order.page_ids, order.begins)):
                pass
        except Exception as error:
            self._load_failed(order, error, load.valid_tokens)
        else:
            seconds = self._clock.now_s() - began_s
            waits_s = [] if order.mode is LoadMode.BETWEEN_STEPS else [seconds]
            self._load_ended(order, load.size_bytes, seconds, waits_s, load.transport)

    def _load_between_steps(self, order: PageLoadOrder, load: PrefixLoad) -> None:
        """On the loading stream's thread. Every end is reported: else the request never runs."""
        try:
            if self._breaker.allow():
                load.waits.answer.restart()  # Loads before it used this thread.
                self._load_whole(order, load)
            else:
                self._not_asked(order)
        except BaseException as error:
            self._failed(order, reason_of(error), f"{type(error).__name__}: {error}", is_unanswered=False)
            raise
        finally:
            self._between_steps.pop(order.request_id, None)

    def _begin_layers(self, order: PageLoadOrder) -> tuple[PrefixLoad, LayerLoader]:
        assert self._layers is not None
        load = self._load(order, self._waits_of_step)
        loader = LayerLoader(
            self._device,
            self._loading,
            load,
            load.pages_of_layer(self._layers, order.page_ids, order.begins),
            layer_count=self._shard.layers,
            buffer_layers=self._shard.layers,  # They go straight into the pages: nothing is buffered.
            wait_s=self._settings.wait_s + self._settings.layer_wait_s,
            clock=self._clock,
        )
        loader.start()
        return load, loader

    def wait_for_layer(self, name: str) -> None:
        """Before the forward reads a layer's pages."""
        if not self._loaders:
            return
        layer, running, failed = self._layer_of_name[name], [], []
        for order, load, loader in self._loaders:
            try:
                self._wait_for_layer(layer, load, loader)
            except LoadFailed as error:
                loader.cancel()
                failed.append((order, load, error))
                continue
            running.append((order, load, loader))
            if layer + 1 == self._shard.layers:
                report = loader.report
                self._load_ended(order, report.size_bytes, report.busy_s, report.waited_s, load.transport)
        stop_all([load for _, load, _ in failed])  # vLLM computes into the pages after this.
        for order, load, reason in failed:
            self._load_failed(order, reason, load.valid_tokens)
        self._loaders = running if layer + 1 < self._shard.layers else []

    def _wait_for_layer(self, layer: int, load: PrefixLoad, loader: LayerLoader) -> None:
        """Raises LoadFailed."""
        if not self._may_ask:
            loader.wait(layer, 0.0)
            return
        if not load.is_leased:  # A call that waits for the connection itself may return later than its deadline.
            try:
                loader.wait(layer, self._waits_of_step.answer.remaining_s + _LATE_S)
                return
            except LoadFailed:
                if not load.is_leased:
                    raise
        loader.wait(layer)

    def end_step(self) -> None:
        """After the forward: from now on vLLM may give the pages to others."""
        gathering, self._gathering = self._gathering, None
        self._wait(gathering)
        self._end_layers(LoadFailed("the forward ended before all layers were loaded"))

    def _end_layers(self, error: Exception) -> None:
        loaders, self._loaders = self._loaders, []
        for _, _, loader in loaders:
            loader.cancel()
        stop_all([load for _, load, _ in loaders])
        for order, _, _ in loaders:
            self._load_failed(order, error)

    # What is reported after a step

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose loads between steps have ended, with or without success. vLLM ends if it gets one twice.

        And those of them that vLLM has to compute from their first token, because bad pages cannot say which of their
        tokens are missing.

        The forward has ended, also where vLLM calls `wait_for_save` after this: with speculative decoding.
        """
        self._end_layers(LoadFailed("the forward ended before all layers were loaded"))
        return self.finished_anyway()

    def finished_anyway(self) -> tuple[set[str], set[str]]:
        """What `take_finished` returns, if that has raised."""
        with self._lock:
            finished, self._finished = self._finished, set()
            failed, self._failed_requests = self._failed_requests, set()
        return finished, failed

    def take_bad_pages(self) -> set[int]:
        return self._taken_bad_pages()

    def _taken_bad_pages(self) -> set[int]:
        with self._lock:
            pages, self._bad_pages = self._bad_pages, set()
        return pages

    def take_report(self) -> StepReport | None:
        with self._lock:
            report, self._report = self._report, StepReport()
        report.is_daemon_away = not self._breaker.allow()
        is_empty = not (report.failed or report.loaded or report.dropped_saves or report.is_daemon_away)
        return None if is_empty else report

    def take_stats(self) -> TransferStats | None:
        with self._lock:
            self._breaker_stats.count_into(self._stats)
            stats, self._stats = self._stats, TransferStats()
        return None if stats.is_empty() else stats

    def fail_loads(self, orders: StepOrders, error: Exception) -> None:
        """A hook raised: this step's loads have failed that have not ended. The loading thread reports its own."""
        self._begin_step(orders)
        self._end_layers(LoadFailed(f"{type(error).__name__}: {error}"))
        for order in list(self._open.values()):
            self._failed(order, reason_of(error), f"{type(error).__name__}: {error}", is_unanswered=False)

    def pages_in_doubt(self) -> set[int]:
        """What `take_bad_pages` returns, if that has raised: with all pages that this step's loads were to fill."""
        orders = self._orders.loads if self._orders is not None and self._place.is_plain else []
        return {page for order in orders for page in self._pages_of(order, order.first_token)} | self._taken_bad_pages()

    def count_error(self) -> None:
        self._count(errors=1)

    def _count(self, **more: float) -> None:
        with self._lock:
            self._stats.count(**more)

    def close(self) -> None:
        """Send what was gathered, for a bounded time."""
        if self._saver is not None:
            self._saver.close(_CLOSED_S)
        if self._memory is not None:  # Before vLLM frees the pages.
            self._memory.close()
        self._breaker.close(0.0)
        self._client.close()

    def _load_ended(
        self, order: PageLoadOrder, size_bytes: int, seconds: float, waits_s: Sequence[float], transport: str
    ) -> None:
        """On any thread. `waits_s` are those of the engine."""
        self._breaker.record(True)
        with self._lock:
            self._end(order)
            self._report.loaded.append(EndedLoad(order.request_id, size_bytes, seconds, sum(waits_s), transport))
            self._stats.count(loads=1, loaded_bytes=size_bytes, load_seconds=seconds)
            for waited_s in waits_s:
                self._stats.add("load_wait_seconds", waited_s)

    def _load_failed(self, order: PageLoadOrder, error: Exception, valid_tokens: int = 0) -> None:
        """On any thread."""
        cause = error.__cause__ if isinstance(error, LoadFailed) and error.__cause__ is not None else error
        is_unanswered = isinstance(cause, LoadFailed) or (isinstance(cause, KVError) and not answered(cause))
        if not isinstance(cause, Cancelled):  # That says nothing of the daemon.
            self._breaker.record(not is_unanswered)
        reason = (
            f"{cause.reason}: {cause.message}" if isinstance(cause, KVError) else f"{type(cause).__name__}: {cause}"
        )
        self._failed(order, reason_of(error), reason, is_unanswered=is_unanswered, valid_tokens=valid_tokens)

    def _not_asked(self, order: PageLoadOrder) -> None:
        self._failed(order, "BREAKER_OPEN", "the daemon did not answer lately: it is not asked", is_unanswered=True)

    def _failed(
        self, order: PageLoadOrder, kind: str, reason: str, *, is_unanswered: bool, valid_tokens: int = 0
    ) -> None:
        """`valid_tokens` of the request, from its first token on, were loaded all the same. `kind` is for metrics."""
        # With several groups, or pages that were freed, vLLM computes the request from its first token.
        begin = max(order.first_token, valid_tokens) if self._place.is_plain else 0
        end = order.end_token
        self._lines.warning("%d tokens of a prefix of %d are computed, not loaded: %s", end - begin, end, reason)
        with self._lock:
            self._is_silent |= is_unanswered
            if self._place.is_plain:
                self._bad_pages.update(self._pages_of(order, begin))
            else:
                self._failed_requests.add(order.request_id)
            self._end(order)
            self._report.failed.append(FailedLoad(order.request_id, order.attempt, begin, reason, is_unanswered))
            self._stats.add("failed_loads", 1, kind)

    def _end(self, order: PageLoadOrder) -> None:
        """With the lock: vLLM gets the pages and the end of a load between steps at once."""
        self._open.pop(order.request_id, None)
        if order.mode is LoadMode.BETWEEN_STEPS:
            self._finished.add(order.request_id)

    def _pages_of(self, order: PageLoadOrder, first_token: int) -> tuple[int, ...]:
        """The pages into which it loads, from the one with this token on; where one group keeps its pages."""
        (group,) = self._place.groups
        return order.page_ids[0][first_token // group.page_tokens : -(-order.end_token // group.page_tokens)]


def _client_name(vllm_config: Any) -> str:
    engine, rank = vllm_config.kv_transfer_config.engine_id or "vllm", vllm_config.parallel_config.rank
    return f"vllm/{str(engine)[:32]}/worker-{rank}"
