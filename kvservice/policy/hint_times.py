"""Learns how soon a request follows a hint, and how often none follows.

Wrong hints count as time at risk without an event, so they lower the learned hazard: most of all where a return was
unlikely without the hint, as right after an answer.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.blocks import Rows
from kvservice.policy.base import HINT_KINDS, Hint
from kvservice.policy.items import grown
from kvservice.policy.return_times import RECENCY
from kvservice.policy.survival import BIN_COUNT, WIDTHS, Floats, Survival, bin_of

NONE = -1
_LIKELIHOOD_BOUNDS = (
    0.5,
    1.0,
)  # Bounds of a hint's three classes, by the hazard without the hint relative to the average.
_LIKELY_CLASSES = len(_LIKELIHOOD_BOUNDS) + 1
#: Classes of a hint: by how likely a return was without it, and of tool calls by the tool.
_CLASSES = {Hint.TYPING: _LIKELY_CLASSES, Hint.TOOL_CALL: HINT_KINDS, Hint.ENDED: _LIKELY_CLASSES}
_ORDER = tuple(_CLASSES)
TOOL_CALL = _CLASSES[Hint.TYPING]  # The first class of items that wait for a tool.
ENDED = TOOL_CALL + HINT_KINDS  # The first class of items whose session has ended.
CLASSES = sum(_CLASSES.values())
_FIRST = {Hint.TYPING: 0, Hint.TOOL_CALL: TOOL_CALL, Hint.ENDED: ENDED}
_HINT_OF = np.repeat(np.arange(len(_ORDER)), list(_CLASSES.values())).tolist()  # By class: an index into _ORDER.
_MEMORY = 2048.0  # Returns.
_HINTED_PRIOR = 4 * RECENCY  # The prior: four times as likely as without a hint.
_ENDED_PRIOR: Floats = np.full(BIN_COUNT, 1e-9)  # The prior after ENDED: no return.
_PRIOR_RETURNS = 16.0  # Strength of the prior "no return is announced", in returns.
_NEVER_RETURNS_BELOW = 0.02  # Expected returns after ENDED below which the item counts as gone.
_MOST_SHARE = 0.75  # This share of the requests arrives before the time that a hint's class is given.
_SOONEST_SHARE = 0.1  # This share of the requests arrives before the deadline that a hint gives.


class HintTimes:
    """The last hint of each item since its last use, and the hazard of its return by the time since then."""

    def __init__(self, row_count: int) -> None:
        self._survivals = {
            hint: Survival(count, _ENDED_PRIOR if hint is Hint.ENDED else _HINTED_PRIOR, _MEMORY)
            for hint, count in _CLASSES.items()
        }
        priors = np.array((_HINTED_PRIOR, _HINTED_PRIOR, _ENDED_PRIOR))
        self.hazards: Floats = np.repeat(priors, list(_CLASSES.values()), axis=0)
        self._row_count = row_count
        self._make_columns(0)  # Made at the first hint: a store without hints needs no memory for them.
        self.count = 0  # Items that have a hint.
        self.expected: dict[int, None] = {}  # Items whose last hint announces a request and is still credible.
        self._announced = 0.0
        self._returns = _PRIOR_RETURNS
        self.soonest_s: Floats = np.zeros(
            CLASSES
        )  # By class, the `_SOONEST_SHARE` quantile of the time to the request.
        self.most_s: Floats = np.zeros(CLASSES)  # By class, the time within which most requests come.

    def _make_columns(self, row_count: int) -> None:
        self.in_class = np.full(row_count, NONE, np.int8)
        self.since_s = np.full(row_count, math.nan)
        self._since_events = np.zeros(row_count, np.int64)

    def grow(self, row_count: int) -> None:
        self._row_count = row_count
        if not len(self.in_class):
            return
        self.in_class = grown(self.in_class, row_count, NONE)
        self.since_s = grown(self.since_s, row_count, math.nan)
        self._since_events = grown(self._since_events, row_count, 0)

    def hinted(self, row: int, hint: Hint, likely: float, now_s: float, kind: int = 0) -> None:
        """`likely`: the hazard of a return without this hint, relative to the average hazard. `kind`: of the tool."""
        if not len(self.in_class):
            self._make_columns(self._row_count)
        self.cancel(row, now_s)
        if hint is Hint.TOOL_CALL:
            within = kind % HINT_KINDS
        else:
            within = (likely >= _LIKELIHOOD_BOUNDS[0]) + (likely >= _LIKELIHOOD_BOUNDS[1])
        self.in_class[row] = _FIRST[hint] + within
        self.count += 1
        self.since_s[row] = now_s
        self._since_events[row] = self._survivals[hint].event_count
        if hint is not Hint.ENDED:
            self.expected[row] = None

    def record_return(self, row: int, hazard: float, reading_s: float, now_s: float) -> None:
        """The request arrived. `hazard` is its hazard without the hint; reading its bytes takes `reading_s`."""
        announced = 0.0
        if self.is_hinted(row):
            in_class = self.in_class.item(row)
            age_s = now_s - self.since_s.item(row)
            hint = _ORDER[_HINT_OF[in_class]]
            self._survivals[hint].record_event(in_class - _FIRST[hint], age_s)
            if age_s >= reading_s:
                announced = max(0.0, 1 - hazard / self.hazards.item(in_class, bin_of(age_s)))
            self._forget(row)
        self.count_return(announced)

    def count_return(self, announced: float = 0.0) -> None:
        """A request arrived. `announced`: how certainly a hint told of it, 0 to 1."""
        if self._returns >= _MEMORY:
            self._announced *= 1 - 1 / _MEMORY
        else:
            self._returns += 1
        self._announced += announced

    def cancel(self, row: int, now_s: float) -> None:
        """The last hint no longer applies: record it as censored."""
        if self.is_hinted(row):
            in_class = self.in_class.item(row)
            hint = _ORDER[_HINT_OF[in_class]]
            self._survivals[hint].record_censored(in_class - _FIRST[hint], now_s - self.since_s.item(row))
            self._forget(row)

    def _forget(self, row: int) -> None:
        self.in_class[row] = NONE
        self.count -= 1
        self.expected.pop(row, None)

    def is_hinted(self, row: int) -> bool:
        """Whether the item has a hint."""
        return self.count > 0 and self.in_class.item(row) != NONE

    @property
    def calls_ended(self) -> int:
        """Tool calls that a request followed, since the start."""
        return self._survivals[Hint.TOOL_CALL].event_count

    def called_at_s(self, row: int) -> float:
        """When the item's session called a tool, if that was its last hint; else NaN."""
        return self.since_s.item(row) if TOOL_CALL <= self.in_class.item(row) < ENDED else math.nan

    def has_ended(self, row: int) -> bool:
        """Whether the item's session has ended, and sessions that ended were hardly ever seen to return."""
        in_class = self.in_class.item(row) if self.count else NONE
        return in_class >= ENDED and bool((self.hazards[in_class, :-1] * WIDTHS[:-1]).sum() < _NEVER_RETURNS_BELOW)

    @property
    def unannounced_share(self) -> float:
        """The share of returns that no hint announced early enough to read the item."""
        return 1 - self._announced / self._returns

    def learn(self, waiting: Rows, now_s: float) -> None:
        """Update `hazards` from the observations. `waiting`: every row that waits now, hinted or not."""
        if not self.count and not any(array.any() for array in self.counts()):
            return  # There never was a hint.
        classes = self.in_class[waiting].astype(np.int64) if len(self.in_class) else np.full(len(waiting), NONE)
        for hint, survival in self._survivals.items():
            first, end = _FIRST[hint], _FIRST[hint] + _CLASSES[hint]
            hinted = (classes >= first) & (classes < end)
            rows = waiting[hinted]
            self.hazards[first:end] = survival.hazards(
                classes[hinted] - first, now_s - self.since_s[rows], survival.weight(self._since_events[rows])
            )
            self.soonest_s[first:end] = survival.quantile(_SOONEST_SHARE)
            self.most_s[first:end] = survival.quantiles(_MOST_SHARE)

    def counts(self) -> list[Floats]:
        """What was counted, as arrays to copy from and to."""
        return [array for survival in self._survivals.values() for array in survival.counts()]
