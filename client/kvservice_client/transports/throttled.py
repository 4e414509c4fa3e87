"""A transport as if its link were slower: for measurements and tests of what is built on top.

How layers come in while a model computes cannot be seen on a link that is faster than any model. With
``Client(..., throttle_bytes_per_s=50e6)`` the bytes arrive at that rate, layer by layer, whatever carries them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

from kvservice_api.errors import NotShared
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import LoadOrder, SaveOrder, Transport, Verify
from kvservice_client.transports.in_place import View


class Throttled:
    """Loads share one direction of the link, saves the other. An idle link saves up nothing."""

    def __init__(self, transport: Transport, bytes_per_s: float) -> None:
        self.name = transport.name
        self._transport = transport
        self._down, self._up = _Link(bytes_per_s), _Link(bytes_per_s)

    def load(self, order: LoadOrder, deadline: Deadline) -> Iterator[Bytes]:
        # Loads of transports are generators, though only promised to be iterators, which have no `close`: leaving one
        # ends it.
        with closing(iter(self._transport.load(order, deadline))) as layers:  # type: ignore[type-var]
            while True:
                begin_s = time.monotonic()
                data = next(layers, None)
                if data is None:
                    return
                self._down.carry(data.size, begin_s, deadline)
                yield data

    def view(self, order: LoadOrder, deadline: Deadline, verify: Verify) -> View:
        raise NotShared("a view moves no bytes that could be slowed down: load the blocks")

    def save(self, order: SaveOrder, deadline: Deadline) -> pb.SaveBlocksResponse:
        begin_s = time.monotonic()
        answer = self._transport.save(order, deadline)
        self._up.carry(sum(piece.size for layer in order.layers for piece in layer), begin_s, deadline)
        return answer


class _Link:
    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def carry(self, size_bytes: int, begin_s: float, deadline: Deadline) -> None:
        """Return when these bytes would have arrived, sent from `begin_s` on behind what others send.

        Raises DeadlineExceeded.
        """
        with self._lock:
            self._free_at_s = max(self._free_at_s, begin_s) + size_bytes / self._bytes_per_s
            end_s = self._free_at_s
        # This is what slows it down.
        time.sleep(max(0.0, min(end_s - time.monotonic(), deadline.remaining_s)))
        if time.monotonic() < end_s:
            deadline.check()
