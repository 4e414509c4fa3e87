"""How long requests wait in the queue: for as long, what is not in DRAM can still be read in time."""

from __future__ import annotations

import math

import numpy as np

from kvservice.policy.survival import BIN_COUNT, Floats, bin_of, places_of

_MEMORY = 1024.0  # Requests.
_LEAST = 1e-3


class QueueWaits:
    """The distribution of the last waits."""

    def __init__(self, row_count: int) -> None:
        self._since_s = np.full(row_count, math.nan)
        self._waits = [0.0] * BIN_COUNT
        self._weight = 1.0  # Of the next one: the others fade beside it.
        self._shorter: Floats = np.ones(BIN_COUNT + 1)

    def queued(self, row: int, now_s: float) -> None:
        self._since_s[row] = now_s

    def served(self, row: int, now_s: float) -> None:
        wait_s = now_s - self._since_s.item(row)
        if wait_s == wait_s:
            self._waits[bin_of(wait_s)] += self._weight
            self._weight *= 1 + 1 / _MEMORY
            self._since_s[row] = math.nan

    def forgotten(self, row: int) -> None:
        self._since_s[row] = math.nan

    def learn(self) -> None:
        """Puts what was seen into `shorter`."""
        waits = np.array(self._waits) / self._weight
        self._waits, self._weight = waits.tolist(), 1.0
        total = waits.sum()
        if total:
            self._shorter[1:] = np.cumsum(waits) / total
            self._shorter[0] = self._shorter[1] / 2

    def shorter(self, times_s: Floats) -> Floats:
        """The share of waits that are over before such a time is; never none."""
        places = places_of(times_s) + 0.5  # From the middle of a bin to its end, up to which its share counts.
        bins = places.astype(np.int64)
        share: Floats = self._shorter[bins] + (places - bins) * (self._shorter[bins + 1] - self._shorter[bins])
        return np.maximum(share, _LEAST)
