"""Traces that cannot be used: the line and the reason."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.simulate.traces import FORMATS, TraceError, read
from kvservice.simulate.workload import Workload

TURN = '{"t": 1, "session": "a", "turn": 0, "new_tokens": 3, "output_tokens": 4}'
NEXT = '{"t": 2, "session": "a", "turn": 1, "new_tokens": 3, "output_tokens": 4}'
REQUEST = '{"timestamp": 1000, "input_length": 600, "output_length": 4, "hash_ids": [0, 1]}'
CHAT = (
    '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.1, "input_length": 33, "output_length": 7, "type": "text",'
    ' "turn": 1, "hash_ids": [5, 6, 7]}'
)
NEXT_CHAT = (
    '{"chat_id": 2, "parent_chat_id": 1, "timestamp": 62, "input_length": 43, "output_length": 7, "type": "text",'
    ' "turn": 2, "hash_ids": [5, 6, 8]}'
)
ROUND = (
    '{"provider": "claude", "session_id": "claude:1", "round_index": 0, "input_tokens_total": 35, "output_tokens": 4,'
    ' "timing_events": [{"event_type": "user_message", "timestamp": "2026-06-01T05:40:20.151Z"}], "tools": []}'
)
AGENT = '{"id": "a", "models": ["m"], "block_size": 64, "requests": [%s]}'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_ROW = "2023-11-16 18:15:46.6805900,374,44"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
BURSTGPT_ROWS = ("5,ChatGPT,472,18,490,API log", "4,ChatGPT,472,18,490,API log")
TEXT = "user time query_length response_length round"


def refused(path: Path, format: str = "auto") -> TraceError:  # noqa: A002
    with pytest.raises(TraceError) as caught:
        read(path, format)
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.path == path
    where = str(path) if error.line is None else f"{path}: line {error.line}"
    assert str(error) == f"{where}: {error.reason}"
    return error


def changed(line: str, before: str, after: str) -> str:
    assert before in line
    return line.replace(before, after)


CASES = {
    # Our own.
    "unsorted times": (2, "t goes back: 0.5 after 1", [TURN, changed(NEXT, '"t": 2', '"t": 0.5')]),
    "a truncated last line": (2, "is no whole JSON object", [TURN, NEXT[:40]]),
    "a line cut to nothing but its begin": (2, "is no whole JSON object", [TURN, "{"]),
    "two objects on a line": (1, "is no whole JSON object", [TURN + NEXT]),
    "a negative time": (1, "t is negative: -1", [changed(TURN, '"t": 1', '"t": -1')]),
    "negative tokens": (2, "new_tokens is negative: -3", [TURN, changed(NEXT, "3", "-3")]),
    "a negative answer": (1, "output_tokens is negative: -4", [changed(TURN, "4", "-4")]),
    "no number at all": (1, "t is impossibly large: nan", [changed(TURN, '"t": 1', '"t": NaN')]),
    "a time without end": (1, "t is impossibly large: inf", [changed(TURN, '"t": 1', '"t": Infinity')]),
    "milliseconds of today": (1, "t is impossibly large", [changed(TURN, '"t": 1', '"t": 1700000000000')]),
    "an absurd number of tokens": (1, "new_tokens is impossibly large", [changed(TURN, "3", "99999999")]),
    "a number of a thousand digits": (1, "new_tokens is impossibly large", [changed(TURN, "3", "9" * 1000)]),
    "a number of ten thousand digits": (1, "is no whole JSON object", [changed(TURN, "3", "9" * 10_000)]),
    "a time of a thousand digits": (1, "t is impossibly large", [changed(TURN, '"t": 1', '"t": 1' + "0" * 1000)]),
    "tokens in parts": (1, "new_tokens must be a whole number, not 3.5", [changed(TURN, "3", "3.5")]),
    "tokens as words": (1, "new_tokens must be a whole number, not '3'", [changed(TURN, "3", '"3"')]),
    "tokens that are true": (1, "new_tokens must be a whole number, not True", [changed(TURN, "3", "true")]),
    "a time as words": (1, "t must be a number, not '1'", [changed(TURN, '"t": 1', '"t": "1"')]),
    "a session that is a number": (1, "session must be a string, not 7", [changed(TURN, '"a"', "7")]),
    "missing tokens": (1, "output_tokens is missing", [changed(TURN, ', "output_tokens": 4', "")]),
    "a missing session": (2, "session must be a string", [TURN, changed(NEXT, '"session": "a", ', "")]),
    "a turn twice": (2, "turn 0 of session 'a' comes twice", [TURN, TURN]),
    "a gap": (
        2, "turn 2 of session 'a' comes after turn 0: some between",
        [TURN, changed(NEXT, '"turn": 1', '"turn": 2')],
    ),
    "turns out of order": (
        2, "turn 3 of session 'a' comes after turn 5",
        [changed(TURN, '"turn": 0', '"turn": 5'), changed(NEXT, '"turn": 1', '"turn": 3')],
    ),
    "a negative turn": (1, "turn is negative: -1", [changed(TURN, '"turn": 0', '"turn": -1')]),
    "an unknown event": (
        2, "event must be one of typing, tool_call, ended, not 'yawn'",
        [TURN, '{"t": 1, "session": "a", "event": "yawn"}'],
    ),
    "an event that is no word": (2, "event must be one of", [TURN, '{"t": 1, "session": "a", "event": [1]}']),
    "an event that is a turn": (1, "is a turn and an event at once", [changed(TURN, '"t"', '"event": "typing", "t"')]),
    "an event out of order": (2, "t goes back", [TURN, '{"t": 0, "session": "a", "event": "typing"}']),
    "events alone": (None, "has no turn", ['{"t": 1, "session": "a", "event": "typing"}']),
    "a list among the objects": (2, "is JSON, but no object", [TURN, "[1, 2]"]),
    "nesting": (1, "is nested too deep", ['{"t": ' + "[" * 100_000]),
    "another format's line": (2, "t is missing; the line may be of another format", [TURN, REQUEST]),
    "a table's line in JSON": (3, "is no whole JSON object", [TURN, "", AZURE_ROW]),
    # Mooncake's.
    "unsorted milliseconds": (2, "timestamp goes back: 999 after 1000", [REQUEST, changed(REQUEST, "1000", "999")]),
    "too few blocks": (1, "hash_ids has 2 blocks; input_length 1025 is 3 of 512", [changed(REQUEST, "600", "1025")]),
    "too many blocks": (1, "hash_ids has 2 blocks; input_length 512 is 1 of 512", [changed(REQUEST, "600", "512")]),
    "an empty prompt": (1, "input_length is 0", [changed(changed(REQUEST, "600", "0"), "[0, 1]", "[]")]),
    "an id that is no number": (
        1, "hash_ids must be a list of whole numbers",
        [changed(REQUEST, "[0, 1]", '[0, "1"]')],
    ),
    "an id that is true": (1, "hash_ids must be a list of whole numbers", [changed(REQUEST, "[0, 1]", "[0, true]")]),
    "an id for a list": (1, "hash_ids must be a list of whole numbers", [changed(REQUEST, "[0, 1]", "7")]),
    "a negative id": (1, "hash_ids must be from 0", [changed(REQUEST, "[0, 1]", "[0, -1]")]),
    "a huge id": (1, "hash_ids must be from 0", [changed(REQUEST, "[0, 1]", f"[0, {2**63}]")]),
    "an id with two prefixes": (
        3, "hash id 1 comes after other blocks than in line 1",
        [REQUEST, "", changed(REQUEST, "[0, 1]", "[2, 1]")],
    ),
    "an id twice": (1, "hash id 0 comes twice here", [changed(REQUEST, "[0, 1]", "[0, 0]")]),
    "a cut Mooncake line": (2, "is no whole JSON object", [REQUEST, REQUEST[:-4]]),
    "a negative prompt": (1, "input_length is negative", [changed(REQUEST, "600", "-600")]),
    "our line in Mooncake's": (2, "timestamp is missing", [REQUEST, TURN]),
    # Bailian's.
    "seconds that go back": (2, "timestamp goes back: 0.5 after 61.1", [CHAT, changed(NEXT_CHAT, "62", "0.5")]),
    "a chat twice": (2, "chat_id 1 comes twice", [CHAT, changed(NEXT_CHAT, '"chat_id": 2', '"chat_id": 1')]),
    "a parent as words": (1, "parent_chat_id must be a whole number, not '0'", [changed(CHAT, "-1", '"0"')]),
    "a chat without tokens": (2, "input_length is missing", [CHAT, changed(NEXT_CHAT, "input_length", "inputs")]),
    # Agents'.
    "a round without a session": (1, "session_id must be a string, not None", [changed(ROUND, '"claude:1"', "null")]),
    "a round's event that is a number": (1, "timing_events must be a list of objects", [changed(ROUND, "[{", "[7, {")]),
    "a round's time that is a word": (
        1, "timing_events: timestamp is neither a number nor a date and time: 'noon'",
        [changed(ROUND, "2026-06-01T05:40:20.151Z", "noon")],
    ),
    "a round's tools that are a number": (1, "tools must be a list of objects, not 7", [changed(ROUND, "[]", "7")]),
    "a round with absurd tokens": (1, "input_tokens_total is impossibly large", [changed(ROUND, "35", "9" * 9)]),
    "rounds without a time alone": (None, "has no turn", [changed(ROUND, "user_message", "usage_report")]),
    "an agent without requests": (1, "requests must be a list, not 7", ['{"requests": 7, "block_size": 64}']),
    "an agent's request that is a number": (1, "requests[0] must be an object, not 7", [AGENT % "7"]),
    "an agent's request without a time": (1, "requests[0].t is missing", [AGENT % '{"type": "s"}']),
    "an agent's request of an unknown type": (
        1, "requests[0].type must be one of s, n, subagent, not 'x'",
        [AGENT % '{"t": 0, "type": "x"}'],
    ),
    "an agent's request without an answer": (
        1, "requests[0].out is missing",
        [AGENT % '{"t": 0, "type": "s", "in": 1}'],
    ),
    "a subagent's bad request": (
        1, "requests[0].requests[1].in must be a whole number, not 1.5",
        [
            AGENT
            % (
                '{"t": 0, "type": "subagent", "requests": [{"t": 0, "type": "s", "in": 1, "out": 1},'
                ' {"t": 0, "type": "s", "in": 1.5, "out": 1}]}'
            )
        ],
    ),
    "an agent's blocks that are a number": (
        1, "requests[0].hash_ids must be a list, not 7",
        [AGENT % '{"t": 0, "type": "s", "in": 1, "out": 1, "hash_ids": 7}'],
    ),
    "an agent with a chain of 480 subagents": (
        1, "is nested too deep",
        [AGENT % ('{"t": 0, "type": "subagent", "requests": [' * 480 + "]}" * 480)],
    ),
    "an agent over several lines that is cut": (3, "is no whole JSON object", ["{", '"requests": [', "{"]),
    "an object over several lines of no known format": (1, "requests must be a list, not None", ["{", '"x": 1', "}"]),
    "no agents' requests": (None, "has no turn", [AGENT % ""]),
    # Azure's.
    "a CSV column too few": (1, "the header lacks GeneratedTokens", ["TIMESTAMP,ContextTokens"]),
    "a CSV column twice": (1, "the header names 'TIMESTAMP' twice", [AZURE + ",timestamp"]),
    "a cut CSV line": (3, "has 2 fields and the header 3", [AZURE, AZURE_ROW, "2023-11-16 18:15:47,37"]),
    "a date cut off": (2, "TIMESTAMP is neither a number nor a date", [AZURE, "2023-11-16 18:1,374,44"]),
    "dates that go back": (3, "TIMESTAMP goes back", [AZURE, AZURE_ROW, "2023-11-16 18:15:46,374,44"]),
    "CSV tokens below nought": (2, "ContextTokens is negative: -374", [AZURE, "2023-11-16 18:15:46,-374,44"]),
    "CSV tokens in parts": (
        2, "GeneratedTokens must be a whole number, not '4.4'",
        [AZURE, "2023-11-16 18:15:46,374,4.4"],
    ),
    "CSV tokens that are none": (
        2, "GeneratedTokens must be a whole number, not ''",
        [AZURE, "2023-11-16 18:15:46,374,"],
    ),
    "absurd CSV tokens": (2, "ContextTokens is impossibly large", [AZURE, f"2023-11-16 18:15:46,{'9' * 30},4"]),
    "an open quote": (2, "unexpected end of data", [AZURE, '"2023-11-16 18:15:46,374,44']),
    "a header alone": (None, "has no turn", [AZURE]),
    "JSON in CSV": (2, "has 5 fields and the header 3", [AZURE, TURN]),
    # BurstGPT's.
    "a BurstGPT column too few": (1, "the header lacks Timestamp", ["Model,Request tokens,Response tokens"]),
    "a cut BurstGPT line": (2, "has 3 fields and the header 6", [BURSTGPT, "5,ChatGPT,472"]),
    "BurstGPT times that go back": (3, "Timestamp goes back: 4.0 after 5", [BURSTGPT, *BURSTGPT_ROWS]),
    "BurstGPT tokens in parts": (
        2, "Request tokens must be a whole number, not '1.5'",
        [BURSTGPT, "5,ChatGPT,1.5,18,490,API log"],
    ),
    # Words.
    "a unit that is not known": (
        1, "the header gives 'time(fortnights)' in a unit that is not known: it must be s, ms, us or ns",
        ["user time(fortnights) query response", "x 0 35 44"],
    ),
    "words among commas": (2, "has 1 fields and the header 4", ["user,time,query,response", "x 0 35 44"]),
    "a text column too few": (1, "the header names no time and no response length", ["user query_length round"]),
    "a word too few": (2, "has 4 words and the header 5", [TEXT, "x 0 35 44"]),
    "text times that go back": (3, "time goes back: 0.0 after 1", [TEXT, "x 1 35 44 1", "x 0 35 44 2"]),
    "a text time that is not a time": (2, "time is neither a number nor a date", [TEXT, "x now 35 44 1"]),
    "a text time below nought": (2, "time is negative", [TEXT, "x -1 35 44 1"]),
    "a text time that is no number": (2, "time is impossibly large: nan", [TEXT, "x nan 35 44 1"]),
    "a negative query": (2, "query_length is negative: -35", [TEXT, "x 0 -35 44 1"]),
    "a round twice": (4, "round 2 of this user comes twice", [TEXT, "x 0 35 44 1", "x 1 35 44 2", "x 2 35 44 2"]),
    "a round left out": (3, "round 3 of this user comes after round 1: some", [TEXT, "x 0 35 44 1", "x 1 35 44 3"]),
    "rounds out of order": (
        4, "round 2 of this user comes after round 5",
        [TEXT, "x 0 35 44 5", "y 0 1 1 1", "x 1 35 44 2", "y 1 1 1 9"],
    ),
    "rounds that begin again in their middle": (
        4, "round 5 of this user comes after round 6",
        [TEXT, "x 0 35 44 5", "x 1 35 44 6", "x 2 35 44 5"],
    ),
    "two bad rounds, of which the message names the first": (
        4, "round 3 of this user comes after round 1",
        [TEXT, "x 0 35 44 1", "y 1 35 44 1", "y 2 35 44 3", "x 3 35 44 4"],
    ),
    "a text header alone": (None, "has no turn", [TEXT]),
    # None of these.
    "prose": (1, "is of no known format", ["It was a dark and stormy night."]),
    "a CSV of something else": (1, "is of no known format", ["date,price", "2023,1"]),
    "an unknown object": (1, "is a JSON object of no known format: it has x", ['{"x": 1}']),
    "an empty object": (1, "is a JSON object of no known format: it has nothing", ["{}"]),
    "an array": (1, "is JSON, but no object", ["[1]"]),
    "a table without its header": (1, "is of no known format", [AZURE_ROW]),
}  # fmt: skip


@pytest.mark.parametrize(("line", "reason", "text"), CASES.values(), ids=CASES.keys())
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: int | None, reason: str, text: list[str]) -> None:
    path = tmp_path / "trace"
    path.write_text("\n".join(text) + "\n")

    error = refused(path)

    assert error.line == line
    assert error.reason.startswith(reason)
    assert len(error.reason) < 400


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)

    assert (refused(path).line, refused(path).reason) == (None, "is empty")


def test_what_is_not_utf_8_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(f"{TURN}\n".encode() + NEXT.replace("a", "\xe4").encode("latin-1"))

    assert (refused(path).line, refused(path).reason) == (2, "is not UTF-8 text")


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:8],
        lambda packed: packed[:-9],
        lambda packed: packed[:-1],
        lambda packed: packed[:20] + bytes(8) + packed[28:],
        lambda packed: packed[:-8] + bytes(4) + packed[-4:],
        lambda packed: packed + b"more",
    ],
)
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "trace"
    path.write_bytes(damage(gzip.compress(f"{TURN}\n{NEXT}\n".encode())))

    assert refused(path).reason.startswith("is no whole gzip file")


def test_a_gzip_file_whose_text_is_damaged_too_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    packed = gzip.compress(b"\xff" + TURN.encode(), compresslevel=0)
    path.write_bytes(packed[:-8] + bytes(4) + packed[-4:])

    assert refused(path).reason == "is no whole gzip file, and not UTF-8 text"


def test_what_is_not_utf_8_in_a_gzip_file_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(f"{TURN}\n".encode() + b"\xff\n"))

    assert (refused(path).line, refused(path).reason) == (2, "is not UTF-8 text")


def test_a_folder_is_no_trace_unless_it_has_sessions_of_agents(tmp_path: Path) -> None:
    assert refused(tmp_path).reason == "is a folder without .json files"
    assert refused(tmp_path, "jsonl").reason == "is a folder"

    (tmp_path / "turns.jsonl").write_text(TURN)

    assert refused(tmp_path).reason == "is a folder, and turns.jsonl in it is no session of an agent"


def test_a_pipe_is_no_trace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trace")

    assert refused(tmp_path / "trace").reason == "is no regular file"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "trace").reason == "cannot be read: No such file or directory"


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(TURN)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")

    assert refused(path).reason == "cannot be read: Permission denied"


def test_the_error_for_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown format 'parquet': one of auto, jsonl, recorded, mooncake, "):
        read(tmp_path / "trace", "parquet")


@pytest.mark.parametrize("named", [name for name in FORMATS if name not in ("auto", "jsonl")])
def test_a_format_that_the_file_is_not_of_is_refused(tmp_path: Path, named: str) -> None:
    path = tmp_path / "trace"
    path.write_text(TURN + "\n")

    assert refused(path, named).line == 1


_WHOLE = "\n".join([TURN, NEXT, TURN.replace('"a"', '"b"').replace('"t": 1', '"t": 3')]) + "\n"


@given(st.integers(1, len(_WHOLE) - 2), st.binary(min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, at: int, damage: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    whole = _WHOLE.encode()

    path.write_bytes(whole[:at])
    if whole[at - 1 : at] != b"}" and whole[at - 1 : at] != b"\n":
        refused(path)

    path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    try:
        read_back = read(path)
    except TraceError:
        return
    assert isinstance(read_back, Workload)
    assert read_back.turns >= 1


SUBAGENT = '{"t": 1, "type": "subagent", "status": "completed", "requests": [{"t": 0, "type": "n", "in": 9, "out": 1}]}'
REQUEST_OF_AGENT = '{"t": 0, "type": "s", "in": 99, "out": 4, "hash_ids": [1], "stop": "tool_use", "api_time": 1.5}'
WHOLE = [
    f"{REQUEST}\n",
    f"{CHAT}\n{NEXT_CHAT}\n",
    f"{ROUND}\n" + ROUND.replace("[]", '[{"tool_name": "Bash", "emitted_at": "2026-06-01T05:40:30Z"}]'),
    AGENT % f"{REQUEST_OF_AGENT}, {SUBAGENT}",
    json.dumps(json.loads(AGENT % f"{REQUEST_OF_AGENT}, {SUBAGENT}"), indent=2),
    f"{AZURE}\n{AZURE_ROW}\n",
    f"{BURSTGPT.replace('Model', 'Session ID')}\n{BURSTGPT_ROWS[0]}\n",
    f"{TEXT}\nx 0 35 44 1\n",
    "user,time_stamp(ms),query,response\nx,0,35,44\n",
]


@pytest.mark.parametrize("whole", WHOLE, ids=lambda whole: whole[:30])
@given(
    at=st.integers(0, 1000),
    length=st.integers(0, 20),
    damage=st.sampled_from(
        [b"null", b"-1", b"1e400", b"NaN", b"[]", b"{}", b'"', b",", b"\n", b"(h)", b"\xff", b"9" * 30]
    ),
    packed=st.booleans(),
)
def test_a_damaged_file_of_any_format_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, whole: str, at: int, length: int, damage: bytes, packed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    content = whole.encode()
    content = gzip.compress(content, mtime=0) if packed else content
    at %= len(content)
    path.write_bytes(content[:at] + damage + content[at + length :])

    try:
        workload = read(path)
    except TraceError:
        return
    assert workload.turns >= 1
    assert (workload.arrives_s >= 0).all()
    assert (workload.hints.lead_s >= 0).all()
