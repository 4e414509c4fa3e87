"""The price of a read from SSD, in hits: about 0 while the SSD is idle, 1 while it is fully used."""

from __future__ import annotations

import math

from kvservice.policy.items import Conditions

_LEAST, _MOST = 0.01, 1.0  # Price of reading an item of mean size, in hits.
_BUSY = 0.85  # The price rises while the SSD's busy share is above this.
_MEMORY_S = 60.0


class ReadPrice:
    """The present price, from the SSD's busy share of recent time."""

    def __init__(self, now_s: float) -> None:
        self._per_item = _LEAST
        self._mean_density = 1.0
        self._written_bytes = 0
        self._writing = 0.0  # The share of time in which the SSD writes.
        self._at_s = now_s

    @property
    def per_density(self) -> float:
        """The price in hits, times what a use saves per byte: divide it by what a use of the item saves per byte."""
        return self._per_item * self._mean_density

    def learn(self, conditions: Conditions, mean_density: float, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s > 0:
            wrote_s = (conditions.written_bytes - self._written_bytes) / conditions.ssd_bytes_per_s
            self._writing += (wrote_s / passed_s - self._writing) * -math.expm1(-passed_s / _MEMORY_S)
        self._written_bytes, self._at_s = conditions.written_bytes, now_s
        self._mean_density = mean_density
        busy = (conditions.read_busy + self._writing - _BUSY) / (1 - _BUSY)
        self._per_item = _LEAST * (_MOST / _LEAST) ** min(max(busy, 0.0), 1.0)
