"""Reads a trace of any known format, told or recognised by what stands in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from kvservice.simulate.traces.jsonl import parse, read_sessions
from kvservice.simulate.traces.lines import BadLine, Lines, TraceError
from kvservice.simulate.workload import Workload

_READERS: dict[str, Callable[[Lines, Iterable[str]], Workload]] = {
    "jsonl": read_sessions,
}
FORMATS = ("auto", *_READERS)


def read(path: str | Path, format: str = "auto") -> Workload:  # noqa: A002
    """The trace in `path` as turns.

    Raises TraceError with the line and the reason, ValueError for an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    with Lines(Path(path)) as lines:
        text = iter(lines)
        first = next(text, None)
        if first is None:
            raise TraceError(lines.path, None, "is empty")
        if format == "auto":
            try:
                format = recognised(first)  # noqa: A001
            except BadLine as error:
                raise lines.refusal(error) from None
        return _READERS[format](lines, chain([first], text))


def recognised(first_line: str) -> str:
    """The format of a trace that begins with this line. Raises BadLine."""
    row = parse(first_line)
    if row.keys() >= {"t", "session"}:
        return "jsonl"
    raise BadLine("is of no known format")
