"""Structured logs on standard error: one line per event, as JSON or as text.

The message gives the reason; the other facts of the event are fields. Repeated lines are limited.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(level: str, form: str) -> None:
    """Send all logs to standard error, from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RateLimit())
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("grpc").setLevel(logging.WARNING)  # Its own debug lines: one per call, that a loop is running.


class RateLimit(logging.Filter):
    """Pass the first 100 lines of each kind per minute: a broken disk repeats its line for each block.

    A kind is the place in the code that writes the line. The first line of a kind in a later minute has the field
    `left_out`: how many were not written before it. Lines below INFO are all written.
    """

    def __init__(self, lines: int = 100, period_s: float = 60.0) -> None:
        super().__init__()
        self._lines = lines
        self._period_s = period_s
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, int], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO:
            return True
        with self._lock:
            kind = self._kinds.setdefault((record.pathname, record.lineno), _Kind(record.created))
            if not 0 <= record.created - kind.began_s < self._period_s:  # Below 0: the clock was set back.
                if kind.count > self._lines:
                    record.left_out = kind.count - self._lines
                kind.began_s, kind.count = record.created, 0
            kind.count += 1
            return kind.count <= self._lines


@dataclass(slots=True)
class _Kind:
    began_s: float
    count: int = 0


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + (f"  {fields}" if fields else "")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}
