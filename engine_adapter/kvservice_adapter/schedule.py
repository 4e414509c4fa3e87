"""When layers are loaded: the read buffer's rule, and how large the buffer must be.

The formula is that of CachedAttention (arXiv 2403.19708, section 3.2.1, "Layer-wise pre-loading"). A history
of n layers is loaded in n x l seconds, and the new tokens are computed in n x c. k layers may be loaded before the
request runs. Times may be floats or Fractions; the latter stay exact.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import TypeVar

Time = TypeVar("Time", float, Fraction)


class ReadBuffer:
    """The rule of layer-wise pre-loading: how far loading may run ahead of computing.

    Before the request runs, k layers may be loaded. Once it runs, loading continues while fewer than k layers,
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


def perfect_buffer_layers(layers: int, load_s: Time, compute_s: Time) -> int:
    """The least k with which computing never waits: ceil(n - (n-1) c / l), and at least 1 if anything is loaded.

    Times of one layer, or of all.
    """
    if not load_s:
        return 0
    return max(1, ceil(layers - (layers - 1) * compute_s / load_s))
