"""When layers are loaded: the read buffer's rule, and how long a prefill takes by it.

The formulas are those of CachedAttention (arXiv 2403.19708, section 3.2.1, "Layer-wise pre-loading"). A history
of n layers is loaded in n x l seconds, and the new tokens are computed in n x c. k layers may be loaded before the
request runs. Times may be floats or Fractions; the latter stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import TypeVar

Time = TypeVar("Time", float, Fraction)


class ReadBuffer:
    """The rule of layer-wise pre-loading: how far loading may run ahead of computing.

    Before the request runs, k layers may be loaded. Once it runs, loading goes on while fewer than k layers,
    or one where k is 0, are loaded and not yet taken.
    """

    def __init__(self, layer_count: int, buffer_layers: int) -> None:
        self.layer_count = layer_count
        self.buffer_layers = buffer_layers
        self.loaded = 0
        self.taken = 0
        self.is_running = False

    @property
    def may_load(self) -> bool:
        """Whether the next layer may be loaded now."""
        ahead_max = max(1, self.buffer_layers) if self.is_running else self.buffer_layers
        return self.loaded < self.layer_count and self.loaded - self.taken < ahead_max


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


def perfect_buffer_layers(layers: int, load_s: Time, compute_s: Time) -> int:
    """The least k with which computing never waits: ceil(n - (n-1) c / l), and at least 1 of what is loaded at all.

    Times of one layer, or of all.
    """
    if not load_s:
        return 0
    return max(1, ceil(layers - (layers - 1) * compute_s / load_s))


def read_buffer_bytes(
    bytes_per_s: Time, load_s_per_token: Time, history_tokens: int, prefill_s_per_token: Time, new_tokens: int
) -> Time:
    """S_buf = B (T_load L_hist - T_pref L_new); 0 where computing is the slower side. Times over all layers.

    This is how much cannot be loaded while the new tokens are computed. In whole layers it is
    `perfect_buffer_layers`, which counts besides that the last layer has to be there before it is computed:
    what is loaded during the last layer's computing is of no use.
    """
    return max(0 * bytes_per_s, bytes_per_s * (load_s_per_token * history_tokens - prefill_s_per_token * new_tokens))


@dataclass(frozen=True, slots=True)
class Timeline:
    """A prefill on a virtual clock."""

    total_s: float | Fraction  # From when the request runs to the end of the last layer's computing.
    waited_s: tuple[float | Fraction, ...]  # By layer: how long computing stood still for it.

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
