"""Limits the rate of the link between client and daemon, for measurements and tests.

On a fast link all layers arrive before a model needs them. With ``Client(..., throttle_bytes_per_s=50e6)`` the
bytes of each layer arrive at that rate, over any transport.
"""

from __future__ import annotations

import threading

from kvservice_client import forks
from kvservice_client.retry import Deadline


class Throttle:
    """One direction of the link, shared by all calls. An idle link does not save up bandwidth. Thread-safe."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def carry(self, size_bytes: int, begin_s: float, deadline: Deadline) -> None:
        """Block until these bytes would have arrived, if sent from `begin_s` on, after the bytes of earlier calls.

        `begin_s` is a time of the deadline's clock. Raises DeadlineExceeded.
        """
        with self._lock:
            self._free_at_s = max(self._free_at_s, begin_s) + size_bytes / self._bytes_per_s
            end_s = self._free_at_s
        clock = deadline.clock
        clock.sleep(max(0.0, min(end_s - clock.now_s(), deadline.remaining_s)))  # This wait makes the link slow.
        if clock.now_s() < end_s:
            deadline.check()
