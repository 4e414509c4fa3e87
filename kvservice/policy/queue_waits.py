"""The distribution of waits in the queue. An item can still be read from SSD in time while its request waits."""

from __future__ import annotations

import numpy as np

from kvservice.policy.survival import BIN_COUNT, Floats, bin_of

_MEMORY = 1024.0  # Requests after which a wait's weight has fallen to 1/e.
_GROWTH = 1 + 1 / _MEMORY
_LEAST = 1e-3


class QueueWaits:
    """The distribution of recent waits, with exponentially decreasing weights."""

    def __init__(self) -> None:
        self._since_s: dict[int, float] = {}  # Of the items that were queued, and not served since.
        self._waits = [0.0] * BIN_COUNT
        self._weight = 1.0  # Weight of the next wait. It grows, instead of all other weights decreasing.
        self._shorter: Floats = np.ones(BIN_COUNT + 1)
        self._in_bin: Floats = np.zeros(BIN_COUNT)  # The differences of `_shorter`.

    def queued(self, row: int, now_s: float) -> None:
        self._since_s[row] = now_s

    def served(self, row: int, now_s: float) -> None:
        since_s = self._since_s.pop(row, None)
        if since_s is not None:
            self._waits[bin_of(now_s - since_s)] += self._weight
            self._weight *= _GROWTH

    def forgotten(self, row: int) -> None:
        self._since_s.pop(row, None)

    def learn(self) -> None:
        """Update `shorter` with the waits that were recorded since the last call."""
        waits = np.array(self._waits) / self._weight
        self._waits, self._weight = waits.tolist(), 1.0
        total = waits.sum()
        if total:
            self._shorter[1:] = np.cumsum(waits) / total
            self._shorter[0] = self._shorter[1] / 2
            self._in_bin = np.diff(self._shorter)

    def shorter(self, places: Floats) -> Floats:
        """The share of waits that are shorter, at least `_LEAST`, by `places_of` the times. Same shape as `places`."""
        places = places + 0.5  # Shares are cumulative at the end of a bin, places are at its middle.
        bins = places.astype(np.int64)
        share: Floats = self._shorter[bins] + (places - bins) * self._in_bin[bins]
        return np.maximum(share, _LEAST)
