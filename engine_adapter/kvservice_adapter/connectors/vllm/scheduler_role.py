"""The scheduler's role: what of a request is stored, what to load, and what to save.

No method but `reset` waits for the daemon.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from vllm import envs

from kvservice_adapter.breaker import Breaker, probe_of
from kvservice_adapter.connectors.vllm.metadata import FailedLoad, PageLoadOrder, StepOrders, StepReport
from kvservice_adapter.connectors.vllm.model_layout import layout_of
from kvservice_adapter.connectors.vllm.queue_hints import QueueHints
from kvservice_adapter.connectors.vllm.request_keys import extra_of_block, refusal_of, salt_of
from kvservice_adapter.connectors.vllm.request_lookups import RequestLookups
from kvservice_adapter.connectors.vllm.request_pages import RequestPages
from kvservice_adapter.connectors.vllm.request_parameters import RequestHints, RequestParameters, parameters_of
from kvservice_adapter.connectors.vllm.request_progress import RequestProgress, response_id
from kvservice_adapter.connectors.vllm.request_saves import RequestSaves
from kvservice_adapter.connectors.vllm.session_updates import SessionUpdates
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings, LoadMode
from kvservice_adapter.connectors.vllm.stats import BreakerStats, TransferStats
from kvservice_adapter.engine.key_generation import KeyGeneration
from kvservice_adapter.engine.metrics import count_first_token
from kvservice_adapter.rates import Rates
from kvservice_api.cost import Kind, Plan, plan
from kvservice_api.keys import ChainBuilder
from kvservice_client import Client, FoundPrefix, Outcome, PendingLookup, Session
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

_RESET_WAIT_S = 1.0  # How long `reset` may wait. The daemon answers once its disk has written a file.
_MEASURED_MIN = 32  # Tokens of a step. The time of fewer says little about a prefill.


@dataclass(slots=True)
class _Request:
    """What is known of one request, from its arrival to its end."""

    request: Any
    builder: ChainBuilder
    mode: LoadMode
    session_id: str  # Empty for none.
    hints: RequestHints
    progress: RequestProgress
    may_load: bool
    may_save: bool
    is_hinted: bool  # Its wait and its answer are reported to the daemon.
    is_waiting: bool = False
    lookup: PendingLookup | None = None  # It holds the lease of what it found.
    found: FoundPrefix | None = None
    asked_at_s: float = 0.0  # When vLLM first asked for the answer of `lookup`; 0 if it has not.
    looked_up_at_s: float = 0.0  # When the lookup was begun.
    tier: str = ""  # Where its blocks are: "dram", "ssd" or "mixed".
    is_answered: bool = False  # There will be no other answer for this attempt.
    attempt: int = 0  # The preemptions at the last lookup.
    has_loaded: bool = False  # In this attempt. If vLLM asks again, the load has failed: there is no second one.
    is_loading: bool = False  # Between steps: vLLM counts tokens as computed that are not there yet.
    began: tuple[int, int] | None = None  # (preemptions, computed tokens) at the first step of this attempt.
    saved_tokens: int = 0  # Tokens whose blocks are stored, or being saved.
    own_tokens: int = 0  # Tokens that vLLM's own prefix cache had.
    is_reported: bool = False


class SchedulerRole:
    """All methods are called on vLLM's scheduler thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> None:
        """Makes no call to the daemon. Raises ModelRefused."""
        self._settings = settings
        self.layout, place = layout_of(vllm_config, kv_cache_config, settings)
        self._pages = RequestPages(place.groups)
        self._saves = RequestSaves(self._pages, self.layout.block_tokens, self._extend)
        self._page_tokens = place.groups[0].page_tokens
        self._loads_between_steps = not place.is_plain
        windows = [group.window for group in place.groups if group.window]
        if windows and min(windows) < self.layout.block_tokens:
            log.warning(
                "blocks have %d tokens, and a sliding window %d: a block that fills while vLLM generates is not saved. "
                "Set block_tokens to at most the window, in all engines that share blocks",
                self.layout.block_tokens,
                min(windows),
            )
        self._workers: int = vllm_config.parallel_config.world_size
        name = f"vllm/{str(vllm_config.kv_transfer_config.engine_id or '')[:32]}/scheduler"
        self._client = Client(settings.address, name=name, transport="grpc")  # It moves no blocks.
        self._clock = self._client.clock
        self._blocks = self._client.open_layout(self.layout)
        self._breaker = Breaker(probe_of(self._blocks), clock=self._clock)
        self._breaker_stats = BreakerStats(self._breaker)
        self._is_async: bool = bool(vllm_config.scheduler_config.async_scheduling)
        self._rates = Rates(self._clock.now_s)
        self._step: tuple[float, list[tuple[int, int]]] | None = None  # When it began, and what it computes.
        self._requests: dict[str, _Request] = {}
        self._orders = StepOrders()
        self._lines = RateLimitedLog(log)
        self._sessions = SessionUpdates(self._client, self._blocks, self._breaker)
        self._generation = KeyGeneration(self._blocks, self._clock)  # Begins to attach.
        self._are_workers_away = False
        self._stats = TransferStats()
        self._lookups = RequestLookups(
            self._blocks,
            self._breaker,
            self._clock,
            settings,
            self._workers,
            lambda name: self._stats.count(**{name: 1}),
        )
        hints = self._client.hints() if settings.hints else None
        self._queue = QueueHints(hints, lambda error: self.count_error())
        self._has_priorities: bool = vllm_config.scheduler_config.policy == "priority"

    def bind_manager(self, manager: Any) -> None:
        """vLLM's KV cache manager, which knows the pages of each request."""
        self._pages.bind(manager)

    @property
    def is_ready(self) -> bool:
        """Whether lookups can be answered without a call. False until the daemon has answered for the first time."""
        return self._generation.number is not None and self._blocks.peek(ChainBuilder(self.layout).chain) is not None

    # Requests

    def on_new(self, request: Any) -> None:
        if not self._requests:
            self._are_workers_away = False  # Without requests no step has reported that the daemon is back.
        generation = self._generation.number
        why = refusal_of(request) if generation is not None else "the key generation is not known yet"
        given = self._parameters_of(request)
        builder = ChainBuilder(
            self.layout,
            salt=salt_of(request, generation or 0),
            extra_of_block=extra_of_block(request, self.layout.block_tokens),
        )
        name = response_id(request.request_id, is_randomized=not envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION)
        state = self._requests[request.request_id] = _Request(
            request,
            builder,
            given.load,
            given.session_id,
            given.hints,
            RequestProgress(name, self._clock.now_s()),
            may_load=not why and given.may_load and not request.skip_reading_prefix_cache,
            may_save=not why and given.may_save and self._settings.save and not given.hints.do_not_keep,
            is_hinted=not why and self._settings.hints,
        )
        if generation is None:
            state.progress.ends_as(Outcome.BREAKER_OPEN, why)
        elif not state.may_load:
            asked = "the request's own parameters say so" if given.may_load else "its `may_load` is false"
            state.progress.ends_as(Outcome.MISS, f"it was not looked up: {why or asked}")
        if why:
            log.debug("request %s is neither looked up nor saved: %s", request.request_id, why)
            return
        self._extend(state)
        if state.may_load:
            self._look_up(state)
            self._wait_in_queue(state)

    def _wait_in_queue(self, state: _Request, *, is_first: bool = False) -> None:
        """Let the daemon know that a request waits which will read blocks."""
        session = self._session_of(state)
        # A session names the partial block behind the last whole one too. Only one that exists, in an earlier turn.
        reads = session if self._sessions.is_named(state.session_id) else state.builder.chain or session
        if reads is None or not state.is_hinted:
            return
        state.is_waiting = True
        priority = state.hints.priority or (-state.request.priority if self._has_priorities else 0)
        self._queue.arrived(state.request.request_id, reads, priority, is_first=is_first)

    def _leave_queue(self, state: _Request) -> None:
        if state.is_waiting:
            state.is_waiting = False
            self._queue.left(state.request.request_id)

    def _session_of(self, state: _Request) -> Session | None:
        return self._client.session(self.layout, state.session_id) if state.session_id else None

    def _parameters_of(self, request: Any) -> RequestParameters:
        given, ignored = parameters_of(request, self._settings.load)
        for each in ignored:
            self._lines.warning("a request's parameter is ignored: %s", each.why, kind=each.name)
        return given

    def _extend(self, state: _Request) -> None:
        """Hash the tokens that are new since the last call."""
        tokens, known = state.request.all_token_ids, state.builder.token_count
        if len(tokens) > known:
            state.builder.extend(tokens[known:] if known else list(tokens))

    def _look_up(self, state: _Request) -> None:
        """Begin another attempt."""
        state.attempt, state.has_loaded = state.request.num_preemptions, False
        self._lookups.begin(state, is_daemon_away=self._are_workers_away)

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens after `computed_tokens` to load: None if the daemon has not answered yet, and whether between
        steps.
        """
        state = self._requests.get(request.request_id)
        if state is None:
            return 0, False
        state.own_tokens = computed_tokens
        if not state.may_load:
            return 0, False
        if request.num_preemptions != state.attempt:
            self._lookups.drop(state)
            self._extend(state)
            self._look_up(state)
        if state.has_loaded:
            return 0, False
        if not state.is_answered and not self._lookups.poll(state):
            return None, False
        if state.found is None:
            return 0, False
        if self._lookups.is_too_old(state):
            self._lookups.drop(state)
            self._look_up(state)
            return (0, False) if state.is_answered else (None, False)
        tokens = min(state.found.lease.hit_tokens, request.num_tokens - 1) - computed_tokens
        chosen = self._plan(state, tokens, computed_tokens) if tokens > 0 else None
        state.progress.planned(chosen, computed_tokens, self._clock.now_s())
        if chosen is None:
            return 0, False
        if chosen.kind is Kind.RECOMPUTE:
            self._stats.count(computed_hits=1)
            self._lookups.drop(state)
            return 0, False
        return tokens, self._mode(state) is LoadMode.BETWEEN_STEPS

    def _plan(self, state: _Request, tokens: int, computed_tokens: int) -> Plan:
        """Whether to load these stored tokens. With `auto`: if they are there sooner, by what was measured."""
        assert state.found is not None
        if self._queue.is_in_dram(state.request.request_id):  # Since the lookup they may have been promoted.
            state.tier = state.progress.tier = "dram"
        if state.mode is not LoadMode.AUTO:
            return Plan(Kind.LOAD, 0, tokens, {}, f"`load` is {state.mode}: what is stored is loaded")
        return plan(
            self._rates,
            tokens,
            state.request.num_tokens - computed_tokens - tokens,
            self.layout.bytes_per_token // min(self._workers, self.layout.kv_heads),
            state.tier,
            self.layout.block_tokens,
            may_mix=False,
        )

    def _mode(self, state: _Request) -> LoadMode:
        if self._loads_between_steps and state.mode not in (LoadMode.AUTO, LoadMode.BETWEEN_STEPS):
            self._lines.info(
                'with sliding windows, or several KV cache groups, "load": "%s" is "between_steps": within a step vLLM '
                "takes no report of a failed load",
                state.mode.value,
                kind="mode",
            )
            state.mode = LoadMode.BETWEEN_STEPS
        return LoadMode.BETWEEN_STEPS if state.mode is LoadMode.AUTO else state.mode

    def allocated(self, request: Any, page_ids: tuple[list[int], ...], external_tokens: int) -> None:
        """vLLM has given a request its pages, and expects so many tokens to be loaded into them."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        if not external_tokens:
            if state.is_answered:
                self._lookups.drop(state)
            return
        self._leave_queue(state)
        mode = self._mode(state)
        if state.found is None:  # Not to be expected. A ticket that no daemon takes fails the load.
            raise RuntimeError(f"{external_tokens} tokens are to be loaded, and none were found")
        total = min(state.found.lease.hit_tokens, request.num_tokens - 1)
        first = total - external_tokens
        pages, begins = self._pages.to_load(page_ids, first, total)
        order = PageLoadOrder(
            request.request_id,
            state.attempt,
            state.found.ticket,
            first,
            total,
            pages,
            begins,
            mode,
            dict(request.trace_headers) if request.trace_headers else None,
        )
        self._orders.loads.append(order)
        state.is_loading = mode is LoadMode.BETWEEN_STEPS
        self._stats.count(hits=1, hit_tokens=external_tokens)
        state.has_loaded = True
        state.progress.load_tokens = external_tokens
        self._lookups.drop(state, is_ticket_used=True)  # The ticket holds the blocks until the workers have them.

    def finished(self, request: Any, page_ids: tuple[list[int], ...]) -> None:
        """A request has ended; vLLM frees its pages after this."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return
        self._lookups.drop(state)
        if not state.is_reported:
            self._report(state)
        if state.is_loading:
            self._orders.cancelled.append(request.request_id)
        elif state.may_save:
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            self._orders.saves += self._saves.at_end(state, page_ids)
            if state.session_id and computed >= request.num_prompt_tokens:  # Else a part of it, which would shorten it.
                self._extend(state)
                self._sessions.turn_ended(state.session_id, state.builder.prefix(min(computed, request.num_tokens)))
        if state.session_id and (state.hints.session_ended or state.hints.do_not_keep):
            self._sessions.ended(state.session_id)
        self._pages.forget(request.request_id)
        self._leave_queue(state)
        if state.is_hinted:
            self._report_turn(state)

    def _report_turn(self, state: _Request) -> None:
        """Report the answer, and what the application knows."""
        self._extend(state)
        request, session = state.request, self._session_of(state)
        if (reads := state.builder.chain or session) is None:
            return
        why = str(request.get_finished_reason())
        self._queue.ended(reads, session, request.num_prompt_tokens, request.num_output_tokens, why, state.hints)

    def _report(self, state: _Request) -> None:
        """Report how a request went up to its first token. Does not wait."""
        state.is_reported = True
        request, progress, now_s = state.request, state.progress, self._clock.now_s()
        has_token = bool(request.num_output_tokens)
        if has_token:
            loaded, own = progress.load_tokens, state.own_tokens
            count_first_token(
                self._stats.add,
                progress.plan,
                now_s - progress.planned_at_s,
                loaded=loaded,
                computed=request.num_prompt_tokens - loaded - own,
                engine_cache=own,
            )
        report = progress.report(request.num_prompt_tokens, now_s, has_token=has_token)
        self._client.report_request(report)

    # Steps

    def orders_of_step(self, scheduled: Any) -> StepOrders:
        """What the workers do in this step. The next call has other orders."""
        self._lookups.end_late()
        size, kept = self.layout.block_tokens, self._pages.begin_step()
        computing: list[tuple[int, int]] = []
        for request_id, new_tokens in scheduled.num_scheduled_tokens.items():
            state = self._requests.get(request_id)
            if state is None:
                continue
            request = state.request
            if state.is_waiting:
                self._leave_queue(state)
            if not state.is_reported and request.num_output_tokens:
                self._report(state)
            computing.append((new_tokens, request.num_computed_tokens))
            if state.began is None or state.began[0] != request.num_preemptions:
                state.began = request.num_preemptions, request.num_computed_tokens - request.num_in_flight_tokens
            whole_tokens = (request.num_computed_tokens + new_tokens) // size * size
            if state.may_save and whole_tokens > state.saved_tokens and not self._are_workers_away:
                self._orders.saves += self._saves.of_step(state)
        for request_id in kept:
            if request_id not in scheduled.num_scheduled_tokens and (state := self._requests.get(request_id)):
                self._orders.saves += self._saves.of_step(state)
        for request_id in scheduled.preempted_req_ids or ():
            if (state := self._requests.get(request_id)) is not None and state.may_load:
                self._wait_in_queue(state, is_first=True)
        self._queue.send()
        is_measured = (
            not self._is_async and not self._orders.loads and sum(new for new, _ in computing) >= _MEASURED_MIN
        )
        self._step = (self._clock.now_s(), computing) if is_measured else None
        return self.take_orders()

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
        for load in report.loaded:
            if (state := self._requests.get(load.request_id)) is not None:
                self._rates.observe_load(load.size_bytes, load.seconds, state.tier)
                state.progress.loads.append(load)
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
        valid: dict[str, int] = {}  # Several ranks may have failed: what all of them have counts.
        for failed in report.failed if report is not None else ():
            valid[failed.request_id] = min(failed.valid_tokens, valid.get(failed.request_id, failed.valid_tokens))
        for request_id, state in self._requests.items():
            shared = self._pages.of(request_id)[0]
            if request_id in valid:
                shared = shared[: valid[request_id] // self._page_tokens]
            if not bad_pages.isdisjoint(shared):
                state.may_save = False

    def _on_failed(self, failed: FailedLoad) -> None:
        if failed.is_unanswered:
            self._breaker.record(False)
        state = self._requests.get(failed.request_id)
        if state is not None:
            state.progress.load_failed(failed.valid_tokens, failed.reason)
            state.may_load = False  # The daemon has the blocks, or not: a second try would cost as much again.
            state.saved_tokens = min(state.saved_tokens, failed.valid_tokens)

    def reset(self) -> bool:
        """Begin a new generation of keys: what was computed so far is never found again. Whether the daemon confirms.

        If it does not, nothing is looked up or saved until it has begun one. Requests that run keep what they have.
        """
        for state in self._requests.values():  # vLLM may compute them again, with other weights.
            self._lookups.drop(state)
            state.may_load = state.may_save = False
            if not state.has_loaded:
                state.progress.ends_as(Outcome.MISS, "the prefix cache was reset")
        return self._generation.begin(_RESET_WAIT_S)

    def take_stats(self) -> TransferStats | None:
        """What was counted since the last call."""
        self._breaker_stats.count_into(self._stats)
        stats, self._stats = self._stats, TransferStats()
        return None if stats.is_empty() else stats

    def count_error(self) -> None:
        self._stats.count(errors=1)

    def fail_load(self, request: Any, page_ids: tuple[list[int], ...], external_tokens: int) -> None:
        """vLLM expects tokens that are not ordered: have the workers mark their pages as bad."""
        state = self._requests.get(request.request_id)
        total = min(len(page_ids[0]) * self._page_tokens, request.num_tokens)
        pages, begins = self._pages.to_load(page_ids, 0, total)
        is_async = self._loads_between_steps or (state is not None and self._mode(state) is LoadMode.BETWEEN_STEPS)
        mode = LoadMode.BETWEEN_STEPS if is_async else LoadMode.WHOLE
        self._orders.loads = [order for order in self._orders.loads if order.request_id != request.request_id]
        self._orders.loads.append(
            PageLoadOrder(request.request_id, request.num_preemptions, b"", 0, total, pages, begins, mode)
        )
        if state is not None:
            state.has_loaded, state.may_load = True, False

    def orders_after_error(self) -> StepOrders:
        """What `orders_of_step` returns, if that has raised."""
        self._pages.begin_step()  # What was kept for this step may be others' pages in the next one.
        return self.take_orders()

    def take_orders(self) -> StepOrders:
        """The orders so far."""
        orders, self._orders = self._orders, StepOrders()
        return orders

    def close(self) -> None:
        self._generation.close()
        self._sessions.close()
        self._breaker.close(0.0)
        self._client.close()
