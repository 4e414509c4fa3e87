"""Text tables with a header that names the columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from kvservice.simulate.traces.lines import BadLine, seconds, shown, whole_number

_DIGITS = re.compile(r"[+-]?\d{1,40}\Z", re.ASCII)


def plain(name: str) -> str:
    """A column's name in lower case without punctuation: `User-ID` and `user_id` become equal."""
    return re.sub(r"[\W_]", "", name).lower()


def find_column(header: Sequence[str], spellings: Sequence[str]) -> int | None:
    """The index in `header` of the first of `spellings` that it has, or None. Raises BadLine if it has it twice."""
    names = [plain(name) for name in header]
    for spelling in spellings:
        if names.count(spelling) > 1:
            raise BadLine(f"the header names {header[names.index(spelling)]!r} twice")
        if spelling in names:
            return names.index(spelling)
    return None


def count(name: str, field: str, most: int) -> int:
    """The integer in `field`, from 0 to `most`. Raises BadLine."""
    if field.isdecimal() and len(field) < 19:
        value = int(field)
        if value <= most:
            return value
    return whole_number(name, int(field) if _DIGITS.match(field) else field, most)


def time_s(name: str, field: str, least_s: float, unit_s: float = 1.0) -> float:
    """The time in `field` in seconds: a number times `unit_s`, or an ISO 8601 date and time (UTC without a zone).

    Raises BadLine, also for a time before `least_s`.
    """
    try:
        return seconds(name, float(field), least_s, unit_s)
    except BadLine:
        raise
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(field)
    except ValueError:
        raise BadLine(f"{name} is neither a number nor a date and time: {shown(field)}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    at_s = moment.timestamp()
    if at_s < least_s:
        raise BadLine(f"{name} goes back: {field} is after a later line; lines must ascend in time")
    return at_s
