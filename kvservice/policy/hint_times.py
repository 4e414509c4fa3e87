"""What a hint is worth: how soon the request comes after it, and how often it does not, as it was seen to be.

Wrong hints show as time at risk in which nothing came, so that an application that cries wolf is believed less: the
more so where a return was unlikely anyway, as right after an answer.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy.base import Hint
from kvservice.policy.return_times import RECENCY
from kvservice.policy.survival import BIN_COUNT, WIDTHS, Floats, Survival, bin_of

NONE = -1
_LIKELY = (0.5, 1.0)  # Between the three classes of a hint: how likely the return was without it, beside the average.
_CLASSES = len(_LIKELY) + 1
_ORDER = (Hint.TYPING, Hint.TOOL_CALL, Hint.ENDED)
ENDED = _ORDER.index(Hint.ENDED) * _CLASSES  # The first class of those who have ended.
CLASSES = len(_ORDER) * _CLASSES
_MEMORY = 2048.0  # Returns.
_SOON = 4 * RECENCY  # Before anything was seen: four times as likely as without a hint.
_GONE: Floats = np.full(BIN_COUNT, 1e-9)  # Who has ended does not come back.
_DOUBT = 16.0  # Returns that came without a hint before anything was seen.
_HARDLY = 0.02  # Returns, of one that ended.
_QUICK = 0.1  # The share of requests that come sooner after a hint than they are expected.


class HintTimes:
    """The last hint of each item since its last use, and the hazard of its return by the time since then."""

    def __init__(self, row_count: int) -> None:
        self._survivals = {hint: Survival(_CLASSES, _GONE if hint is Hint.ENDED else _SOON, _MEMORY) for hint in _ORDER}
        self.hazards: Floats = np.repeat([_SOON, _SOON, _GONE], _CLASSES, axis=0)
        self.in_class = np.full(row_count, NONE, np.int64)
        self.since_s = np.full(row_count, math.nan)
        self._since_events = np.zeros(row_count, np.int64)
        self.expected: dict[int, None] = {}  # Items with a hint that something comes, and no reason yet to doubt it.
        self._announced = 0.0
        self._returns = _DOUBT
        self.soonest_s: Floats = np.zeros(CLASSES)  # Few of the requests that a hint announces come sooner.

    def hinted(self, row: int, hint: Hint, likely: float, now_s: float) -> None:
        """`likely`: the hazard of a return before the hint came, beside the average."""
        self.ceased(row, now_s)
        self.in_class[row] = _ORDER.index(hint) * _CLASSES + (likely >= _LIKELY[0]) + (likely >= _LIKELY[1])
        self.since_s[row] = now_s
        self._since_events[row] = self._survivals[hint].events
        if hint is not Hint.ENDED:
            self.expected[row] = None

    def came(self, row: int, hazard: float, reading_s: float, now_s: float) -> None:
        """The request came. Without the hint the chance was `hazard`; its bytes take `reading_s` to read."""
        in_class = self.in_class.item(row)
        announced = 0.0
        if in_class != NONE:
            age_s = now_s - self.since_s.item(row)
            self._survivals[_ORDER[in_class // _CLASSES]].came(in_class % _CLASSES, age_s)
            if age_s >= reading_s:
                announced = max(0.0, 1 - hazard / self.hazards.item(in_class, bin_of(age_s)))
            self._forget(row)
        if self._returns >= _MEMORY:
            self._announced *= 1 - 1 / _MEMORY
        else:
            self._returns += 1
        self._announced += announced

    def ceased(self, row: int, now_s: float) -> None:
        """Nobody waits for what the last hint announced any more."""
        in_class = self.in_class.item(row)
        if in_class != NONE:
            self._survivals[_ORDER[in_class // _CLASSES]].ceased(in_class % _CLASSES, now_s - self.since_s.item(row))
            self._forget(row)

    def _forget(self, row: int) -> None:
        self.in_class[row] = NONE
        self.expected.pop(row, None)

    def gone(self, row: int) -> bool:
        """Whether the item's session has ended, and whoever ended was not seen to come back."""
        in_class = self.in_class.item(row)
        return in_class >= ENDED and bool((self.hazards[in_class, :-1] * WIDTHS[:-1]).sum() < _HARDLY)

    @property
    def surprising(self) -> float:
        """The share of returns that no hint announced in time."""
        return 1 - self._announced / self._returns

    def learn(self, waiting: Rows, now_s: float) -> None:
        """Puts what was seen into `hazards`. `waiting` are all rows that are waited for, hinted or not."""
        kinds, classes = np.divmod(self.in_class[waiting], _CLASSES)
        for kind, survival in enumerate(self._survivals.values()):
            hinted = kinds == kind
            rows = waiting[hinted]
            of_kind = slice(kind * _CLASSES, (kind + 1) * _CLASSES)
            self.hazards[of_kind] = survival.hazards(
                classes[hinted], now_s - self.since_s[rows], survival.weight(self._since_events[rows])
            )
            self.soonest_s[of_kind] = survival.quantile(_QUICK)
