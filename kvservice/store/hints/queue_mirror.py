"""One engine's queue, as its hints describe it. Pure: no clock, no store.

The queue is a linked list by request id, so a change costs the same in a queue of ten and of ten thousand requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvservice_api.keys import KEY_BYTES

_END = ""  # No request has this id: it is before the first and after the last one.


class HintSubject(NamedTuple):
    """The blocks that a hint is about: those of `packed_keys`, or of a session if there are none."""

    fingerprint: bytes
    session_id: str
    packed_keys: bytes = b""


class QueueEntry(NamedTuple):
    """A request that waits for its engine. `due_s` is a time of the daemon's monotonic clock."""

    request_id: str
    subject: HintSubject
    due_s: float | None
    priority: int


@dataclass(frozen=True, slots=True)
class QueueLimits:
    entries_max: int
    keys_max: int  # In all entries of the queue.


class QueueMirror:
    """The requests in the engine's order. Iterating yields the entries, the head first."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self.clear()

    def clear(self) -> None:
        self._entries: dict[str, QueueEntry] = {}
        self._after: dict[str, str] = {_END: _END}
        self._before: dict[str, str] = {_END: _END}
        self.key_count = 0

    def put(self, entry: QueueEntry, before: str = "") -> bool:
        """Put an entry in front of the one with the id `before`, or at the end if there is none. An entry of the same
        id is replaced. Returns False, and changes nothing else, if the queue is full.
        """
        name = entry.request_id
        self.remove(name)
        keys = len(entry.subject.packed_keys) // KEY_BYTES
        if len(self._entries) >= self._limits.entries_max or self.key_count + keys > self._limits.keys_max:
            return False
        following = before if before in self._entries else _END
        former = self._before[following]
        self._after[former] = self._before[following] = name
        self._after[name], self._before[name] = following, former
        self._entries[name] = entry
        self.key_count += keys
        return True

    def remove(self, request_id: str) -> bool:
        """Whether it was in the queue."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return False
        before, after = self._before.pop(request_id), self._after.pop(request_id)
        self._after[before], self._before[after] = after, before
        self.key_count -= len(entry.subject.packed_keys) // KEY_BYTES
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
