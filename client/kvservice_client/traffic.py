"""How many bytes went which way: what `Client.stats` tells."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import LoadOrder, SaveOrder, Transport, Verify
from kvservice_client.transports.in_place import View


@dataclass(frozen=True, slots=True)
class Stats:
    """Payload bytes since the client was made, by transport ("shm", "grpc"); views are read in place, uncopied.

    A forked child counts from zero.

    `shm_refused_because` says why shared memory was not used the last time that it was not; empty where it
    always was, or was not wanted.
    """

    loaded_bytes: Mapping[str, int]
    saved_bytes: Mapping[str, int]
    viewed_bytes: int
    shm_refused_because: str


class Traffic:
    """Counts. Thread-safe. A forked child counts from zero."""

    def __init__(self) -> None:
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._loaded: Counter[str] = Counter()
        self._saved: Counter[str] = Counter()
        self._viewed_bytes = 0
        self._refused_because = ""

    def loaded(self, transport: str, size_bytes: int) -> None:
        with self._lock:
            self._loaded[transport] += size_bytes

    def saved(self, transport: str, size_bytes: int) -> None:
        with self._lock:
            self._saved[transport] += size_bytes

    def viewed(self, size_bytes: int) -> None:
        with self._lock:
            self._viewed_bytes += size_bytes

    def refused(self, why: str) -> None:
        self._refused_because = why

    def stats(self) -> Stats:
        with self._lock:
            return Stats(dict(self._loaded), dict(self._saved), self._viewed_bytes, self._refused_because)


class Metered:
    """A transport whose bytes are counted."""

    def __init__(self, transport: Transport, traffic: Traffic) -> None:
        self.name = transport.name
        self._transport = transport
        self._traffic = traffic

    def load(self, order: LoadOrder, deadline: Deadline) -> Iterator[Bytes]:
        for data in self._transport.load(order, deadline):
            self._traffic.loaded(self.name, len(data))
            yield data

    def view(self, order: LoadOrder, deadline: Deadline, verify: Verify) -> View:
        return self._transport.view(order, deadline, verify)

    def save(self, order: SaveOrder, deadline: Deadline) -> pb.SaveBlocksResponse:
        answer = self._transport.save(order, deadline)
        self._traffic.saved(self.name, sum(piece.size for layer in order.layers for piece in layer))
        return answer
