"""What loads and computing cost here, learned from each of them: the rates that `kvservice_api.cost.plan` asks.

rates = Rates()
rates.observe_prefill(new_tokens=900, context_tokens=0, seconds=1.4)       # after each forward over a prompt
rates.observe_load(size_bytes, seconds, "dram", "shm")                     # after each load

chosen = plan(rates, history_tokens=2048, new_tokens=40, bytes_per_token=46_080, tier="dram",
              transport="shm", block_tokens=256, layers=30)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvservice_adapter.fit import Fit

_MEMORY_S = 600.0
_FIXED_LOAD_S_MAX = 0.005
_RECENT_OVERHEADS = 5


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
