"""When layers are loaded: the read buffer's rule, and what the paper says comes of it."""

from __future__ import annotations


class ReadBuffer:
    """The rule of layer-wise pre-loading: how far loading may run ahead of computing.

    Before the request runs, `buffer_layers` layers may come in (k of the paper). Once it runs, loading goes
    on while fewer than k layers, or one where k is 0, are loaded and not yet taken.
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
