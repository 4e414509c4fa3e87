"""Load a history, compute it again, or both at once: decided for each request from what both cost.

    chosen = plan(rates, history_tokens=2048, new_tokens=40, bytes_per_token=46_080, tier="dram",
                  transport="shm", block_tokens=256, layers=30)
    chosen.kind, chosen.compute_tokens, chosen.load_tokens, chosen.estimate_s, chosen.reason

Engine adapters ask it with the rates that they learned, the simulator with those of the simulated machine. It does no
I/O, knows no clock, and may be called from any thread.

The mixed plan is that of Cake (ICML '25): the history's first `compute_tokens` are computed while the
blocks after them are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

_LEARN_S_MIN = 0.005  # A history that is computed faster than this is not loaded just to measure loads.
_MARGIN = 0.05  # The mixed plan must be faster by this share, because more can fail in it.


class Kind(StrEnum):
    """How a history gets into the cache."""

    LOAD = "load"
    RECOMPUTE = "recompute"
    MIXED = "mixed"


class Costs(Protocol):
    """What loads and computing cost, in seconds."""

    def overhead_s(self) -> float:
        """What a request with a load spends besides the load. 0 if it is not known."""

    def load_s(self, size_bytes: int, tier: str, transport: str = "", loads_ahead: int = 0, /) -> float | None:
        """How long a load of so many bytes will take, the overhead left out. None if it is not known."""

    def prefill_s(self, new_tokens: int, context_tokens: int = 0, /) -> float | None:
        """How long computing so many tokens after `context_tokens` cached ones will take. None if it is not known."""


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
    rates: Costs,
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
    recompute_s = rates.prefill_s(history_tokens + new_tokens)
    size_bytes = history_tokens * bytes_per_token
    if rates.load_s(size_bytes, tier, transport, loads_ahead) is None:
        by = f" by {transport}" if transport else ""
        if recompute_s is not None and recompute_s - (rates.prefill_s(new_tokens) or 0.0) < _LEARN_S_MIN:
            why = f"it is short, and no load from {tier}{by} was measured lately"
            return Plan(Kind.RECOMPUTE, history_tokens, 0, {Kind.RECOMPUTE: recompute_s}, why)
        known = {Kind.RECOMPUTE: recompute_s} if recompute_s is not None else {}
        return Plan(Kind.LOAD, 0, history_tokens, known, f"no load from {tier}{by} was measured lately: this one is")
    if recompute_s is None:
        return Plan(Kind.LOAD, 0, history_tokens, {}, "how fast this model computes was not measured yet")
    overhead_s, new_s = rates.overhead_s(), rates.prefill_s(new_tokens, history_tokens) or 0.0

    def parts_s(head_tokens: int) -> tuple[float, float]:
        """When the new tokens would be there if loads took no time, and when if the head took none.

        Of n layers that each take l to load and c to compute, the last is computed after l + n c or n l + c,
        whichever is later.
        """
        rest_bytes = size_bytes - head_tokens * bytes_per_token
        loaded_s = (rates.load_s(rest_bytes, tier, transport, loads_ahead) or 0.0) + new_s / layers
        if layers > 1:
            first_s = rates.load_s(rest_bytes // layers, tier, transport, loads_ahead) or 0.0
            loaded_s = max(first_s + new_s, loaded_s)
        head_s = (rates.prefill_s(head_tokens) or 0.0) if head_tokens else 0.0
        return overhead_s + head_s + new_s, overhead_s + loaded_s

    load_s = max(parts_s(0))
    estimate_s = {Kind.LOAD: load_s, Kind.RECOMPUTE: recompute_s}
    pure = Kind.LOAD if load_s <= recompute_s else Kind.RECOMPUTE
    best = _best_head(_starts(history_tokens, block_tokens, edges), parts_s) if may_mix else None
    if best is not None:
        estimate_s[Kind.MIXED], head_tokens = best
        if estimate_s[Kind.MIXED] < (1 - _MARGIN) * estimate_s[pure]:
            why = f"the first {head_tokens} tokens are computed while the rest is loaded"
            return Plan(Kind.MIXED, head_tokens, history_tokens - head_tokens, estimate_s, why)
    if pure is Kind.RECOMPUTE:
        return Plan(pure, history_tokens, 0, estimate_s, "computing the history again is faster than its load")
    return Plan(pure, 0, history_tokens, estimate_s, "loading the history is faster than computing it again")


def _starts(history_tokens: int, block_tokens: int, edges: Sequence[int]) -> Sequence[int]:
    """Where blocks begin, without the first."""
    if edges:
        return [start for start in edges if 0 < start < history_tokens]
    return range(block_tokens, history_tokens, block_tokens)


def _best_head(starts: Sequence[int], parts_s: Callable[[int], tuple[float, float]]) -> tuple[float, int] | None:
    """What the best head takes, and how many tokens it has. None if there is no edge.

    A later edge makes the head's time longer and the rest's time shorter: the best edge is one of the two around the
    point where they are equal, and the search sees both.
    """
    best = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        head_s, loaded_s = parts_s(starts[middle])
        if head_s >= loaded_s:
            high = middle
            takes = head_s, starts[middle]
        else:
            low = middle + 1
            takes = loaded_s, starts[middle]
        if best is None or takes < best:
            best = takes
    return best
