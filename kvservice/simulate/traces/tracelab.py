"""TraceLab's format: one JSON object per line, a round of a coding agent, that is one request to its model.

``{"session_id": str, "round_index": int, "input_tokens_total": tokens, "output_tokens": tokens,
"timing_events": [{"event_type": str, "timestamp": date and time}, ...],
"tools": [{"tool_name": str, "emitted_at": date and time}, ...]}``, with other fields among them.

A round has no time of its own. Its request was sent when its last input arrived: a user's message, or a tool's result.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

import numpy as np

from kvservice.simulate.traces.columns import time_s
from kvservice.simulate.traces.jsonl import TURNS_MAX, parse
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines, shown, whole_number
from kvservice.simulate.traces.turn_columns import view
from kvservice.simulate.traces.whole_prompts import WholePrompts
from kvservice.simulate.workload import Workload

FIELDS = frozenset(("session_id", "round_index", "input_tokens_total", "timing_events"))
_INPUTS = ("user_message", "tool_result")
_OUTPUTS = ("reasoning", "text", "tool_call")


class _Rounds:
    def __init__(self) -> None:
        self.session = array("i")
        self.index = array("i")
        self.at_s = array("d")
        self.prompt_tokens = array("i")
        self.answer_tokens = array("i")
        self.calls_at_s = array("d")  # Its first tool call; NaN without one.


def read_rounds(lines: Lines, text: Iterable[str]) -> Workload:
    """A workload of sessions, with a hint before every request that follows a tool call. Lines may be in any order.

    An agent that summarises its history sends a prompt of less than half the length of the prompt before it: from there
    on it is a new session. Rounds without a time or without a count of tokens are left out, and so are copies.
    Raises TraceError.
    """
    rounds = _Rounds()
    names: dict[str, int] = {}
    left_out = 0
    for line in text:
        try:
            left_out += not _add(rounds, names, parse(line))
        except BadLine as error:
            raise lines.refusal(error) from None
    del names
    at_s, session, index = view(rounds.at_s, np.float64), view(rounds.session, np.int32), view(rounds.index, np.int32)
    prompts = WholePrompts()
    newest: dict[int, int] = {}
    before = None
    for number in np.lexsort((index, at_s, session)).tolist() if len(session) else ():
        agent, now_s = rounds.session[number], rounds.at_s[number]
        this = (agent, now_s, rounds.index[number])
        if this == before:
            left_out += 1
            continue
        before = this
        counts = rounds.prompt_tokens[number], rounds.answer_tokens[number]
        known = newest.get(agent, -1)
        if known >= 0 and not prompts.was_cut(known, counts[0]):
            prompts.follow(known, now_s, *counts)
        else:
            known = newest[agent] = prompts.begin(now_s, *counts)
        calls_at_s = rounds.calls_at_s[number]
        if not math.isnan(calls_at_s):
            prompts.hint(known, "tool_call", max(now_s, calls_at_s))
    notes = (f"Left out: rounds without a time or tokens, and copies of rounds ({left_out:,}).",) if left_out else ()
    return prompts.turns.workload(lines.path, prompts.events, notes)


def _add(rounds: _Rounds, names: dict[str, int], row: dict[str, object]) -> bool:
    """Add a round, unless it lacks a time or tokens. Returns whether it was added. Raises BadLine."""
    name = row.get("session_id")
    if type(name) is not str:
        raise BadLine(f"session_id must be a string, not {shown(name)}")
    index = whole_number("round_index", row.get("round_index"), TURNS_MAX)
    prompt, answer = row.get("input_tokens_total"), row.get("output_tokens")
    at_s = _sent_at_s(row.get("timing_events"))
    tools = _objects("tools", row.get("tools"))
    if at_s is None or not prompt or answer is None:
        return False
    calls_at_s = [_moment("tools", "emitted_at", tool.get("emitted_at")) for tool in tools if tool.get("emitted_at")]
    rounds.prompt_tokens.append(whole_number("input_tokens_total", prompt, TOKENS_MAX))
    rounds.answer_tokens.append(whole_number("output_tokens", answer, TOKENS_MAX))
    rounds.session.append(names.setdefault(name, len(names)))
    rounds.index.append(index)
    rounds.at_s.append(at_s)
    rounds.calls_at_s.append(min(calls_at_s, default=at_s) if tools else math.nan)
    return True


def _sent_at_s(events: object) -> float | None:
    """The last input's time, or the first output's if there is no input. None without any."""
    times: dict[object, list[float]] = {}
    for event in _objects("timing_events", events):
        kind, moment = event.get("event_type"), event.get("timestamp")
        if (kind in _INPUTS or kind in _OUTPUTS) and moment is not None:
            times.setdefault(kind in _INPUTS, []).append(_moment("timing_events", "timestamp", moment))
    if True in times:
        return max(times[True])
    return min(times[False]) if times else None


def _objects(name: str, value: object) -> list[dict[str, object]]:
    if value is None:
        return []
    if type(value) is not list or not all(type(each) is dict for each in value):
        raise BadLine(f"{name} must be a list of objects, not {shown(value)}")
    return value


def _moment(owner: str, name: str, value: object) -> float:
    if type(value) is not str:
        raise BadLine(f"{owner}: {name} must be a date and time, not {shown(value)}")
    return time_s(f"{owner}: {name}", value, 0.0)
