"""A link that is slower than it is: for measurements and tests of what is built on top.

How layers come in while a model computes cannot be seen on a link that is faster than any model. With
``Client(..., throttle_bytes_per_s=50e6)`` the bytes arrive at that rate, layer by layer, whatever carries them.
"""

from __future__ import annotations

import threading
import time

from kvservice_client import forks
from kvservice_client.retry import Deadline


class Throttle:
    """One direction of the link, shared by what travels in it. An idle link saves up nothing."""

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
