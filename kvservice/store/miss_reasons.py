"""What is remembered of blocks that left, or that were never taken: for `explain`.

A ring of arrays, not an object an event. It is fed at the one place where each thing happens, and asked
by key: the first eight bytes of all its keys are compared at once, a third of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from kvservice.blocks import BlockTable, TierName
from kvservice.clock import Clock
from kvservice_api.keys import KEY_BYTES

_WORDS_MAX = 256
_FOUND_MAX = 16  # Events of one key that are told, the newest ones.

_EVENT = np.dtype(
    [
        ("key", "V32"),
        ("at_ms", "<u8"),
        ("pin_ended_ms", "<u8"),
        ("reason", "u1"),
        ("tier", "u1"),  # A position in `MissReasons._tiers`.
        ("word", "u1"),
        ("last_copy", "?"),
    ]
)


class Reason(IntEnum):
    """Why a block, or one copy of it, is not there any more. The numbers are of this process only."""

    REFUSED = 1  # A save brought it, and it was not taken. The word is the error's reason.
    ABANDONED = 2  # The save that brought it ended without a commit.
    EVICTED = 3  # The word is the policy.
    EVICTED_ON_REQUEST = 4
    DISCARDED = 5  # The word is why, where nobody asked for it.
    QUARANTINED = 6
    LOST = 7  # Its record was dropped at start.
    EXPIRED = 8  # A session's partial block: the session's time was over.


class MissEvent(NamedTuple):
    at_ms: int
    reason: Reason
    tier: TierName | None  # None: of every tier, or of none.
    word: str
    last_copy: bool  # The block was gone with it.
    pin_ended_ms: int  # Of an eviction: when the pin ended that had kept the block; 0 where there was none.


class MissReasons:
    """The last `events_max` events. None are kept where that is 0."""

    def __init__(self, clock: Clock, events_max: int) -> None:
        self._clock = clock
        self._events = np.zeros(events_max, _EVENT)
        self._starts = np.zeros(events_max, np.uint64)  # The keys' first eight bytes: a search reads nothing else.
        self._count = 0  # Of all events ever; the next one goes to this place, modulo the ring's size.
        self._words: list[str] = [""]
        self._tiers: list[TierName | None] = [None]  # Those that were noted.
        self._began_ms = clock.wall_ms()

    @property
    def now_ms(self) -> int:
        return self._clock.wall_ms()

    @property
    def remembers_since_ms(self) -> int:
        """Everything since then is remembered."""
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
        word: str = "",
        last_copy: bool = True,
    ) -> None:
        if not len(rows):
            return
        now_ms = self.now_ms
        pinned = blocks.pinned_until_ms[list(rows)]
        ended = np.where(pinned <= now_ms, pinned, np.uint64(0))
        self._note(blocks.key[list(rows)], reason, tier, word, last_copy, ended)

    def note_keys(self, keys: Sequence[bytes], reason: Reason, word: str = "") -> None:
        """Blocks that never had a row."""
        if keys:
            packed = np.frombuffer(b"".join(keys), "V32")
            self._note(packed, reason, None, word, True, np.zeros(len(keys), np.uint64))

    def note_lost(self, tier: TierName, object_keys: Sequence[bytes]) -> None:
        """Objects whose records were dropped at start. A copy in another tier may be left."""
        keys = [key[:KEY_BYTES] for key in object_keys if len(key) >= KEY_BYTES]  # A damaged one may have any length.
        if keys:
            packed = np.frombuffer(b"".join(keys), "V32")
            self._note(packed, Reason.LOST, tier, "", True, np.zeros(len(keys), np.uint64))

    def _note(
        self,
        keys: np.ndarray[tuple[int], np.dtype[np.void]],
        reason: Reason,
        tier: TierName | None,
        word: str,
        last_copy: bool,
        pin_ended_ms: np.ndarray[tuple[int], np.dtype[np.uint64]],
    ) -> None:
        size, count = len(self._events), len(keys)
        if not size:
            return
        skipped = max(0, count - size)
        places = np.arange(self._count + skipped, self._count + count) % size
        events = np.zeros(count - skipped, _EVENT)
        events["key"] = keys[skipped:]
        events["at_ms"], events["reason"], events["tier"] = self.now_ms, reason, self._tier(tier)
        events["word"], events["last_copy"] = self._word(word), last_copy
        events["pin_ended_ms"] = pin_ended_ms[skipped:]
        self._events[places] = events
        self._starts[places] = np.ascontiguousarray(keys[skipped:]).view(np.uint64)[:: KEY_BYTES // 8]
        self._count += count

    def _tier(self, tier: TierName | None) -> int:
        if tier not in self._tiers:
            self._tiers.append(tier)
        return self._tiers.index(tier)

    def _word(self, word: str) -> int:
        """The number of a policy's or an error's name: there are few."""
        if word not in self._words:
            if len(self._words) == _WORDS_MAX:
                return 0
            self._words.append(word)
        return self._words.index(word)

    # Asking

    def of(self, key: bytes, until_ms: int | None = None) -> list[MissEvent]:
        """What is remembered of a block, up to a time; the newest first."""
        size = len(self._events)
        places = np.flatnonzero(self._starts == np.frombuffer(key, np.uint64)[0])
        places = places[places < self._count]  # The others were never written.
        ages = (self._count - 1 - places) % size if size else places
        found = []
        for place in places[np.argsort(ages)].tolist():
            event = self._events[place]
            if event["key"].tobytes() != key or (until_ms is not None and event["at_ms"] > until_ms):
                continue
            found.append(
                MissEvent(
                    int(event["at_ms"]),
                    Reason(int(event["reason"])),
                    self._tiers[int(event["tier"])],
                    self._words[int(event["word"])],
                    bool(event["last_copy"]),
                    int(event["pin_ended_ms"]),
                )
            )
            if len(found) == _FOUND_MAX:
                break
        return found
