"""The history of blocks that were evicted, dropped or refused: for `explain`.

It is a ring of arrays, without an object per event. Each event is noted at the one place where it happens. Events whose
keys have the same hash are linked, so that a query by key takes a few microseconds: each lookup that misses makes one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, TierName
from kvservice.clock import Clock
from kvservice_api.keys import KEY_BYTES

_DETAILS_MAX = 256
_UNKNOWN_SCORE = np.finfo(np.float64).max
_FOUND_MAX = 16  # The answer has at most so many events of one key, the newest ones.
_STEPS_MAX = 1024  # Per query: a client may choose keys that have the same hash. They take half a millisecond.

_EVENT = np.dtype(
    [
        ("key", "V32"),
        ("at_ms", "<u8"),
        ("pin_ended_ms", "<u8"),
        ("reason", "u1"),
        ("tier", "u1"),  # A position in `MissReasons._tiers`.
        ("detail", "u1"),
        ("last_copy", "?"),
        ("space_for", "u1"),
        ("score", "<f8"),
    ]
)


class Reason(IntEnum):
    """Why a block, or one copy of it, is gone. The numbers are used in this process only."""

    REFUSED = 1  # A save of it was refused. The detail is the error's reason.
    ABANDONED = 2  # A save of it ended without a commit.
    EVICTED = 3  # The detail is the policy's name.
    EVICTED_ON_REQUEST = 4
    DISCARDED = 5  # The detail is the reason, if it was not a request.
    QUARANTINED = 6
    LOST = 7  # Its record was dropped at a start.
    EXPIRED = 8  # A session's partial block: the session expired.


class SpaceFor(IntEnum):
    """What got the space of an evicted copy. The numbers are used in this process only."""

    UNKNOWN = 0
    SAVE = 1
    LOAD = 2
    PREFETCH = 3  # A client's call or hint.
    READ_AHEAD = 4  # What the policy reads before its next use.
    COPY = 5  # From the tier above.
    FREE_SHARE = 6  # The part of the tier that is kept free.
    INDEX = 7  # Records of other blocks.


class Eviction(NamedTuple):
    """A policy's choice of copies to evict."""

    policy: str
    space_for: SpaceFor
    scores: Mapping[int, float]  # By row. Minus infinity for a block that is not needed any more, the largest float
    # for one that left by recency, because the policy was late.


class MissEvent(NamedTuple):
    at_ms: int
    reason: Reason
    tier: TierName | None  # None: of every tier, or of none.
    detail: str
    last_copy: bool  # It was the block's last copy.
    pin_ended_ms: int  # For an eviction: the end of the block's pin; 0 without one.
    space_for: SpaceFor = SpaceFor.UNKNOWN  # For a policy's eviction.
    score: float | None = None  # For a policy's eviction: the block's score, the lowest in the tier.


class MissReasons:
    """The last `events_max` events. 0 keeps none."""

    def __init__(self, clock: Clock, events_max: int) -> None:
        self._clock = clock
        self._events = np.zeros(events_max, _EVENT)
        self._keys = self._events["key"]
        self._count = 0  # The count of all events; the next one goes to this place, modulo the ring's size.
        # Events by number, from 1: the newest one of each hash, and the one before each event; 0 if there is none.
        self._newest = np.zeros(1 << max(0, events_max - 1).bit_length(), np.int64)
        self._before = np.zeros(events_max, np.int64)
        self.noted: Counter[tuple[Reason, str, str]] = Counter()  # Events by reason, tier, and detail or space_for.
        self._details: list[str] = [""]
        self._tiers: list[TierName | None] = [None]  # Those that were noted.
        self._began_ms = clock.wall_ms()

    @property
    def now_ms(self) -> int:
        return self._clock.wall_ms()

    @property
    def remembers_since_ms(self) -> int:
        """The time since which the history is complete."""
        size = len(self._events)
        if self._count <= size:
            return self._began_ms if size else self.now_ms
        return int(self._events["at_ms"][self._count % size])

    # Noting

    def note_rows(
        self,
        blocks: BlockTable,
        rows: Sequence[int],
        reason: Reason,
        *,
        tier: TierName | None = None,
        detail: str = "",
        last_copy: bool = True,
        eviction: Eviction | None = None,
    ) -> None:
        if not len(rows):
            return
        now_ms = self.now_ms
        pinned = blocks.pinned_until_ms[list(rows)]
        ended = np.where(pinned <= now_ms, pinned, np.uint64(0))
        if eviction is None:
            self._note(blocks.key[list(rows)], reason, tier, detail, last_copy, ended)
            return
        scores = np.array([eviction.scores.get(row, math.nan) for row in rows])
        keys = blocks.key[list(rows)]
        self._note(keys, reason, tier, eviction.policy, last_copy, ended, eviction.space_for, scores)

    def note_keys(self, keys: Sequence[bytes], reason: Reason, detail: str = "") -> None:
        """Note blocks that never had a row."""
        if keys:
            packed = np.frombuffer(b"".join(keys), "V32")
            self._note(packed, reason, None, detail, True, np.zeros(len(keys), np.uint64))

    def note_lost(self, tier: TierName, object_keys: Sequence[bytes]) -> None:
        """Note objects whose records were dropped at start. They may have a copy in another tier."""
        keys = [key[:KEY_BYTES] for key in object_keys if len(key) >= KEY_BYTES]  # A damaged key may have any length.
        if keys:
            packed = np.frombuffer(b"".join(keys), "V32")
            self._note(packed, Reason.LOST, tier, "", True, np.zeros(len(keys), np.uint64))

    def _note(
        self,
        keys: np.ndarray[tuple[int], np.dtype[np.void]],
        reason: Reason,
        tier: TierName | None,
        detail: str,
        last_copy: bool,
        pin_ended_ms: np.ndarray[tuple[int], np.dtype[np.uint64]],
        space_for: SpaceFor = SpaceFor.UNKNOWN,
        scores: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None,
    ) -> None:
        size, count = len(self._events), len(keys)
        what = detail if space_for is SpaceFor.UNKNOWN else space_for.name.lower()
        self.noted[reason, tier or "", what] += count
        if not size:
            return
        skipped = max(0, count - size)
        numbers = np.arange(self._count + skipped, self._count + count)
        places = numbers % size
        events = np.zeros(count - skipped, _EVENT)
        events["key"] = keys[skipped:]
        events["at_ms"], events["reason"], events["tier"] = self.now_ms, reason, self._tier(tier)
        events["detail"], events["last_copy"] = self._detail_number(detail), last_copy
        events["pin_ended_ms"], events["space_for"] = pin_ended_ms[skipped:], space_for
        events["score"] = math.nan if scores is None else scores[skipped:]
        self._events[places] = events
        starts = np.ascontiguousarray(keys[skipped:]).view(np.uint64)[:: KEY_BYTES // 8]
        hashes = (starts & np.uint64(len(self._newest) - 1)).view(np.int64)  # Keys are hashes themselves.
        self._link(hashes, places, numbers + 1)
        self._count += count

    def _link(self, hashes: NDArray[np.int64], places: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
        """Link events to the earlier ones of the same hash."""
        before = self._newest[hashes]
        self._newest[hashes] = numbers
        if (self._newest[hashes] != numbers).any():  # Some of these events have the same hash: rare.
            latest: dict[int, int] = {}
            for at, (each, number) in enumerate(zip(hashes.tolist(), numbers.tolist(), strict=True)):
                before[at] = latest.get(each, before[at])
                latest[each] = number
        self._before[places] = before

    def _tier(self, tier: TierName | None) -> int:
        if tier not in self._tiers:
            self._tiers.append(tier)
        return self._tiers.index(tier)

    def _detail_number(self, detail: str) -> int:
        """The number of a policy's or an error's name. There are few names."""
        if detail not in self._details:
            if len(self._details) == _DETAILS_MAX:
                return 0
            self._details.append(detail)
        return self._details.index(detail)

    # Queries

    @property
    def keys(self) -> NDArray[np.void]:
        """The keys of all events, in no order. It changes with each event."""
        return self._keys[: min(self._count, len(self._keys))]

    def of(self, key: bytes, until_ms: int | None = None) -> list[MissEvent]:
        """The events of a block, up to a time; the newest first."""
        return list(islice(self.events(key, until_ms), _FOUND_MAX))

    def last_copy_gone(self, key: bytes, until_ms: int | None = None) -> MissEvent | None:
        """The newest event, up to a time, after which the block had no copy."""
        return next((event for event in self.events(key, until_ms) if event.last_copy), None)

    def events(self, key: bytes, until_ms: int | None = None) -> Iterator[MissEvent]:
        """As `of`, one by one. Nothing may be noted meanwhile."""
        size = len(self._events)
        first = max(0, self._count - size)
        number = self._newest.item(int.from_bytes(key[:8], "little") & (len(self._newest) - 1))
        for _ in range(_STEPS_MAX):
            if number <= first:
                return  # There is none, or its place has a later event.
            place = (number - 1) % size
            number = self._before.item(place)
            if self._keys.item(place) != key:
                continue
            _, at_ms, pin_ended_ms, reason, tier, detail, last_copy, space_for, score = self._events[place].item()
            if until_ms is not None and at_ms > until_ms:
                continue
            yield MissEvent(
                at_ms,
                Reason(reason),
                self._tiers[tier],
                self._details[detail],
                last_copy,
                pin_ended_ms,
                SpaceFor(space_for),
                score if abs(score) < _UNKNOWN_SCORE else None,
            )
