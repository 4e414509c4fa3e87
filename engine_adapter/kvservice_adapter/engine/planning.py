"""Plans how a request gets its stored tokens, from the measured times of loads and forwards."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.load import LoadReport
from kvservice_adapter.rates import Rates
from kvservice_adapter.schedule import perfect_buffer_layers
from kvservice_api.cost import Plan, plan
from kvservice_api.errors import KVError
from kvservice_api.layout import Layout

_BUFFER_LAYERS_MIN = 2  # Two hide the time of the hand-over between threads.


class LoadPlanner:
    """Plans the loads of one engine. Any thread may call it; no method waits."""

    def __init__(self, layout: Layout, rates: Rates, breaker: Breaker) -> None:
        self._layout = layout
        self._rates = rates
        self._breaker = breaker
        self._transport = ""  # Of the last load.

    def plan(self, stored_tokens: int, new_tokens: int, tier: str, *, may_mix: bool) -> Plan:
        """The fastest way to have `stored_tokens` that are in `tier` and the `new_tokens` after them.

        Sequences of a batch count as if they were computed one after another. Without `may_mix` all of the stored
        tokens are loaded, or none.
        """
        return plan(
            self._rates,
            stored_tokens,
            new_tokens,
            self._layout.bytes_per_token,
            tier,
            self._layout.block_tokens,
            transport=self._transport,
            layers=self._layout.layers,
            may_mix=may_mix,
        )

    def buffer_layers(self, load_tokens: int, new_tokens: int, context_tokens: int, tier: str) -> int:
        """How many layers to load ahead, so that computing never waits."""
        layers = self._layout.layers
        load_s = self._rates.load_s(load_tokens * self._layout.bytes_per_token, tier, self._transport)
        compute_s = self._rates.prefill_s(new_tokens, context_tokens)
        if load_s is None or compute_s is None:
            return layers
        return max(_BUFFER_LAYERS_MIN, perfect_buffer_layers(layers, load_s, compute_s))

    def load_ended(
        self, reports: Sequence[LoadReport], error: BaseException | None, lost_s: float, tier: str, transport: str
    ) -> bool:
        """Learn from a load: how it went, why it failed if it did, and how long forwards waited for it.

        Returns whether it was late, so that its thread may still be waiting for the daemon.
        """
        is_late = error is not None and (not isinstance(error, KVError) or not answered(error))
        self._breaker.record(not is_late)
        self._transport = transport or self._transport
        for report in reports:
            if report.size_bytes:
                seconds = report.busy_s if error is None else max(report.busy_s, lost_s)
                self._rates.observe_load(report.size_bytes, seconds, tier, self._transport)
        return is_late
