"""Learns how soon a request follows a hint, and how often none follows.

Wrong hints count as time at risk without an event, so they lower the learned hazard: most of all where a return was
unlikely without the hint, as right after an answer.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy.base import Hint
from kvservice.policy.items import grown
from kvservice.policy.return_times import RECENCY
from kvservice.policy.survival import BIN_COUNT, WIDTHS, Floats, Survival, bin_of

NONE = -1
_LIKELIHOOD_BOUNDS = (
    0.5,
    1.0,
)  # Bounds of a hint's three classes, by the hazard without the hint relative to the average.
_CLASSES = len(_LIKELIHOOD_BOUNDS) + 1
_ORDER = (Hint.TYPING, Hint.TOOL_CALL, Hint.ENDED)
ENDED = _ORDER.index(Hint.ENDED) * _CLASSES  # The first class of items whose session has ended.
CLASSES = len(_ORDER) * _CLASSES
_MEMORY = 2048.0  # Returns.
_HINTED_PRIOR = 4 * RECENCY  # The prior: four times as likely as without a hint.
_ENDED_PRIOR: Floats = np.full(BIN_COUNT, 1e-9)  # The prior after ENDED: no return.
_PRIOR_RETURNS = 16.0  # Strength of the prior "no return is announced", in returns.
_NEVER_RETURNS_BELOW = 0.02  # Expected returns after ENDED below which the item counts as gone.
_SOONEST_SHARE = 0.1  # This share of the requests arrives before the deadline that a hint gives.


class HintTimes:
    """The last hint of each item since its last use, and the hazard of its return by the time since then."""

    def __init__(self, row_count: int) -> None:
        self._survivals = {
            hint: Survival(_CLASSES, _ENDED_PRIOR if hint is Hint.ENDED else _HINTED_PRIOR, _MEMORY) for hint in _ORDER
        }
        self.hazards: Floats = np.repeat([_HINTED_PRIOR, _HINTED_PRIOR, _ENDED_PRIOR], _CLASSES, axis=0)
        self.in_class = np.full(row_count, NONE, np.int64)
        self.since_s = np.full(row_count, math.nan)
        self._since_events = np.zeros(row_count, np.int64)
        self.expected: dict[int, None] = {}  # Items whose last hint announces a request and is still credible.
        self._announced = 0.0
        self._returns = _PRIOR_RETURNS
        self.soonest_s: Floats = np.zeros(
            CLASSES
        )  # By class, the `_SOONEST_SHARE` quantile of the time to the request.

    def grow(self, row_count: int) -> None:
        self.in_class = grown(self.in_class, row_count, NONE)
        self.since_s = grown(self.since_s, row_count, math.nan)
        self._since_events = grown(self._since_events, row_count, 0)

    def hinted(self, row: int, hint: Hint, likely: float, now_s: float) -> None:
        """`likely`: the hazard of a return without this hint, relative to the average hazard."""
        self.cancel(row, now_s)
        self.in_class[row] = (
            _ORDER.index(hint) * _CLASSES + (likely >= _LIKELIHOOD_BOUNDS[0]) + (likely >= _LIKELIHOOD_BOUNDS[1])
        )
        self.since_s[row] = now_s
        self._since_events[row] = self._survivals[hint].event_count
        if hint is not Hint.ENDED:
            self.expected[row] = None

    def record_return(self, row: int, hazard: float, reading_s: float, now_s: float) -> None:
        """The request arrived. `hazard` is its hazard without the hint; reading its bytes takes `reading_s`."""
        in_class = self.in_class.item(row)
        announced = 0.0
        if in_class != NONE:
            age_s = now_s - self.since_s.item(row)
            self._survivals[_ORDER[in_class // _CLASSES]].record_event(in_class % _CLASSES, age_s)
            if age_s >= reading_s:
                announced = max(0.0, 1 - hazard / self.hazards.item(in_class, bin_of(age_s)))
            self._forget(row)
        if self._returns >= _MEMORY:
            self._announced *= 1 - 1 / _MEMORY
        else:
            self._returns += 1
        self._announced += announced

    def cancel(self, row: int, now_s: float) -> None:
        """The last hint no longer applies: record it as censored."""
        in_class = self.in_class.item(row)
        if in_class != NONE:
            self._survivals[_ORDER[in_class // _CLASSES]].record_censored(
                in_class % _CLASSES, now_s - self.since_s.item(row)
            )
            self._forget(row)

    def _forget(self, row: int) -> None:
        self.in_class[row] = NONE
        self.expected.pop(row, None)

    def has_ended(self, row: int) -> bool:
        """Whether the item's session has ended, and sessions that ended were hardly ever seen to return."""
        in_class = self.in_class.item(row)
        return in_class >= ENDED and bool((self.hazards[in_class, :-1] * WIDTHS[:-1]).sum() < _NEVER_RETURNS_BELOW)

    @property
    def unannounced_share(self) -> float:
        """The share of returns that no hint announced early enough to read the item."""
        return 1 - self._announced / self._returns

    def learn(self, waiting: Rows, now_s: float) -> None:
        """Update `hazards` from the observations. `waiting`: every row that waits now, hinted or not."""
        kinds, classes = np.divmod(self.in_class[waiting], _CLASSES)
        for kind, survival in enumerate(self._survivals.values()):
            hinted = kinds == kind
            rows = waiting[hinted]
            of_kind = slice(kind * _CLASSES, (kind + 1) * _CLASSES)
            self.hazards[of_kind] = survival.hazards(
                classes[hinted], now_s - self.since_s[rows], survival.weight(self._since_events[rows])
            )
            self.soonest_s[of_kind] = survival.quantile(_SOONEST_SHARE)
