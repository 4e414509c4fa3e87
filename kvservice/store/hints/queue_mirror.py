"""One engine's queue, as its hints describe it. Pure: no clock, no store.

The queue is a linked list by request id, so a change costs the same in a queue of ten and of ten thousand requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvservice.policy.base import Hint
from kvservice_api.keys import KEY_BYTES

_END = ""  # No request has this id: it is before the first and after the last one.


class HintSubject(NamedTuple):
    """The blocks that a hint is about: those of `packed_keys`, or of a session if there are none."""

    fingerprint: bytes
    session_id: str
    packed_keys: bytes = b""

    @property
    def key_count(self) -> int:
        return len(self.packed_keys) // KEY_BYTES


class QueueEntry(NamedTuple):
    """A request that waits for its engine, or that a hint announces. `due_s` is a time of the monotonic clock."""

    request_id: str
    subject: HintSubject
    due_s: float | None
    priority: int
    hint: Hint | None = None
    kind: int = 0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    entries_max: int
    keys_max: int  # In all entries of the queue.


@dataclass(slots=True)
class HintTotals:
    """How many hints of all clients are kept, with how many keys. Each is at most the limit."""

    limits: QueueLimits
    entries: int = 0
    keys: int = 0

    def add(self, subject: HintSubject) -> bool:
        """Whether a limit permits another one. Pair with `remove` if it does."""
        keys = self.keys + subject.key_count
        if self.entries >= self.limits.entries_max or keys > self.limits.keys_max:
            return False
        self.entries, self.keys = self.entries + 1, keys
        return True

    def remove(self, subject: HintSubject) -> None:
        self.entries -= 1
        self.keys -= subject.key_count


class QueueMirror:
    """The requests in the engine's order. Iterating yields the entries, the head first."""

    def __init__(self, limits: QueueLimits, totals: HintTotals) -> None:
        """`totals` are those of all queues."""
        self._own = HintTotals(limits)
        self._totals = totals
        self._entries: dict[str, QueueEntry] = {}
        self._after: dict[str, str] = {_END: _END}
        self._before: dict[str, str] = {_END: _END}

    @property
    def key_count(self) -> int:
        return self._own.keys

    def clear(self) -> None:
        for entry in self._entries.values():
            self._own.remove(entry.subject)
            self._totals.remove(entry.subject)
        self._entries, self._after, self._before = {}, {_END: _END}, {_END: _END}

    def put(self, entry: QueueEntry, before: str = "") -> bool:
        """Put an entry in front of the one with the id `before`, or at the end if there is none. An entry of the same
        id is replaced. Returns False, and only removes that one, if a limit is reached.
        """
        name = entry.request_id
        self.remove(name)
        if not self._own.add(entry.subject):
            return False
        if not self._totals.add(entry.subject):
            self._own.remove(entry.subject)
            return False
        following = before if before in self._entries else _END
        former = self._before[following]
        self._after[former] = self._before[following] = name
        self._after[name], self._before[name] = following, former
        self._entries[name] = entry
        return True

    def remove(self, request_id: str) -> bool:
        """Whether it was in the queue."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return False
        before, after = self._before.pop(request_id), self._after.pop(request_id)
        self._after[before], self._before[after] = after, before
        self._own.remove(entry.subject)
        self._totals.remove(entry.subject)
        return True

    def get(self, request_id: str) -> QueueEntry | None:
        return self._entries.get(request_id)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[QueueEntry]:
        return self.after(_END)

    def after(self, request_id: str) -> Iterator[QueueEntry]:
        """The entries behind this one; all of them if it is not in the queue. The queue must not change meanwhile."""
        name = self._after[request_id if request_id in self._entries else _END]
        while name != _END:
            yield self._entries[name]
            name = self._after[name]
