"""Text tables with a header that names the columns: their names, units in brackets, and fields."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from kvservice.simulate.traces.lines import BadLine, seconds, shown, whole_number

#: A name with its unit, such as `time_stamp(seconds)` or `Latency [ms]`.
_WITH_UNIT = re.compile(r"(.*\w)\s*[(\[]\s*([^)\]]*?)\s*[)\]]\s*")
_TIME_UNITS_S = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "usec", "\u00b5s", "\u03bcs", "microsecond", "microseconds"), 1e-6),
    **dict.fromkeys(("ns", "nsec", "nanosecond", "nanoseconds"), 1e-9),
}
_DIGITS = re.compile(r"[+-]?\d{1,40}\Z", re.ASCII)


def plain(name: str) -> str:
    """A column's name in lower case without punctuation and unit: `User-ID` and `user_id` become equal."""
    return re.sub(r"[\W_]", "", _split(name)[0]).lower()


def unit_s(name: str) -> float | None:
    """Seconds per unit of a column of times, from the unit in its brackets. None without brackets. Raises BadLine."""
    unit = _split(name)[1]
    if unit is None:
        return None
    if unit.lower() not in _TIME_UNITS_S:
        raise BadLine(f"the header gives {name.strip()!r} in a unit that is not known: it must be s, ms, us or ns")
    return _TIME_UNITS_S[unit.lower()]


def _split(name: str) -> tuple[str, str | None]:
    found = _WITH_UNIT.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def csv_rows(text: Iterable[str]) -> Iterator[list[str]]:
    """The header and the rows of a CSV file. Raises BadLine for a row that is not as long as the header."""
    rows = csv.reader(text, strict=True)
    try:
        header = next(rows)
        yield header
        for row in rows:
            if len(row) != len(header):
                raise BadLine(f"has {len(row)} fields and the header {len(header)}: is the line cut off?")
            yield row
    except csv.Error as error:
        raise BadLine(str(error)) from None


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


def time_s(name: str, field: str, least_s: float, per_unit_s: float = 1.0) -> float:
    """The time in `field` in seconds: a number times `per_unit_s`, or an ISO 8601 date and time (UTC without a zone).

    Raises BadLine, also for a time before `least_s`.
    """
    try:
        return seconds(name, float(field), least_s, per_unit_s)
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
