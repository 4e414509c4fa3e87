"""Text columns separated by spaces, or by commas as in CSV: a header that names the columns, then one request per line.

Columns are user, time (seconds), query length, response length (tokens) and an optional round. They may be in any
order, in any of the common spellings, with other columns among them. A time may have its unit in brackets:
`time_stamp(seconds)`, `(ms)`, `(us)`.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kvservice.simulate.traces.columns import count, csv_rows, find_column, plain, time_s, unit_s
from kvservice.simulate.traces.jsonl import TURNS_MAX, wrong_turn
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines, TraceError
from kvservice.simulate.traces.turn_columns import TurnColumns, view
from kvservice.simulate.workload import Workload

# If a header has several spellings, the first in this list is taken. `plain` removes case, `_` and `-`.
_LENGTH = ("length", "len", "tokens", "size")
_SPELLINGS = {
    "user": ("user", "userid", "uid", "username", "client", "clientid", "session", "sessionid", "conversationid"),
    "time": (
        *("time", "timestamp", "arrival", "arrivaltime", "arrivaltimestamp", "requesttime", "starttime"),
        *("times", "timesec", "timeseconds", "timestamps", "arrivals", "arrivaltimes", "ts", "t"),
        *("timems", "timestampms", "arrivalms", "arrivaltimems", "requesttimems"),
    ),
    "query length": tuple(
        word + length for length in (*_LENGTH, "") for word in ("query", "prompt", "request", "input", "question")
    ),
    "response length": tuple(
        word + length
        for length in (*_LENGTH, "")
        for word in ("response", "reply", "answer", "output", "generated", "completion")
    ),
    "round": ("round", "roundid", "roundnumber", "roundindex", "roundno", "rounds", "turn", "turnid", "turnnumber"),
}
_MS = 1e-3


def is_header(line: str) -> bool:
    """Whether the line names at least two columns of this format."""
    return sum(column is not None for column in _find(_words(line))) >= 2


def read_users(lines: Lines, text: Iterable[str]) -> Workload:
    """A workload of sessions. Without rounds a user is a session.

    With rounds, a turn with the trace's lowest round, 0 or 1, begins a new session of its user. A user's first session
    may begin with any round, because a trace may begin in the middle of it. Raises TraceError.
    """
    turns, rounds, numbers = TurnColumns(), array("i"), array("i")
    users: dict[str, int] = {}
    now_s = float("-inf")
    rows = _rows(text)
    try:
        header = next(rows)
        user_at, time_at, query_at, response_at, round_at = _columns(header)
        per_unit_s = unit_s(header[time_at])
        if per_unit_s is None:
            per_unit_s = _MS if plain(header[time_at]).endswith("ms") else 1.0
        for row in rows:
            now_s = time_s(header[time_at], row[time_at], now_s, per_unit_s)
            query_tokens = count(header[query_at], row[query_at], TOKENS_MAX)
            response_tokens = count(header[response_at], row[response_at], TOKENS_MAX)
            if round_at is not None:
                rounds.append(count(header[round_at], row[round_at], TURNS_MAX))
                numbers.append(lines.number)
            turns.add(users.setdefault(row[user_at], len(users)), now_s, query_tokens, response_tokens)
    except BadLine as error:
        raise lines.refusal(error) from None
    del users  # Their names need more memory than the turns.
    if rounds:
        try:
            turns.session = _sessions(view(turns.session, np.int32), view(rounds, np.int32))
        except _WrongRound as error:
            reason = wrong_turn("this user", error.round_number, error.expected, "round")
            raise TraceError(lines.path, numbers[error.row], reason) from None
    return turns.workload(lines.path)


class _WrongRound(Exception):
    def __init__(self, row: int, round_number: int, expected: int) -> None:
        super().__init__(row, round_number, expected)
        self.row, self.round_number, self.expected = row, round_number, expected


def _sessions(user: NDArray[np.int32], rounds: NDArray[np.int32]) -> array[int]:
    """The session of each turn, numbered by first appearance. Raises _WrongRound for the first wrong round."""
    order = np.argsort(user, kind="stable")
    of_user, ordered = user[order], rounds[order]
    same_user = np.zeros(len(order), np.bool_)
    same_user[1:] = of_user[1:] == of_user[:-1]
    follows = np.zeros(len(order), np.bool_)
    follows[1:] = ordered[1:] == ordered[:-1] + 1
    # If no turn of the trace has round 0, its sessions begin with round 1.
    begins = ordered == min(int(rounds.min()), 1)
    wrong = np.flatnonzero(same_user & ~follows & ~begins)
    if len(wrong):
        at = wrong[order[wrong].argmin()]
        raise _WrongRound(int(order[at]), int(ordered[at]), int(ordered[at - 1]) + 1)
    run = np.cumsum(~same_user | ~follows) - 1
    # Runs are numbered user by user. Renumber them by their first line.
    first_row = order[np.flatnonzero(np.diff(run, prepend=-1))]
    number = np.empty(len(first_row), np.int32)
    number[np.argsort(first_row)] = np.arange(len(first_row), dtype=np.int32)
    session = np.empty(len(order), np.int32)
    session[order] = number[run]
    return array("i", session.tobytes())


def _rows(text: Iterable[str]) -> Iterator[list[str]]:
    lines = iter(text)
    first = next(lines)
    if "," in first:
        yield from csv_rows(chain([first], lines))
        return
    header = _words(first)
    yield header
    for line in lines:
        row = line.split()
        if len(row) != len(header):
            raise BadLine(f"has {len(row)} words and the header {len(header)}: is the line cut off?")
        yield row


def _words(header: str) -> list[str]:
    if "," in header:
        return header.split(",")
    # A unit belongs to the name before it: `time (ms)` is one column.
    return re.sub(r"\s+([(\[])", r"\1", header.lstrip("#")).split()


def _find(header: Sequence[str]) -> list[int | None]:
    return [find_column(header, spellings) for spellings in _SPELLINGS.values()]


def _columns(header: Sequence[str]) -> tuple[int, int, int, int, int | None]:
    user, time, query, response, round_ = _find(header)
    if user is None or time is None or query is None or response is None:
        missing = [
            name for name, column in zip(_SPELLINGS, (user, time, query, response), strict=False) if column is None
        ]
        raise BadLine(f"the header names no {' and no '.join(missing)}")
    return user, time, query, response, round_
