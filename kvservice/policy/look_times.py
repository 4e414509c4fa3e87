"""When to look at everything again: by what happens, and by time while something may have to be fetched."""

from __future__ import annotations

import math

_LOOKS = 48  # One event for so many items that are looked at...
_EVENTS = 16  # ... but not fewer events than this.
#: Between looks passes at least and at most this part of a typical time until a return.
_OFTEN, _SELDOM = 1024, 32
_LEADS = 8  # Between looks at what hints announce passes this part of the time that they leave.


class LookTimes:
    """`next_s` is the next time; `hinted_s` is that for what hints announced."""

    def __init__(self, now_s: float) -> None:
        self.next_s = -math.inf
        self.hinted_s = math.inf
        self.every_s = 0.0
        self.hinted_every_s = 0.0
        self.events = 0  # Since the last look.
        self._events_due = _EVENTS
        self._event_s = math.inf  # Between events, in the mean of the last ones.
        self._counted = 0
        self._counted_from_s = now_s

    def happened(self, now_s: float) -> None:
        self.events += 1
        if self.events >= self._events_due:
            self.next_s = now_s

    def hinted(self, now_s: float) -> None:
        self.hinted_s = min(self.hinted_s, now_s + self.hinted_every_s)

    @property
    def soonest_s(self) -> float:
        return min(self.next_s, self.hinted_s)

    def looked(self, rows: int, typical_s: float, lead_s: float, now_s: float) -> None:
        """At so many rows. `typical_s` passes until a return, `lead_s` from a hint to the soonest requests."""
        self._events_due = max(rows // _LOOKS, _EVENTS)
        self._counted += self.events
        if self._counted >= _EVENTS and now_s > self._counted_from_s:
            self._event_s = (now_s - self._counted_from_s) / self._counted
            self._counted, self._counted_from_s = 0, now_s
        often_s, seldom_s = typical_s / _OFTEN, typical_s / _SELDOM
        self.every_s = min(max(self._event_s * self._events_due, often_s), seldom_s)
        self.hinted_every_s = max(lead_s / _LEADS, min(2 * self._event_s, seldom_s), often_s)
        self.events = 0

    def plan(self, something_to_fetch: bool, something_hinted: bool, now_s: float) -> None:
        self.next_s = now_s + self.every_s if something_to_fetch else math.inf
        self.hinted_s = now_s + self.hinted_every_s if something_hinted else math.inf
