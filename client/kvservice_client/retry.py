"""How long a call may take, and what is tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvservice_api.errors import DeadlineExceeded, KVError
from kvservice_client import arguments

T = TypeVar("T")

_PAUSE_FIRST_S = 0.01
_PAUSE_MAX_S = 0.1


class Clock:
    """The client's time in seconds, from a clock that never goes back, and its waits. Tests pass another clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for the event, at most that long. Whether it is set."""
        return event.wait(seconds)

    def wait_for(self, changed: threading.Condition, predicate: Callable[[], object], seconds: float) -> bool:
        """As ``changed.wait_for(predicate, seconds)``, with its lock held. Whether the predicate is true."""
        return bool(changed.wait_for(predicate, seconds))


SYSTEM_CLOCK = Clock()


class Deadline:
    """A moment on the client's clock."""

    def __init__(self, seconds: float, clock: Clock = SYSTEM_CLOCK) -> None:
        """Raises InvalidRequest where `seconds` is not a number from 0 to 1e9."""
        self.allowed_s = seconds = arguments.seconds(seconds, "timeout_s")
        self.clock = clock
        self._end_s = clock.now_s() + seconds

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._end_s - self.clock.now_s())

    def check(self) -> None:
        if not self.remaining_s:
            raise DeadlineExceeded(f"the {self.allowed_s:.3g} s allowed for this call have passed")


def retry(
    attempt: Callable[[], T],
    deadline: Deadline,
    patience_s: float,
    repair: Callable[[KVError], bool],
) -> T:
    """What `attempt` returns. Only for what may run twice.

    After an error, `repair` says whether another attempt can help. Attempts end with the deadline,
    or after `patience_s`, whichever comes first: an engine recomputes sooner than it waits.
    """
    patience = Deadline(min(patience_s, deadline.remaining_s), deadline.clock)
    pause_s = _PAUSE_FIRST_S
    while True:
        deadline.check()
        try:
            return attempt()
        except KVError as error:
            if not repair(error) or patience.remaining_s < pause_s:
                raise
        deadline.clock.sleep(pause_s)  # Less than what patience and deadline leave: both were asked above.
        pause_s = min(2 * pause_s, _PAUSE_MAX_S)
