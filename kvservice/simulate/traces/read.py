"""Reads a trace of any known format. The caller names the format, or it is recognised from the first line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from kvservice.simulate.traces import azure, burstgpt, jsonl, mooncake, text
from kvservice.simulate.traces.lines import BadLine, Lines, TraceError
from kvservice.simulate.workload import Workload

_READERS: dict[str, Callable[[Lines, Iterable[str]], Workload]] = {
    "jsonl": jsonl.read_sessions,
    "mooncake": mooncake.read_prefixes,
    "mooncake-sessions": mooncake.read_conversations,
    "azure": azure.read_requests,
    "burstgpt": burstgpt.read_requests,
    "text": text.read_users,
}
FORMATS = ("auto", *_READERS)


def read(path: str | Path, format: str = "auto") -> Workload:  # noqa: A002
    """The trace in `path` as a workload. `auto` recognises the format by the first line, not by the file's name.

    Raises TraceError with the line and the reason, and ValueError for an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    with Lines(Path(path)) as lines:
        rows = iter(lines)
        first = next(rows, None)
        if first is None:
            raise TraceError(lines.path, None, "is empty")
        if format == "auto":
            try:
                format = recognised(first)  # noqa: A001
            except BadLine as error:
                raise lines.refusal(error) from None
        return _READERS[format](lines, chain([first], rows))


def recognised(first_line: str) -> str:
    """The format of a trace with this first line. Raises BadLine if it matches no format."""
    if first_line.lstrip()[0] in "{[":
        keys = jsonl.parse(first_line).keys()
        for name, fields in (("mooncake", mooncake.FIELDS), ("jsonl", jsonl.FIELDS)):
            if len(keys & fields) >= 2:
                return name
        raise BadLine(f"is a JSON object of no known format: it has {', '.join(sorted(keys)) or 'nothing'}"[:300])
    if azure.is_header(first_line):
        return "azure"
    if burstgpt.is_header(first_line):
        return "burstgpt"
    if text.is_header(first_line):
        return "text"
    raise BadLine(
        "is of no known format: neither a JSON object, nor a header with TIMESTAMP,ContextTokens,GeneratedTokens"
        " or Timestamp,Request tokens,Response tokens,"
        " nor words that name user, time, query length and response length"
    )
