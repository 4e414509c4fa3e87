"""What a hint is worth: how soon the request comes after it, and how often it does not, as it was seen to be.

Wrong hints show as time at risk in which nothing came, so that an application that cries wolf is believed less.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy.base import Hint
from kvservice.policy.items import HINTS
from kvservice.policy.return_times import RECENCY
from kvservice.policy.survival import BIN_COUNT, Floats, Survival, bin_of

_MEMORY = 2048.0  # Returns.
ENDED = HINTS.index(Hint.ENDED) - 1
#: Before anything was seen: four times as likely as without a hint; who has ended does not come back.
_PRIORS: tuple[Floats, ...] = (4 * RECENCY, 4 * RECENCY, np.full(BIN_COUNT, 1e-9))
_DOUBT = 16.0  # Returns that came without a hint before anything was seen.
_SOON = 0.1  # The share of requests that come sooner after a hint than they are expected.


class HintTimes:
    """The last hint of each item since its last use, and the hazard of its return by the time since then."""

    def __init__(self, row_count: int) -> None:
        self.hazards: Floats = np.stack(_PRIORS)
        self.kind = np.full(row_count, -1, np.int64)  # Its place in HINTS, less one. -1: none.
        self.since_s = np.full(row_count, math.nan)
        self._since_events = np.zeros(row_count, np.int64)
        self._survivals = [Survival(1, prior, _MEMORY) for prior in _PRIORS]
        self._announced = 0.0
        self._returns = _DOUBT

    def hinted(self, row: int, hint: Hint, now_s: float) -> None:
        self.ceased(row, now_s)
        kind = HINTS.index(hint) - 1
        self.kind[row] = kind
        self.since_s[row] = now_s
        self._since_events[row] = self._survivals[kind].events

    def came(self, row: int, hazard: float, reading_s: float, now_s: float) -> None:
        """The request came. Without the hint its chance would have been `hazard`; its bytes take `reading_s` to read."""
        kind = self.kind.item(row)
        announced = 0.0
        if kind >= 0:
            age_s = now_s - self.since_s.item(row)
            self._survivals[kind].came(0, age_s)
            if age_s >= reading_s:
                announced = max(0.0, 1 - hazard / self.hazards[kind, bin_of(age_s)].item())
        self._announced += (announced - self._announced / _MEMORY) if self._returns >= _MEMORY else announced
        self._returns = min(self._returns + 1, _MEMORY)
        self.kind[row] = -1

    def ceased(self, row: int, now_s: float) -> None:
        """Nobody waits for what the last hint announced any more."""
        kind = self.kind.item(row)
        if kind >= 0:
            self._survivals[kind].ceased(0, now_s - self.since_s.item(row))
            self.kind[row] = -1

    @property
    def surprising(self) -> float:
        """The share of returns that no hint announced in time."""
        return max(1 - self._announced / self._returns, 1 / _MEMORY)

    def soonest_s(self, hint_kind: int) -> float:
        """The time from such a hint within which few of the requests that it announced come."""
        return self._survivals[hint_kind].quantile(_SOON)

    def learn(self, waiting: Rows, now_s: float) -> None:
        """Puts what was seen into `hazards`. `waiting` are all rows that are waited for, hinted or not."""
        kinds = self.kind[waiting]
        for kind, survival in enumerate(self._survivals):
            rows = waiting[kinds == kind]
            weights = survival.weight(self._since_events[rows])
            ages_s = now_s - self.since_s[rows]
            self.hazards[kind] = survival.hazards(np.zeros(len(rows), np.int64), ages_s, weights)[0]

