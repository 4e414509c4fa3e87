"""BurstGPT's format: CSV with the columns Timestamp, Request tokens, Response tokens, and in newer files Session ID.

Times are seconds. Request tokens are the whole prompt, with the history of the conversation. A prompt that cannot hold
the prompt and the answer before it had its history cut from the front: no prefix is left, so a new session begins.
Requests without a session id, which came by the API, are sessions of one turn. A request without a response failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvservice.simulate.traces.columns import count, csv_rows, find_column, plain, time_s, unit_s
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines
from kvservice.simulate.traces.turn_columns import NO_SESSIONS
from kvservice.simulate.traces.whole_prompts import WholePrompts
from kvservice.simulate.workload import Workload

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
_SESSION = "Session ID"


def is_header(line: str) -> bool:
    """Whether the line is a line of CSV that names both columns of tokens."""
    names = {plain(name) for name in line.split(",")}
    return "," in line and names.issuperset(map(plain, _COLUMNS[1:]))


def read_requests(lines: Lines, text: Iterable[str]) -> Workload:
    """A workload of sessions. Raises TraceError."""
    prompts = WholePrompts()
    newest: dict[str, int] = {}  # Session id -> the session that its next request may continue.
    failed = 0
    now_s = float("-inf")
    rows = csv_rows(text)
    try:
        header = next(rows)
        time_at, request_at, response_at = _columns(header)
        session_at = find_column(header, (plain(_SESSION), "session"))
        per_unit_s = unit_s(header[time_at]) or 1.0
        for row in rows:
            now_s = time_s(header[time_at], row[time_at].strip(), now_s, per_unit_s)
            prompt_tokens = count(header[request_at], row[request_at].strip(), TOKENS_MAX)
            answer_tokens = count(header[response_at], row[response_at].strip(), TOKENS_MAX)
            if not answer_tokens:
                failed += 1
                continue
            name = row[session_at].strip() if session_at is not None else ""
            session = newest.get(name, -1) if name else -1
            if session >= 0 and prompts.history_tokens(session) <= prompt_tokens:
                prompts.follow(session, now_s, prompt_tokens, answer_tokens)
            else:
                session = prompts.begin(now_s, prompt_tokens, answer_tokens)
                if name:
                    newest[name] = session
    except BadLine as error:
        raise lines.refusal(error) from None
    notes = [] if newest else [NO_SESSIONS]
    if failed:
        notes.append(f"Left out: requests without a response, which failed ({failed:,}).")
    return prompts.turns.workload(lines.path, notes=tuple(notes))


def _columns(header: Sequence[str]) -> list[int]:
    found = [find_column(header, (plain(name),)) for name in _COLUMNS]
    if missing := [name for name, column in zip(_COLUMNS, found, strict=True) if column is None]:
        raise BadLine(f"the header lacks {' and '.join(missing)}: it must name {', '.join(_COLUMNS)}")
    return [column for column in found if column is not None]
