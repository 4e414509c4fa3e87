"""Azure's format: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, in any order.

The format has no sessions, so each request is a session of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvservice.simulate.traces.columns import count, csv_rows, find_column, plain, time_s, unit_s
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines
from kvservice.simulate.traces.turn_columns import NO_SESSIONS, TurnColumns
from kvservice.simulate.workload import Workload

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def is_header(line: str) -> bool:
    """Whether the line names a column of tokens of this format and is a line of CSV."""
    names = {plain(name) for name in line.split(",")}
    return "," in line and not names.isdisjoint(map(plain, _COLUMNS[1:]))


def read_requests(lines: Lines, text: Iterable[str]) -> Workload:
    """Raises TraceError."""
    turns = TurnColumns()
    rows = csv_rows(text)
    now_s = float("-inf")
    try:
        header = next(rows)
        columns = _columns(header)
        per_unit_s = unit_s(header[columns[0]]) or 1.0
        for row in rows:
            when, context, generated = (row[column].strip() for column in columns)
            now_s = time_s("TIMESTAMP", when, now_s, per_unit_s)
            context_tokens = count("ContextTokens", context, TOKENS_MAX)
            generated_tokens = count("GeneratedTokens", generated, TOKENS_MAX)
            turns.add(len(turns.session), now_s, context_tokens, generated_tokens)
    except BadLine as error:
        raise lines.refusal(error) from None
    return turns.workload(lines.path, notes=(NO_SESSIONS,))


def _columns(header: Sequence[str]) -> list[int]:
    found = [find_column(header, (plain(name),)) for name in _COLUMNS]
    if missing := [name for name, column in zip(_COLUMNS, found, strict=True) if column is None]:
        raise BadLine(f"the header lacks {' and '.join(missing)}: it must name {', '.join(_COLUMNS)}")
    return [column for column in found if column is not None]
