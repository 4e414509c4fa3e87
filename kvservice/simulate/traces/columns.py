"""Tables as text, with a header that names the columns: fields are strings, numbers are written in digits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from kvservice.simulate.traces.lines import BadLine, seconds, shown, whole_number

_DIGITS = re.compile(r"[+-]?\d{1,40}\Z", re.ASCII)


def plain(name: str) -> str:
    """A column's name without case and signs, so that `User-ID` and `user_id` are one."""
    return re.sub(r"[\W_]", "", name).lower()


def find_column(header: Sequence[str], spellings: Sequence[str]) -> int | None:
    """Where the first of `spellings` that `header` has stands in it. Raises BadLine where it stands there twice."""
    names = [plain(name) for name in header]
    for spelling in spellings:
        if names.count(spelling) > 1:
            raise BadLine(f"the header names {header[names.index(spelling)]!r} twice")
        if spelling in names:
            return names.index(spelling)
    return None


def count(name: str, field: str, most: int) -> int:
    """The number that is written in `field`, from 0 to `most`. Raises BadLine."""
    if field.isdecimal() and len(field) < 19:
        value = int(field)
        if value <= most:
            return value
    return whole_number(name, int(field) if _DIGITS.match(field) else field, most)


def time_s(name: str, field: str, least_s: float, unit_s: float = 1.0) -> float:
    """The time that is written in `field`: a number, or date and time by ISO 8601, of UTC where it has no zone.

    Raises BadLine.
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
        raise BadLine(f"{name} goes back: {field} comes after a later line; lines must ascend in time")
    return at_s
