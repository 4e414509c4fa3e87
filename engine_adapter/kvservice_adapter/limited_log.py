"""Log lines whose rate is limited: while the daemon is down, an engine gets one line per interval, not one per request.

lines = LimitedLog(logging.getLogger(__name__))
lines.warning("lookup", "the history is computed, not loaded: %s: %s", error.reason, error.message)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_INTERVAL_S = 30.0
_EVENTS_MAX = 256


class LimitedLog:
    """Writes at most one line per event and interval, and says how many lines it left out. Thread-safe."""

    def __init__(
        self, log: logging.Logger, interval_s: float = _INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` returns seconds that never go backwards."""
        self._log = log
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._written: dict[str, tuple[float, int]] = {}  # Per event: when, and how many lines were left out since.

    def warning(self, event: str, text: str, *arguments: object) -> None:
        """Log `text` with its %-arguments, unless `event` was logged within the last interval."""
        now_s = self._clock()
        with self._lock:
            last = self._written.get(event)
            if last is not None and now_s - last[0] < self._interval_s:
                self._written[event] = last[0], last[1] + 1
                return
            if len(self._written) >= _EVENTS_MAX:  # Events are a few fixed names, unless a caller errs.
                self._written.clear()
            self._written[event] = now_s, 0
        if last is not None and last[1]:
            text, arguments = text + " (%d more such lines were left out)", (*arguments, last[1])
        self._log.warning(text, *arguments)
