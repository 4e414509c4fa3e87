"""Load a history, compute it again, or both at once: decided for each request from what was measured.

    rates = Rates()
    rates.observe_prefill(new_tokens=900, context_tokens=0, seconds=1.4)       # after each forward over a prompt
    rates.observe_load(size_bytes, seconds, "dram", "shm")                     # after each load

    chosen = plan(rates, history_tokens=2048, new_tokens=40, bytes_per_token=46_080, tier="dram",
                  transport="shm", block_tokens=256, layers=30)
    chosen.kind, chosen.compute_tokens, chosen.load_tokens, chosen.estimate_s, chosen.reason

The mixed plan is that of Cake (ICML '25): the history's first `compute_tokens` are computed while the
blocks after them are loaded.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import ge

from kvservice_adapter.fit import Fit

_MEMORY_S = 600.0
_FIXED_LOAD_S_MAX = 0.005
_RECENT_OVERHEADS = 5
_LEARN_S_MIN = 0.005  # A history that is computed faster than this is not loaded just to measure loads.
_MARGIN = 0.05  # The mixed plan must be faster by this share, because more can fail in it.


class Kind(StrEnum):
    """How a history gets into the cache."""

    LOAD = "load"
    RECOMPUTE = "recompute"
    MIXED = "mixed"


class Rates:
    """What loads and computing cost here, learned from each of them. Thread-safe; at most a few hundred numbers.

    Loads by another transport, or from another tier, are measured apart. A load takes a fixed time and one that
    grows with its bytes. Computing `n` new tokens that attend to `c` earlier ones takes

        a + b * n + g * n * (c + n / 2)

    because each forward has a fixed cost, each token its matrices, and each pair of tokens its attention.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, memory_s: float = _MEMORY_S) -> None:
        """After `memory_s` without a load, loads are measured again. Otherwise a transport that was slow once would
        never be tried again.
        """
        self._clock = clock
        self._memory_s = memory_s
        self._lock = threading.Lock()
        self._prefill = Fit()
        self._loads: dict[tuple[str, str], Fit] = {}
        self._loaded_at_s: dict[tuple[str, str], float] = {}
        self._overheads_s: list[float] = []

    def observe_load(
        self, size_bytes: int, seconds: float, tier: str, transport: str = "", loads_ahead: int = 0
    ) -> None:
        """A load of so many bytes took so long, from the call to the last byte, waits for the engine left out.

        `tier` is where the bytes were ("dram", "ssd", "mixed"), `loads_ahead` with how many others it shared the way.
        """
        key = (tier, transport)
        with self._lock:
            fit = self._loads.setdefault(key, Fit(_FIXED_LOAD_S_MAX))
            self._forget_what_is_old(key)
            self._loaded_at_s[key] = self._clock()
            fit.observe((size_bytes.bit_length(),), (float(size_bytes), 1.0), seconds / (1 + loads_ahead))

    def observe_prefill(self, new_tokens: int, context_tokens: int, seconds: float) -> None:
        """A forward over `new_tokens` tokens after `context_tokens` cached ones took `seconds`, without its waits."""
        self.observe_forward([(new_tokens, context_tokens)], seconds)

    def observe_forward(self, sequences: Sequence[tuple[int, int]], seconds: float) -> None:
        """As `observe_prefill`, for a forward over several sequences: (new tokens, context tokens) each."""
        terms = [_prefill_terms(*each) for each in sequences]
        new_tokens, context_tokens = (sum(each) for each in zip(*sequences, strict=True))
        order = (new_tokens.bit_length(), context_tokens.bit_length())
        total = (sum(each[0] for each in terms), 1.0, sum(each[2] for each in terms))
        with self._lock:
            self._prefill.observe(order, total, seconds)

    def observe_overhead(self, seconds: float) -> None:
        """A request with a load spent this much besides the load: on preparing it, and on making the cache."""
        with self._lock:
            self._overheads_s = [*self._overheads_s[1 - _RECENT_OVERHEADS :], seconds]

    def overhead_s(self) -> float:
        """0 until it is known."""
        with self._lock:
            known = sorted(self._overheads_s)
        return known[len(known) // 2] if known else 0.0

    def load_s(self, size_bytes: int, tier: str, transport: str = "", loads_ahead: int = 0) -> float | None:
        """How long a load will take, the overhead left out. None if none was measured lately."""
        key = (tier, transport)
        with self._lock:
            self._forget_what_is_old(key)
            fit = self._loads.get(key)
            if fit is None or not fit.is_known:
                return None
            return (1 + loads_ahead) * fit.seconds((float(size_bytes), 1.0)) if size_bytes else 0.0

    def prefill_s(self, new_tokens: int, context_tokens: int = 0) -> float | None:
        """How long computing so many tokens will take. None if it was never measured."""
        with self._lock:
            if not self._prefill.is_known:
                return None
            return self._prefill.seconds(_prefill_terms(new_tokens, context_tokens)) if new_tokens else 0.0

    def _forget_what_is_old(self, key: tuple[str, str]) -> None:
        if key in self._loaded_at_s and self._clock() - self._loaded_at_s[key] > self._memory_s:
            self._loads[key].forget()


def _prefill_terms(new_tokens: int, context_tokens: int) -> tuple[float, float, float]:
    return float(new_tokens), 1.0, new_tokens * (context_tokens + new_tokens / 2)


@dataclass(frozen=True, slots=True)
class Plan:
    """Tokens [0, `compute_tokens`) of the history are computed, the `load_tokens` after them are loaded.

    `estimate_s` is for each kind the time to the first token, from now on, as far as there is one: seconds.
    """

    kind: Kind
    compute_tokens: int
    load_tokens: int
    estimate_s: Mapping[Kind, float]
    reason: str


def plan(
    rates: Rates,
    history_tokens: int,
    new_tokens: int,
    bytes_per_token: int,
    tier: str,
    block_tokens: int,
    *,
    transport: str = "",
    layers: int = 1,
    loads_ahead: int = 0,
    edges: Sequence[int] = (),
    may_mix: bool = True,
) -> Plan:
    """The fastest way to a history of stored tokens and the `new_tokens` after it. It depends only on its arguments and
    `rates`.

    `bytes_per_token` is that of all layers together. The new tokens are computed layer by layer while the layers of
    the history are loaded; with `layers` 1, only once all is there. `edges` are where the history's blocks begin, if
    they are not all of `block_tokens`. Without measurements the history is loaded, which measures loads.
    """
    if not history_tokens:
        return Plan(Kind.RECOMPUTE, 0, 0, {}, "there is no history")
    overhead_s = rates.overhead_s()
    estimates = _Estimates(
        rates, history_tokens, new_tokens, bytes_per_token, tier, transport, layers, loads_ahead, overhead_s
    )
    recompute_s, load_s = estimates.recompute_s(), estimates.load_s()
    if load_s is None:
        by = f" by {transport}" if transport else ""
        if recompute_s is not None and recompute_s - (rates.prefill_s(new_tokens) or 0.0) < _LEARN_S_MIN:
            why = f"it is short, and no load from {tier}{by} was measured lately"
            return Plan(Kind.RECOMPUTE, history_tokens, 0, {Kind.RECOMPUTE: recompute_s}, why)
        known = {Kind.RECOMPUTE: recompute_s} if recompute_s is not None else {}
        return Plan(Kind.LOAD, 0, history_tokens, known, f"no load from {tier}{by} was measured lately: this one is")
    if recompute_s is None:
        return Plan(Kind.LOAD, 0, history_tokens, {}, "how fast this model computes was not measured yet")
    estimate_s = {Kind.LOAD: load_s, Kind.RECOMPUTE: recompute_s}
    pure = Kind.LOAD if load_s <= recompute_s else Kind.RECOMPUTE
    starts = [start for start in edges or range(0, history_tokens, block_tokens) if 0 < start < history_tokens]
    best = _best_head(starts, estimates) if may_mix else None
    if best is not None:
        head_tokens, estimate_s[Kind.MIXED] = best
        if estimate_s[Kind.MIXED] < (1 - _MARGIN) * estimate_s[pure]:
            why = f"the first {head_tokens} tokens are computed while the rest is loaded"
            return Plan(Kind.MIXED, head_tokens, history_tokens - head_tokens, estimate_s, why)
    if pure is Kind.RECOMPUTE:
        return Plan(pure, history_tokens, 0, estimate_s, "computing the history again is faster than its load")
    return Plan(pure, 0, history_tokens, estimate_s, "loading the history is faster than computing it again")


@dataclass(frozen=True, slots=True)
class _Estimates:
    """Seconds from now to the end of the forward over the new tokens."""

    rates: Rates
    history_tokens: int
    new_tokens: int
    bytes_per_token: int
    tier: str
    transport: str
    layers: int
    loads_ahead: int
    overhead_s: float

    def recompute_s(self) -> float | None:
        return self.rates.prefill_s(self.history_tokens + self.new_tokens)

    def load_s(self) -> float | None:
        """None if loads were not measured. Computing that was not measured counts as 0."""
        parts = self.parts_s(0)
        return None if parts is None else max(parts)

    def parts_s(self, head_tokens: int) -> tuple[float, float] | None:
        """When the new tokens would be there if loads took no time, and when if the head took none.

        Of n layers that each take l to load and c to compute, the last is computed after l + n c or n l + c,
        whichever is later.
        """
        size_bytes = (self.history_tokens - head_tokens) * self.bytes_per_token
        last_s, first_s = (
            self.rates.load_s(each, self.tier, self.transport, self.loads_ahead)
            for each in (size_bytes, size_bytes // self.layers)
        )
        if last_s is None or first_s is None:
            return None
        head_s = self.rates.prefill_s(head_tokens) or 0.0
        new_s = self.rates.prefill_s(self.new_tokens, self.history_tokens) or 0.0
        loaded_s = max(first_s + new_s, last_s + new_s / self.layers)
        return self.overhead_s + head_s + new_s, self.overhead_s + loaded_s


def _best_head(starts: Sequence[int], estimates: _Estimates) -> tuple[int, float] | None:
    """The block's edge up to which to compute, and what that takes. None if there is no edge.

    A later edge makes the head's time longer and the rest's time shorter; the best edge makes them equal.
    """

    def parts_s(index: int) -> tuple[float, float]:
        return estimates.parts_s(starts[index]) or (math.inf, math.inf)

    if not starts:
        return None
    head_is_later = bisect_left(range(len(starts)), True, key=lambda index: ge(*parts_s(index)))
    around = {max(0, head_is_later - 1), min(head_is_later, len(starts) - 1)}
    takes_s, index = min((max(parts_s(index)), index) for index in around)
    return starts[index], takes_s
