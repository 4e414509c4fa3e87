"""Weka's format (kv-cache-tester): one object per session of a coding agent, in a file, a line, or a folder of files.

``{"id": str, "block_size": tokens, "requests": [{"t": seconds, "type": "s" | "n", "model": str, "in": tokens,
"out": tokens, "hash_ids": [int, ...], "stop": str, "api_time": seconds}, ...]}``

Times count from the session's begin. A request may also be a subagent, ``{"t": seconds, "type": "subagent",
"status": str, "duration_ms": int, "requests": [...]}``, whose times count from its own start or, in some files, from
the session's: from its own if any request of a subagent would else come before its subagent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from kvservice.simulate.traces.jsonl import one_of, parse
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines, TraceError, seconds, shown, whole_number
from kvservice.simulate.traces.whole_prompts import WholePrompts
from kvservice.simulate.workload import Workload

FIELDS = frozenset(("requests", "block_size"))
SESSION_RATE = 1 / 60
_MS = 1e-3


def read_sessions(lines: Lines, text: Iterable[str], *, session_rate: float = SESSION_RATE, seed: int = 0) -> Workload:
    """A workload of sessions. The file has no time that its sessions share: `session_rate` of them begin per second.

    An agent's request continues the request with whose blocks it begins: those of the whole prompt, of the same model.
    Its last block may differ. The longest such prompt is taken, then the latest. Other requests, such as the first one
    after a summary of the history, begin a session. The agent announces its tool calls, and the end of a subagent.
    Raises TraceError.
    """
    sessions = _Sessions(session_rate, seed)
    sessions.read(lines, text)
    return sessions.workload(lines.path)


def read_folder(folder: Path, *, session_rate: float = SESSION_RATE, seed: int = 0) -> Workload:
    """`read_sessions` of all files of a folder whose names end in .json, .jsonl, or these and .gz, by name."""
    sessions = _Sessions(session_rate, seed)
    for path in files_of(folder):
        with Lines(path) as lines:
            sessions.read(lines, lines)
    return sessions.workload(folder)


def files_of(folder: Path) -> list[Path]:
    """The files that `read_folder` reads. Raises TraceError if there are none."""
    ends = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
    try:
        found = sorted(path for path in folder.iterdir() if path.name.endswith(ends))
    except OSError as error:
        raise TraceError(folder, None, f"cannot be read: {error.strerror}") from error
    if not found:
        raise TraceError(folder, None, "is a folder without .json files")
    return found


def is_first_line(line: str) -> bool:
    """Whether an object that is not whole in this line may be a session that is written over several lines."""
    return line.strip() == "{"


@dataclass(slots=True)
class _Chain:
    session: int
    model: object
    blocks: list[object]
    at_s: float


class _Sessions:
    def __init__(self, session_rate: float, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._gap_s = 1 / session_rate
        self._begins_s = 0.0
        self._count = 0
        self._prompts = WholePrompts()

    def read(self, lines: Lines, text: Iterable[str]) -> None:
        try:
            for document in _documents(lines, iter(text)):
                if self._count:
                    self._begins_s += float(self._rng.exponential(self._gap_s))
                self._count += 1
                requests = _list("requests", document.get("requests"))
                self._agent(requests, "requests", self._begins_s, _counts_from_subagent(requests))
        except BadLine as error:
            raise lines.refusal(error) from None
        except RecursionError:
            raise lines.refusal("is nested too deep") from None

    def workload(self, path: Path) -> Workload:
        notes: tuple[str, ...] = ()
        if self._count > 1:
            rate = f"{1 / self._gap_s:.3g}"
            notes = (f"The {self._count:,} sessions share no clock: {rate} begin per second (--session-rate).",)
        return self._prompts.turns.workload(path, self._prompts.events, notes)

    def _agent(self, entries: Sequence[object], where: str, begins_s: float, relative: bool) -> list[_Chain]:
        """The requests of one agent. Returns its chains."""
        chains: list[_Chain] = []
        requests: list[tuple[float, str, dict[str, object]]] = []
        for index, entry in enumerate(entries):
            name = f"{where}[{index}]"
            if type(entry) is not dict:
                raise BadLine(f"{name} must be an object, not {shown(entry)}")
            at_s = seconds(f"{name}.t", entry.get("t"), 0.0)
            if one_of(f"{name}.type", entry.get("type"), ("s", "n", "subagent")) == "subagent":
                self._subagent(entry, name, begins_s, at_s, relative)
            else:
                requests.append((begins_s + at_s, name, entry))
        requests.sort(key=lambda request: request[0])
        for at_s, name, entry in requests:
            self._request(chains, name, at_s, entry)
        return chains

    def _subagent(self, entry: dict[str, object], name: str, begins_s: float, at_s: float, relative: bool) -> None:
        requests = _list(f"{name}.requests", entry.get("requests"))
        chains = self._agent(requests, f"{name}.requests", begins_s + at_s * relative, relative)
        if entry.get("status") == "completed":
            duration_ms = entry.get("duration_ms")
            length_s = 0.0 if duration_ms is None else seconds(f"{name}.duration_ms", duration_ms, 0.0, _MS)
            for each in chains:
                self._prompts.hint(each.session, "ended", max(each.at_s, begins_s + at_s + length_s))

    def _request(self, chains: list[_Chain], name: str, at_s: float, entry: dict[str, object]) -> None:
        prompt = whole_number(f"{name}.in", entry.get("in", entry.get("input_length")), TOKENS_MAX)
        answer = whole_number(f"{name}.out", entry.get("out", entry.get("output_length")), TOKENS_MAX)
        blocks = _list(f"{name}.hash_ids", entry.get("hash_ids", []))
        model = entry.get("model")
        found = None
        for each in reversed(chains):
            longer = found is None or len(each.blocks) > len(found.blocks)
            if longer and each.model == model and _begins_with(blocks, each.blocks):
                found = each
        if found is None or (not blocks and self._prompts.was_cut(found.session, prompt)):
            found = _Chain(self._prompts.begin(at_s, prompt, answer), model, blocks, at_s)
            chains.append(found)
        else:
            self._prompts.follow(found.session, at_s, prompt, answer)
            found.blocks, found.at_s = blocks, at_s
        if entry.get("stop") == "tool_use":
            took = entry.get("api_time")
            ends_s = at_s if took is None else at_s + seconds(f"{name}.api_time", took, 0.0)
            self._prompts.hint(found.session, "tool_call", ends_s)


def _documents(lines: Lines, text: Iterator[str]) -> Iterator[dict[str, object]]:
    first = next(text, "")
    if not is_first_line(first):
        yield from map(parse, chain([first], text))
        return
    numbers, parts = [lines.number], [first]
    for line in text:
        numbers.append(lines.number)
        parts.append(line)
    try:
        document = json.loads("\n".join(parts))
    except json.JSONDecodeError as error:
        reason = f"is no whole JSON object ({error.msg}); the file may be cut off"
        raise TraceError(lines.path, numbers[min(error.lineno, len(numbers)) - 1], reason) from None
    except ValueError as error:
        raise BadLine(f"is no whole JSON object ({error})") from None
    lines.number = numbers[0]
    yield document


def _counts_from_subagent(entries: Sequence[object]) -> bool:
    """Whether a request of a subagent has a time before its subagent's."""
    for entry in entries:
        if type(entry) is not dict or entry.get("type") != "subagent":
            continue
        begin, nested = entry.get("t"), entry.get("requests")
        if type(nested) is not list or not isinstance(begin, (int, float)):
            continue
        times = [each.get("t") for each in nested if type(each) is dict]
        if any(isinstance(each, (int, float)) and each < begin for each in times) or _counts_from_subagent(nested):
            return True
    return False


def _begins_with(blocks: list[object], before: list[object]) -> bool:
    count = max(len(before) - 1, min(len(before), 1))
    if not count:
        return not blocks
    return len(blocks) >= count and blocks[count - 1] == before[count - 1] and blocks[:count] == before[:count]


def _list(name: str, value: object) -> list[object]:
    if type(value) is not list:
        raise BadLine(f"{name} must be a list, not {shown(value)}")
    return value
