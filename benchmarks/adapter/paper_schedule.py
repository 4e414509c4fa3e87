"""How long a prefill takes with layer-wise pre-loading: the paper's closed forms, and a simulation on a virtual clock.

The formulas are those of CachedAttention (arXiv 2403.19708, section 3.2.1). A history of n layers is loaded in n x l
seconds, and the new tokens are computed in n x c. k layers may be loaded before the request runs. Times may be floats
or Fractions; with Fractions results are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kvservice_adapter.schedule import ReadBuffer, Time


def prefill_without_preloading(layers: int, load_s: Time, compute_s: Time) -> Time:
    """Load all layers, then compute: n (l + c). Times of one layer."""
    return layers * (load_s + compute_s)


def prefill_with_preloading(layers: int, load_s: Time, compute_s: Time, buffer_layers: int) -> Time:
    """Layer i+1 is loaded while layer i is computed, after `buffer_layers` layers that were loaded before.

    max(n c, (n-k) l + c). Without a buffer the first layer's load is exposed: max(l + n c, n l + c). Times of
    one layer.
    """
    if buffer_layers:
        return max(layers * compute_s, (layers - buffer_layers) * load_s + compute_s)
    return max(load_s + layers * compute_s, layers * load_s + compute_s)


def read_buffer_bytes(
    bytes_per_s: Time, load_s_per_token: Time, history_tokens: int, prefill_s_per_token: Time, new_tokens: int
) -> Time:
    """S_buf = B (T_load L_hist - T_pref L_new); 0 where computing is the slower side. Times over all layers.

    This is how much cannot be loaded while the new tokens are computed. `perfect_buffer_layers` gives it in whole
    layers, and counts besides that the last layer must be loaded before it is computed: bytes that are loaded
    during the last layer's computing do not help.
    """
    return max(0 * bytes_per_s, bytes_per_s * (load_s_per_token * history_tokens - prefill_s_per_token * new_tokens))


@dataclass(frozen=True, slots=True)
class Timeline:
    """A prefill on a virtual clock."""

    total_s: float | Fraction  # From when the request runs to the end of the last layer's computing.
    waited_s: tuple[float | Fraction, ...]  # By layer: how long computing waited for it.

    @property
    def stall_s(self) -> float | Fraction:
        return sum(self.waited_s)


def simulate(layers: int, load_s: Time, compute_s: Time, buffer_layers: int) -> Timeline:
    """One prefill by `ReadBuffer`, event by event. The request runs once the buffer is full. Times of one layer."""
    buffer = ReadBuffer(layers, buffer_layers)
    while buffer.may_load:
        buffer.loaded += 1
    buffer.is_running = True
    now = idle_since = 0 * load_s
    load_ends: Time | None = None
    compute_ends: Time | None = None
    waited = []
    while buffer.taken < layers or compute_ends is not None:
        if load_ends is None and buffer.may_load:
            load_ends = now + load_s
        if compute_ends is None and buffer.loaded > buffer.taken:
            waited.append(now - idle_since)
            buffer.taken += 1
            compute_ends = now + compute_s
            continue
        now = min(end for end in (load_ends, compute_ends) if end is not None)
        if load_ends == now:
            buffer.loaded, load_ends = buffer.loaded + 1, None
        if compute_ends == now:
            compute_ends, idle_since = None, now
    return Timeline(now, tuple(waited))
