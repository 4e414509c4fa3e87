"""Log lines that repeat while a condition lasts, such as a daemon that is down: the first at once, then few.

    log = RateLimitedLog(logging.getLogger(__name__))
    log.warning("a save failed: %s", error.message)     # at most one line per minute of this text

Two lines are the same if their format text and their `kind` are the same. Give an error's reason as `kind`, so that
each reason has a line. Put the reason into the text too: by default Python does not print ``extra`` fields.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvservice_client import forks

_TEXTS_MAX = 1000  # Texts are written in the code, so there are few; should one be made at run time, memory is bounded.


class RateLimitedLog:
    """A logger that writes a text again only after `every_s`, and then says how often it was left out.

    Thread-safe. `clock` returns seconds that never go back.
    """

    def __init__(
        self, logger: logging.Logger, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._every_s = every_s
        self._clock = clock
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        # (text, kind) -> when it was written, how often it was left out since then.
        self._written: dict[tuple[str, str], tuple[float, int]] = {}

    def info(self, text: str, *arguments: object, kind: str = "") -> None:
        self._log(logging.INFO, text, arguments, kind)

    def warning(self, text: str, *arguments: object, kind: str = "") -> None:
        self._log(logging.WARNING, text, arguments, kind)

    def _log(self, level: int, text: str, arguments: tuple[object, ...], kind: str) -> None:
        if not self._logger.isEnabledFor(level):
            return
        left_out = self._left_out((text, kind))
        if left_out is None:
            return
        if left_out:
            text, arguments = f"{text} (and %d times before, since the last such line)", (*arguments, left_out)
        self._logger.log(level, text, *arguments, stacklevel=3)

    def _left_out(self, line: tuple[str, str]) -> int | None:
        """How often the line was left out before this one; None if this one must be left out too."""
        now_s = self._clock()
        with self._lock:
            written_s, left_out = self._written.get(line, (-float("inf"), 0))
            if now_s - written_s < self._every_s:
                self._written[line] = (written_s, left_out + 1)
                return None
            if len(self._written) >= _TEXTS_MAX:
                self._written.clear()
            self._written[line] = (now_s, 0)
            return left_out
