"""The meter: bytes and operations per transport and direction, as `Client.stats` returns them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvservice_client import forks


@dataclass(frozen=True, slots=True)
class TransportStats:
    """The counts of one transport since the client was made.

    Bytes are payload. Operations are those that it completed. Seconds are its working time, without the caller's time
    between two layers. `fallbacks` are the operations that it could not carry, completely or in part, so that the next
    transport did. `mismatches` are the loads and views whose bytes in place did not match their checksums. They are not
    fallbacks, although the daemon then verifies the bytes through the next transport.
    """

    loads: int = 0
    saves: int = 0
    views: int = 0
    loaded_bytes: int = 0
    saved_bytes: int = 0
    viewed_bytes: int = 0
    load_seconds: float = 0.0
    save_seconds: float = 0.0
    fallbacks: int = 0
    mismatches: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Payload bytes since the client was made, by transport ("shm", "grpc"); views are read in place, uncopied.

    A forked child counts from zero.

    `shm_refused_because` is the last reason why shared memory was not used; empty if it was always used, or not
    requested. `transports` has all counts, for each transport that was tried.
    """

    loaded_bytes: Mapping[str, int]
    saved_bytes: Mapping[str, int]
    viewed_bytes: int
    shm_refused_because: str
    transports: Mapping[str, TransportStats] = field(default_factory=dict)


class Meter:
    """Counts for all transports alike. Thread-safe. A forked child counts from zero."""

    def __init__(self) -> None:
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, TransportStats] = {}
        self._refused_because: dict[str, str] = {}

    def add(
        self,
        transport: str,
        *,
        loads: int = 0,
        saves: int = 0,
        views: int = 0,
        loaded_bytes: int = 0,
        saved_bytes: int = 0,
        viewed_bytes: int = 0,
        load_seconds: float = 0.0,
        save_seconds: float = 0.0,
        mismatches: int = 0,
    ) -> None:
        with self._lock:
            was = self._counts.get(transport) or TransportStats()
            self._counts[transport] = TransportStats(
                was.loads + loads,
                was.saves + saves,
                was.views + views,
                was.loaded_bytes + loaded_bytes,
                was.saved_bytes + saved_bytes,
                was.viewed_bytes + viewed_bytes,
                was.load_seconds + load_seconds,
                was.save_seconds + save_seconds,
                was.fallbacks,
                was.mismatches + mismatches,
            )

    def fell_back(self, transport: str, why: str) -> None:
        with self._lock:
            was = self._counts.get(transport) or TransportStats()
            self._counts[transport] = replace(was, fallbacks=was.fallbacks + 1)
            self._refused_because[transport] = why

    def stats(self) -> Stats:
        with self._lock:
            counts, because = dict(self._counts), self._refused_because.get("shm", "")
        return Stats(
            {name: count.loaded_bytes for name, count in counts.items() if count.loaded_bytes},
            {name: count.saved_bytes for name, count in counts.items() if count.saves},
            sum(count.viewed_bytes for count in counts.values()),
            because,
            counts,
        )
