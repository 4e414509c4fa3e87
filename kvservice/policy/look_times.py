"""When a policy scans all items again: after a number of events, and periodically while items may need a promotion."""

from __future__ import annotations

import math

#: A scan follows after one event per so many scanned items, but not after fewer events than this.
LOOKS, LOOKS_ALONE = (24, 32), (4, 64)
#: The period between scans, as parts of a typical return time: at least 1/1024, at most 1/16.
_OFTEN, _SELDOM = 1024, 16
_LEADS = 4  # The period between scans of hinted items is this part of the time between a hint and its request.


class LookTimes:
    """`next_s` is when to scan all items next; `hinted_s` is the same for the items with hints."""

    def __init__(self, now_s: float) -> None:
        self.next_s = -math.inf
        self.hinted_s = math.inf
        self.every_s = 0.0
        self.hinted_every_s = 0.0
        self.events = 0  # Events since the last scan.
        self._events_due = LOOKS[1]
        self._event_s = math.inf  # Mean time between recent events.
        self._counted = 0
        self._counted_from_s = now_s

    def happened(self, now_s: float) -> bool:
        """Count an event. Returns whether enough have happened for a scan now."""
        self.events += 1
        if self.events < self._events_due:
            return False
        self.next_s = now_s
        return True

    def hinted(self, now_s: float) -> None:
        self.hinted_s = min(self.hinted_s, now_s + self.hinted_every_s)

    @property
    def soonest_s(self) -> float:
        return min(self.next_s, self.hinted_s)

    def looked(self, rows: int, typical_s: float, lead_s: float, now_s: float, looks: tuple[int, int] = LOOKS) -> None:
        """A scan of `rows` items ended. `typical_s` is a typical return time, `lead_s` the shortest hint lead.

        `looks`: when the next one follows, `LOOKS`, or `LOOKS_ALONE` where nothing is read ahead.
        """
        per_event, least = looks
        self._events_due = max(rows // per_event, least)
        self._counted += self.events
        if self._counted >= LOOKS[1] and now_s > self._counted_from_s:
            self._event_s = (now_s - self._counted_from_s) / self._counted
            self._counted, self._counted_from_s = 0, now_s
        often_s, seldom_s = typical_s / _OFTEN, typical_s / _SELDOM
        self.every_s = min(max(self._event_s * self._events_due, often_s), seldom_s)
        self.hinted_every_s = max(lead_s / _LEADS, min(2 * self._event_s, seldom_s), often_s)
        self.events = 0

    def plan(self, something_to_fetch: bool, something_hinted: bool, now_s: float) -> None:
        self.next_s = now_s + self.every_s if something_to_fetch else math.inf
        self.hinted_s = now_s + self.hinted_every_s if something_hinted else math.inf
