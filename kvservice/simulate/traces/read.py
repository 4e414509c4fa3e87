"""Reads a trace of any known format. The caller names the format, or it is recognised from the first line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from kvservice.simulate.traces import azure, bailian, burstgpt, jsonl, mooncake, recorded, text, tracelab, weka
from kvservice.simulate.traces.lines import BadLine, Lines, TraceError
from kvservice.simulate.workload import Workload

_READERS: dict[str, Callable[..., Workload]] = {
    "jsonl": jsonl.read_sessions,
    "recorded": recorded.read_turns,
    "mooncake": mooncake.read_prefixes,
    "mooncake-sessions": mooncake.read_conversations,
    "bailian": bailian.read_chats,
    "bailian-prefixes": bailian.read_prefixes,
    "weka": weka.read_sessions,
    "tracelab": tracelab.read_rounds,
    "azure": azure.read_requests,
    "burstgpt": burstgpt.read_requests,
    "text": text.read_users,
}
FORMATS = ("auto", *_READERS)
#: Formats whose blocks may have another size than the format's own.
WITH_BLOCKS = ("mooncake", "mooncake-sessions", "bailian-prefixes")
#: Formats without a clock that the sessions share.
WITHOUT_CLOCK = ("weka",)

# A format is recognised by two of its fields. An earlier one may have the fields of a later one too.
_FIELDS = (
    ("recorded", recorded.FIELDS),
    ("bailian", bailian.FIELDS),
    ("mooncake", mooncake.FIELDS),
    ("weka", weka.FIELDS),
    ("tracelab", tracelab.FIELDS),
    ("jsonl", jsonl.FIELDS),
)


def read(
    path: str | Path,
    format: str = "auto",  # noqa: A002
    *,
    block_tokens: int | None = None,
    session_rate: float | None = None,
    seed: int = 0,
) -> Workload:
    """The trace in `path` as a workload. `auto` recognises the format by the first line, not by the file's name.

    `block_tokens` is for the formats of `WITH_BLOCKS`, and the format's own size by default. `session_rate` in sessions
    per second, and `seed`, are for the formats of `WITHOUT_CLOCK`. Others ignore them. Only `weka` reads folders.
    Raises TraceError with the line and the reason, and ValueError for an unknown format.
    """
    path = Path(path)
    if format == "auto":
        format = format_of(path)  # noqa: A001
    if format not in _READERS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    options: dict[str, Any] = {}
    if format in WITH_BLOCKS and block_tokens is not None:
        options["block_tokens"] = block_tokens
    if format in WITHOUT_CLOCK:
        options["seed"] = seed
        if session_rate is not None:
            options["session_rate"] = session_rate
    if format == "weka" and path.is_dir():
        return weka.read_folder(path, **options)
    with Lines(path) as lines:
        rows = iter(lines)
        first = next(rows, None)
        if first is None:
            raise TraceError(lines.path, None, "is empty")
        return _READERS[format](lines, chain([first], rows), **options)


def format_of(path: str | Path) -> str:
    """The format of a trace, from its first line. A folder has files of Weka's format. Raises TraceError."""
    path = Path(path)
    with Lines(weka.files_of(path)[0] if path.is_dir() else path) as lines:
        first = next(iter(lines), None)
        if first is None:
            raise TraceError(lines.path, None, "is empty")
        try:
            found = recognised(first)
        except BadLine as error:
            raise lines.refusal(error) from None
        if path.is_dir() and found != "weka":
            raise TraceError(path, None, f"is a folder, and {lines.path.name} in it is no session of an agent")
        return found


def recognised(first_line: str) -> str:
    """The format of a trace with this first line. Raises BadLine if it matches no format."""
    if weka.is_first_line(first_line):
        return "weka"
    if first_line.lstrip()[0] in "{[":
        keys = jsonl.parse(first_line).keys()
        for name, fields in _FIELDS:
            if len(keys & fields) >= 2:
                return name
        raise BadLine(f"is a JSON object of no known format: it has {', '.join(sorted(keys)) or 'nothing'}"[:300])
    for name, is_header in (("azure", azure.is_header), ("burstgpt", burstgpt.is_header), ("text", text.is_header)):
        if is_header(first_line):
            return name
    raise BadLine(
        "is of no known format: neither a JSON object, nor a header with TIMESTAMP,ContextTokens,GeneratedTokens or"
        " Timestamp,Request tokens,Response tokens, nor words that name user, time, query length and response length"
    )
