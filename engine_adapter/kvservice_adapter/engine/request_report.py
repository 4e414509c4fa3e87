"""How one request went: input for later plans, and a report to the daemon for `kvctl explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kvservice_adapter.engine.metrics import Add, count_first_token, not_counted
from kvservice_adapter.load import LoadReport
from kvservice_adapter.rates import Rates
from kvservice_api.cost import Kind, Plan
from kvservice_api.errors import KVError
from kvservice_client import Client, Outcome, RequestReport, Stats


class ReportedHistory(Protocol):
    """What a request reads of the history that its engine computes with."""

    @property
    def error(self) -> BaseException | None:
        """Why some of it was computed, and not loaded."""

    @property
    def recompute_s(self) -> float:
        """How long it took to compute it in place of loading it; 0 if it was loaded."""

    @property
    def lost_s(self) -> float:
        """How long forwards waited for it so far, also while it was computed in place of loading it."""

    @property
    def load_reports(self) -> Sequence[LoadReport]:
        """One per load, so far."""


class Request:
    """For the engine's thread. Costs microseconds; without a `request_id` no report is sent."""

    def __init__(self, client: Client, rates: Rates, request_id: str, add: Add = not_counted) -> None:
        """`add` counts into `ENGINE_METRICS`."""
        self._add = add
        self._client = client
        self._rates = rates
        self._request_id = request_id
        self._clock = client.clock
        self._began_s = self._clock.now_s()
        self._moved_before = moved_bytes(client.stats())
        self._has_first_token = False
        self.rows = 1
        self.lookup_s: float | None = None
        self.head_s: float | None = None
        self.plan: Plan | None = None
        self.tier = ""
        self.tokens = 0  # How many stored tokens the lookup found.
        self.not_found: KVError | None = None
        self.was_asked = True  # The daemon.

    @property
    def transport(self) -> str:
        """The transports that moved bytes since the request began: "shm", "bulk", "grpc+shm" and so on; "" for none."""
        return transport_of(self._moved_before, moved_bytes(self._client.stats()))

    def looked_up(self) -> None:
        self.lookup_s = self._clock.now_s() - self._began_s

    def forward_ended(self, history: ReportedHistory, new_tokens: int, context_tokens: int, seconds: float) -> None:
        """The model has computed so many tokens; the first time, that was the request's prefill."""
        if self.rows == 1 and new_tokens > 1 and not history.recompute_s:
            self._rates.observe_prefill(new_tokens, context_tokens, seconds)
        if self._has_first_token:
            return
        self._has_first_token = True
        loaded, again = self._loaded_tokens(history), self.tokens if history.recompute_s else 0
        head_tokens = self.plan.compute_tokens if self.plan is not None and self.plan.kind is Kind.MIXED else 0
        count_first_token(
            self._add,
            self.plan,
            (self.head_s or 0.0) + history.lost_s + seconds,
            loaded=loaded,
            computed=new_tokens * self.rows + (again or head_tokens),
        )
        if self._request_id:
            self._client.report_request(self._report(history, new_tokens))

    def _loaded_tokens(self, history: ReportedHistory) -> int:
        return self.plan.load_tokens if self.plan is not None and not history.recompute_s else 0

    def _report(self, history: ReportedHistory, new_tokens: int) -> RequestReport:
        chosen = self.plan
        loads = history.load_reports
        loaded_bytes = sum(load.size_bytes for load in loads)
        again_s = history.recompute_s
        outcome, why = self._outcome(history)
        return RequestReport(
            request_id=self._request_id,
            outcome=outcome,
            outcome_reason=why,
            history_tokens=self.tokens,
            new_tokens=new_tokens,
            loaded_tokens=self._loaded_tokens(history),
            computed_tokens=chosen.compute_tokens if chosen is not None and not again_s else self.tokens,
            loaded_bytes=loaded_bytes,
            tier=self.tier,
            transport=self.transport if loaded_bytes else "",
            began_s=self._began_s,
            lookup_s=self.lookup_s,
            first_layer_s=min((load.first_layer_s for load in loads if load.layers), default=None),
            load_s=max((load.total_s for load in loads), default=None),
            waited_s=sum(sum(load.waited_s) for load in loads) if loads else None,
            head_s=again_s or self.head_s,
            first_token_s=self._clock.now_s() - self._began_s,
            **fields_of_plan(chosen),
        )

    def _outcome(self, history: ReportedHistory) -> tuple[Outcome, str]:
        if not self.was_asked:
            return Outcome.BREAKER_OPEN, ""
        if history.error is not None:
            return Outcome.FAILED_OVER, _reason(history.error)
        if self.not_found is not None:
            return Outcome.FAILED_OVER, self.not_found.reason
        return (Outcome.DONE, "") if self.plan is not None else (Outcome.MISS, "")


def fields_of_plan(plan: Plan | None) -> dict[str, Any]:
    """A report's fields on what was planned; None if nothing was."""
    if plan is None:
        return {}
    estimate_s = {kind.value: seconds for kind, seconds in plan.estimate_s.items()}
    return {"plan": plan.kind.value, "plan_reason": plan.reason, "estimate_s": estimate_s}


def moved_bytes(stats: Stats) -> dict[str, int]:
    """Of loads, by transport: bytes that were copied, or given in place."""
    return {name: each.loaded_bytes + each.viewed_bytes for name, each in stats.transports.items()}


def transport_of(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    return "+".join(sorted(name for name, size_bytes in now.items() if size_bytes > before.get(name, 0)))


def _reason(error: BaseException) -> str:
    return error.reason if isinstance(error, KVError) else str(error)
