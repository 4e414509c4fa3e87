"""KVService's own format: one JSON object per line, a turn or an event.

Turns: ``{"t": seconds, "session": str, "turn": int, "new_tokens": int, "output_tokens": int}``
Events: ``{"t": seconds, "session": str, "event": "typing" | "tool_call" | "ended"}``
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence

from kvservice.policy.items import HINTS
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines, seconds, shown, whole_number
from kvservice.simulate.traces.turn_columns import EventColumns, TurnColumns
from kvservice.simulate.workload import Workload

FIELDS = frozenset(("t", "session", "turn", "new_tokens", "output_tokens", "event"))
TURNS_MAX = 2**31 - 1
_EVENTS = HINTS[1:]


def read_sessions(lines: Lines, text: Iterable[str]) -> Workload:
    """A workload of sessions. Lines ascend in time; times may be equal.

    The turns of a session are numbered without a gap, from any number on: a log may begin in the middle of a
    conversation, whose earlier turns are then unknown. Raises TraceError.
    """
    turns, events = TurnColumns(), EventColumns()
    numbers: dict[str, int] = {}  # Session -> its number.
    next_turn = array("q")
    turns_read = array("i")
    now_s = 0.0
    for line in text:
        try:
            row = parse(line)
            now_s = seconds("t", row.get("t"), now_s)
            name = row.get("session")
            if type(name) is not str:
                raise BadLine(f"session must be a string, not {shown(name)}")
            session = numbers.get(name, -1)
            if "event" in row:
                event = one_of("event", row["event"], _EVENTS)
                if not row.keys().isdisjoint(("turn", "new_tokens", "output_tokens")):
                    raise BadLine("is a turn and an event at once")
                if session >= 0:  # Before a session's first request nothing is stored, so the event is ignored.
                    events.add(session, event, now_s, turns_read[session])
                continue
            turn = whole_number("turn", row.get("turn"), TURNS_MAX)
            if session >= 0 and turn != next_turn[session]:
                raise BadLine(wrong_turn(f"session {shown(name)}", turn, next_turn[session]))
            new_tokens = whole_number("new_tokens", row.get("new_tokens"), TOKENS_MAX)
            output_tokens = whole_number("output_tokens", row.get("output_tokens"), TOKENS_MAX)
        except BadLine as error:
            raise lines.refusal(error) from None
        if session < 0:
            session = numbers[name] = len(numbers)
            next_turn.append(0)
            turns_read.append(0)
        turns.add(session, now_s, new_tokens, output_tokens)
        next_turn[session] = turn + 1
        turns_read[session] += 1
    del numbers  # Its strings need more memory than the turns.
    return turns.workload(lines.path, events)


def parse(line: str) -> dict[str, object]:
    """The JSON object of one line. Raises BadLine."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise BadLine("is nested too deep") from None
    except ValueError as error:
        raise BadLine(f"is no whole JSON object ({error}); the line may be cut off, or of another format") from None
    if type(row) is not dict:
        raise BadLine("is JSON, but no object")
    return row


def one_of(name: str, value: object, names: Sequence[str]) -> str:
    """`value`, if it is one of `names`. Raises BadLine."""
    if type(value) is not str or value not in names:
        raise BadLine(f"{name} must be one of {', '.join(names)}, not {shown(value)}")
    return value


def wrong_turn(owner: str, turn: int, expected: int, what: str = "turn") -> str:
    """The reason why `turn` is not the next turn of `owner`, a session or a user."""
    if turn == expected - 1:
        return f"{what} {turn} of {owner} comes twice"
    missing = ": some between are missing" if turn > expected else ""
    return f"{what} {turn} of {owner} comes after {what} {expected - 1}{missing}"
