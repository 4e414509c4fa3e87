"""The scheduler's role: what of a request is stored, what to load, and what to save.

No method but `reset` waits for the daemon.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from kvservice_adapter.breaker import Breaker, answered, probe_of
from kvservice_adapter.connectors.vllm.metadata import FailedLoad, PageLoadOrder, PageSaveOrder, StepOrders, StepReport
from kvservice_adapter.connectors.vllm.model_layout import layout_of
from kvservice_adapter.connectors.vllm.request_keys import extra_of_block, refusal_of, salt_of
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings, LoadMode
from kvservice_adapter.connectors.vllm.stats import TransferStats
from kvservice_adapter.engine.key_generation import KeyGeneration
from kvservice_adapter.engine.prefix_lookup import tier_of
from kvservice_adapter.rates import Rates
from kvservice_api.cost import Kind, plan
from kvservice_api.errors import KVError
from kvservice_api.keys import ChainBuilder
from kvservice_client import Client, FoundPrefix, PendingLookup
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

_RESET_WAIT_S = 1.0  # How long `reset` may wait. The daemon answers once its disk has written a file.
_MEASURED_MIN = 32  # Tokens of a step. The time of fewer says little about a prefill.
PARAMETERS = "kvservice"  # The connector's entry in a request's `kv_transfer_params`.


@dataclass(slots=True)
class _Request:
    """What is known of one request, from its arrival to its end."""

    request: Any
    builder: ChainBuilder
    mode: LoadMode
    may_load: bool
    may_save: bool
    lookup: PendingLookup | None = None  # It holds the lease of what it found.
    found: FoundPrefix | None = None
    asked_at_s: float = 0.0  # When vLLM first asked for the answer of `lookup`; 0 if it has not.
    found_at_s: float = 0.0
    tier: str = ""  # Where its blocks are: "dram", "ssd" or "mixed".
    is_answered: bool = False  # There will be no other answer for this attempt.
    attempt: int = 0  # The preemptions at the last lookup.
    has_loaded: bool = False  # In this attempt. If vLLM asks again, the load has failed: there is no second one.
    is_loading: bool = False  # Between steps: vLLM counts tokens as computed that are not there yet.
    began: tuple[int, int] | None = None  # (preemptions, computed tokens) at the first step of this attempt.
    saved_tokens: int = 0  # Tokens whose blocks are stored, or being saved.


class SchedulerRole:
    """All methods are called on vLLM's scheduler thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> None:
        """Makes no call to the daemon. Raises ModelRefused."""
        self._settings = settings
        self.layout, place = layout_of(vllm_config, kv_cache_config, settings)
        self._page_tokens = place.page_tokens
        self._workers: int = vllm_config.parallel_config.world_size
        name = f"vllm/{str(vllm_config.kv_transfer_config.engine_id or '')[:32]}/scheduler"
        self._client = Client(settings.address, name=name, transport="grpc")  # It moves no blocks.
        self._clock = self._client.clock
        self._blocks = self._client.open_layout(self.layout)
        self._breaker = Breaker(probe_of(self._blocks), clock=self._clock)
        self._is_async: bool = bool(vllm_config.scheduler_config.async_scheduling)
        self._rates = Rates(self._clock.now_s)
        self._step: tuple[float, list[tuple[int, int]]] | None = None  # When it began, and what it computes.
        self._manager: Any = None
        self._requests: dict[str, _Request] = {}
        self._late: list[PendingLookup] = []  # Lookups that still run, and that no request waits for.
        self._orders = StepOrders()
        self._lines = RateLimitedLog(log)
        self._generation = KeyGeneration(self._blocks, self._clock)  # Begins to attach.
        self._are_workers_away = False
        self._stats = TransferStats()

    def bind_manager(self, manager: Any) -> None:
        """vLLM's KV cache manager, which knows the pages of each request."""
        self._manager = manager

    @property
    def is_ready(self) -> bool:
        """Whether lookups can be answered without a call. False until the daemon has answered for the first time."""
        return self._generation.number is not None and self._blocks.peek(ChainBuilder(self.layout).chain) is not None

    # Requests

    def on_new(self, request: Any) -> None:
        generation = self._generation.number
        why = refusal_of(request) if generation is not None else "the key generation is not known yet"
        given = (request.kv_transfer_params or {}).get(PARAMETERS) or {}
        builder = ChainBuilder(
            self.layout,
            salt=salt_of(request, generation or 0),
            extra_of_block=extra_of_block(request, self.layout.block_tokens),
        )
        state = self._requests[request.request_id] = _Request(
            request,
            builder,
            LoadMode(given.get("load", self._settings.load)),
            may_load=not why and given.get("may_load", True) and not request.skip_reading_prefix_cache,
            may_save=not why and given.get("may_save", True) and self._settings.save,
        )
        if why:
            log.debug("request %s is neither looked up nor saved: %s", request.request_id, why)
            return
        self._extend(state)
        if state.may_load:
            self._look_up(state)

    def _extend(self, state: _Request) -> None:
        """Hash the tokens that are new since the last call."""
        tokens, known = state.request.all_token_ids, state.builder.token_count
        if len(tokens) > known:
            state.builder.extend(tokens[known:] if known else list(tokens))

    def _look_up(self, state: _Request) -> None:
        """Begin to look up the request's prefix, if it may be stored."""
        state.attempt = state.request.num_preemptions
        state.asked_at_s, state.is_answered, state.has_loaded = 0.0, False, False
        if not self._breaker.allow() or self._are_workers_away:
            state.is_answered = True
            return
        self._stats.count(lookups=1)
        local = self._blocks.peek(state.builder)
        if local is not None and not local.blocks and local.may_have_tail is False:
            state.is_answered = True
            return
        state.lookup = self._blocks.begin_lookup(
            state.builder,
            self._settings.ticket_s,
            self._settings.lookup_wait_s * 5,
            request_id=state.request.request_id,
            adoptions=self._workers,
            ticket_ttl_s=self._settings.ticket_s,
        )

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens after `computed_tokens` to load: None if the daemon has not answered yet, and whether between
        steps.
        """
        state = self._requests.get(request.request_id)
        if state is None or not state.may_load:
            return 0, False
        if request.num_preemptions != state.attempt:
            self._drop_found(state)
            self._extend(state)
            self._look_up(state)
        if state.has_loaded:
            return 0, False
        if not state.is_answered and not self._poll(state):
            return None, False
        if state.found is None:
            return 0, False
        if self._clock.now_s() - state.found_at_s > self._settings.ticket_s / 2:  # It waited for long in vLLM's queue.
            self._drop_found(state)
            self._look_up(state)
            return (0, False) if state.is_answered else (None, False)
        tokens = min(state.found.lease.hit_tokens, request.num_tokens - 1) - computed_tokens
        if tokens <= 0:
            return 0, False
        if state.mode is LoadMode.AUTO and not self._is_worth_loading(state, tokens, computed_tokens):
            self._stats.count(computed_hits=1)
            self._drop_found(state)
            return 0, False
        return tokens, self._mode(state) is LoadMode.BETWEEN_STEPS

    def _is_worth_loading(self, state: _Request, tokens: int, computed_tokens: int) -> bool:
        """Whether these stored tokens are there sooner if they are loaded, by what was measured."""
        assert state.found is not None
        chosen = plan(
            self._rates,
            tokens,
            state.request.num_tokens - computed_tokens - tokens,
            self.layout.bytes_per_token // min(self._workers, self.layout.kv_heads),
            state.tier,
            self.layout.block_tokens,
            may_mix=False,
        )
        return chosen.kind is Kind.LOAD

    def _mode(self, state: _Request) -> LoadMode:
        return LoadMode.BETWEEN_STEPS if state.mode is LoadMode.AUTO else state.mode

    def _poll(self, state: _Request) -> bool:
        """Take the lookup's answer. False if there is none yet, and the time to wait for it is not over."""
        now_s, lookup = self._clock.now_s(), state.lookup
        assert lookup is not None
        state.asked_at_s = state.asked_at_s or now_s
        is_running, found = self._answer_of(lookup)
        if is_running:
            if now_s - state.asked_at_s < self._settings.lookup_wait_s:
                time.sleep(0)  # vLLM asks again at once. Without this its thread would keep the interpreter's lock.
                return False
            self._stats.count(late_lookups=1)
            self._late.append(lookup)
            state.lookup = None
        state.is_answered = True
        if found is not None and found.ticket:
            state.found, state.found_at_s = found, now_s
            state.tier = tier_of(found.lease.residency)
            state.saved_tokens = max(state.saved_tokens, found.lease.hit_tokens)
        else:
            self._drop_found(state)
        return True

    def _answer_of(self, lookup: PendingLookup) -> tuple[bool, FoundPrefix | None]:
        """Whether a lookup still runs, and what it has found."""
        try:
            found = lookup.poll()
        except KVError as error:
            self._breaker.record(answered(error))
            self._lines.warning("a request is computed: %s: %s", error.reason, error.message, kind=str(error.reason))
            return False, None
        if found is not None:
            self._breaker.record(True)
        return found is None, found

    def _end_late_lookups(self) -> None:
        """No request waits for them any more. How they end says whether the daemon answers."""
        late, self._late = self._late, []
        for lookup in late:
            is_running, _ = self._answer_of(lookup)
            if is_running:
                self._late.append(lookup)
            else:
                lookup.cancel(with_ticket=True)

    def _drop_found(self, state: _Request, *, is_ticket_used: bool = False) -> None:
        """The answer is not used any more: its lease ends, and so does its ticket unless the workers get it."""
        if state.lookup is not None:
            state.lookup.cancel(with_ticket=not is_ticket_used)
        state.lookup = state.found = None

    def allocated(self, request: Any, page_ids: tuple[list[int], ...], external_tokens: int) -> None:
        """vLLM has given a request its pages, and expects so many tokens to be loaded into them."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        if not external_tokens:
            if state.is_answered:
                self._drop_found(state)
            return
        mode = self._mode(state)
        if state.found is None:  # Not to be expected. A ticket that no daemon takes fails the load.
            raise RuntimeError(f"{external_tokens} tokens are to be loaded, and none were found")
        total = min(state.found.lease.hit_tokens, request.num_tokens - 1)
        order = PageLoadOrder(
            request.request_id,
            state.attempt,
            state.found.ticket,
            total - external_tokens,
            total,
            tuple(page_ids[0][: -(-total // self._page_tokens)]),
            mode,
        )
        self._orders.loads.append(order)
        state.is_loading = mode is LoadMode.BETWEEN_STEPS
        self._stats.count(hits=1, hit_tokens=external_tokens)
        state.has_loaded = True
        self._drop_found(state, is_ticket_used=True)  # The ticket holds the blocks until the workers have them.

    def finished(self, request: Any, page_ids: tuple[list[int], ...]) -> None:
        """A request has ended; vLLM frees its pages after this."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return
        self._drop_found(state)
        if state.is_loading:
            self._orders.cancelled.append(request.request_id)
        elif state.may_save:
            self._save(state, request.num_computed_tokens - request.num_in_flight_tokens, page_ids[0], is_freed=True)

    # Steps

    def orders_of_step(self, scheduled: Any) -> StepOrders:
        """What the workers do in this step. The next call has other orders."""
        if self._late:
            self._end_late_lookups()
        computing: list[tuple[int, int]] = []
        for request_id, new_tokens in scheduled.num_scheduled_tokens.items():
            state = self._requests.get(request_id)
            if state is None:
                continue
            request = state.request
            computing.append((new_tokens, request.num_computed_tokens))
            if state.began is None or state.began[0] != request.num_preemptions:
                state.began = request.num_preemptions, request.num_computed_tokens - request.num_in_flight_tokens
            if not state.may_save:
                continue
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            if computed // self.layout.block_tokens * self.layout.block_tokens > state.saved_tokens:
                self._save(state, computed, self._manager.get_block_ids(request_id)[0], is_freed=False)
        is_measured = (
            not self._is_async and not self._orders.loads and sum(new for new, _ in computing) >= _MEASURED_MIN
        )
        self._step = (self._clock.now_s(), computing) if is_measured else None
        return self.take_orders()

    def _save(self, state: _Request, computed_tokens: int, page_ids: list[int], *, is_freed: bool) -> None:
        """Order the save of blocks whose tokens the scheduler knows, and whose KV earlier steps have computed."""
        # vLLM shares pages between requests of one step before their KV is computed or loaded. So nothing of a request
        # is saved before a step of its own has ended: then its earlier tokens are there too.
        if state.began is None or state.began[0] != state.request.num_preemptions or computed_tokens <= state.began[1]:
            return
        computed_tokens = min(computed_tokens, state.request.num_tokens)
        size = self.layout.block_tokens
        first = state.saved_tokens // size
        end_token = computed_tokens if is_freed else computed_tokens // size * size  # At the end, a partial block too.
        if end_token <= state.saved_tokens:
            return
        self._extend(state)
        chain = state.builder.prefix(end_token)[first:]
        pages = tuple(page_ids[: -(-end_token // self._page_tokens)])
        self._orders.saves.append(PageSaveOrder(state.request.request_id, chain, first * size, pages, is_freed))
        state.saved_tokens = end_token

    def on_output(self, report: StepReport | None, finished_loads: set[str]) -> None:
        """The workers' answer to a step."""
        step, self._step = self._step, None
        if step is not None:
            self._rates.observe_forward(step[1], self._clock.now_s() - step[0])
        for request_id in finished_loads:
            if (state := self._requests.get(request_id)) is not None:
                state.is_loading = False
        if report is None:
            self._are_workers_away = False
            return
        self._are_workers_away = report.is_daemon_away
        for request_id, size_bytes, seconds in report.loaded:
            if (state := self._requests.get(request_id)) is not None:
                self._rates.observe_load(size_bytes, seconds, state.tier)
        for failed in report.failed:
            self._on_failed(failed)
        for request_id, first_token in report.dropped_saves:
            if (state := self._requests.get(request_id)) is not None:
                state.saved_tokens = min(state.saved_tokens, first_token)

    def on_bad_pages(self, bad_pages: set[int], report: StepReport | None) -> None:
        """Loads have failed. What other requests compute on these pages, before vLLM has filled them, is not saved.

        vLLM computes them again for the request of the load, which may take several steps. Another request that shares
        them continues meanwhile.
        """
        valid = {failed.request_id: failed.valid_tokens for failed in report.failed} if report is not None else {}
        for request_id, state in self._requests.items():
            shared: list[int] = self._manager.get_block_ids(request_id)[0]
            if request_id in valid:
                shared = shared[: valid[request_id] // self._page_tokens]
            if not bad_pages.isdisjoint(shared):
                state.may_save = False

    def _on_failed(self, failed: FailedLoad) -> None:
        if failed.is_unanswered:
            self._breaker.record(False)
        state = self._requests.get(failed.request_id)
        if state is not None:
            state.may_load = False  # The daemon has the blocks, or not: a second try would cost as much again.
            state.saved_tokens = min(state.saved_tokens, failed.valid_tokens)

    def reset(self) -> bool:
        """Begin a new generation of keys: what was computed so far is never found again. Whether the daemon confirms.

        If it does not, nothing is looked up or saved until it has begun one. Requests that run keep what they have.
        """
        for state in self._requests.values():  # vLLM may compute them again, with other weights.
            self._drop_found(state)
            state.may_load = state.may_save = False
        return self._generation.begin(_RESET_WAIT_S)

    def take_stats(self) -> TransferStats | None:
        """What was counted since the last call."""
        stats, self._stats = self._stats, TransferStats()
        return None if stats.is_empty() else stats

    def count_error(self) -> None:
        self._stats.count(errors=1)

    def fail_load(self, request: Any, page_ids: tuple[list[int], ...], external_tokens: int) -> None:
        """vLLM expects tokens that are not ordered: have the workers mark their pages as bad."""
        state = self._requests.get(request.request_id)
        pages = tuple(page_ids[0])
        total = min(len(pages) * self._page_tokens, request.num_tokens)
        is_async = state is not None and self._mode(state) is LoadMode.BETWEEN_STEPS
        mode = LoadMode.BETWEEN_STEPS if is_async else LoadMode.WHOLE
        self._orders.loads = [order for order in self._orders.loads if order.request_id != request.request_id]
        self._orders.loads.append(
            PageLoadOrder(request.request_id, request.num_preemptions, b"", 0, total, pages, mode)
        )
        if state is not None:
            state.has_loaded, state.may_load = True, False

    def take_orders(self) -> StepOrders:
        """The orders so far."""
        orders, self._orders = self._orders, StepOrders()
        return orders

    def close(self) -> None:
        self._generation.close()
        self._breaker.close(0.0)
        self._client.close()
