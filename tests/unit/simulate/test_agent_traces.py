"""Traces of requests that carry their whole prompt: conversations of Bailian, and the sessions of coding agents."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvservice.simulate.traces import format_of, read
from tests.unit.simulate.test_traces import hints_of, turns_of, written


def chat(at_s: float, number: int, parent: int, tokens: int, ids: list[int], output: int = 7) -> dict[str, object]:
    return {
        "chat_id": number,
        "parent_chat_id": parent,
        "timestamp": at_s,
        "input_length": tokens,
        "output_length": output,
        "type": "text",
        "turn": 1 + (parent >= 0),
        "hash_ids": ids,
    }


def test_bailians_chats_are_the_chains_of_their_parents_in_seconds(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        chat(61.0, 10, -1, 40, [1, 2, 3], 20),
        chat(61.5, 11, -1, 16, [9], 8),
        chat(71.0, 12, 10, 70, [1, 2, 4, 5, 6], 5),
        chat(80.0, 13, 12, 60, [1, 2, 4, 7], 5),  # The answer's reasoning was left out.
        chat(90.0, 14, 777, 100, list(range(7)), 5),  # Its parent came before the trace.
    )

    workload = read(path)

    assert turns_of(workload) == [
        (0, 0, 40, 20),
        (0, 10, 10, 5),
        (0, 19, 0, 5),
        (1, 0.5, 16, 8),
        (2, 29, 100, 5),
    ]
    assert workload.notes == ()


def test_a_second_child_of_a_bailian_chat_is_a_branch_with_a_session_of_its_own(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        chat(0, 1, -1, 40, [1, 2, 3], 20),
        chat(1, 2, 1, 70, [1, 2, 4, 5, 6], 5),
        chat(2, 3, 1, 66, [1, 2, 4, 5, 7], 5),
        chat(3, 4, 3, 80, [1, 2, 4, 5, 8], 5),
        chat(4, 5, 2, 80, [1, 2, 4, 5, 9], 5),
    )

    workload = read(path)

    assert turns_of(workload) == [(0, 0, 40, 20), (0, 1, 10, 5), (0, 4, 5, 5), (1, 2, 66, 5), (1, 3, 9, 5)]
    assert workload.notes == ("Branches of conversations, which are sessions of their own: 1.",)


def test_bailians_blocks_have_16_tokens_and_are_the_same_block_only_after_the_same_blocks(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        chat(0, 1, -1, 48, [1, 2, 3]),
        chat(1.5, 2, -1, 47, [1, 2, 4]),
        chat(2, 3, -1, 32, [2, 3]),  # Equal contents at another place: other KV.
        chat(3, 4, -1, 20, [1, 1]),
    )

    workload = read(path, "bailian-prefixes")

    assert workload.block_tokens == 16
    assert workload.arrives_s.tolist() == [0, 1.5, 2, 3]
    paths = [workload.path_items[b:e].tolist() for b, e in pairwise(workload.path_begins)]
    assert paths == [[0, 1, 2], [0, 1, 3], [4], [0, 5]]
    assert workload.item_blocks.tolist() == [1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("form", ["mooncake", "mooncake-sessions"])
def test_blocks_of_another_size_are_read_where_the_size_is_given(tmp_path: Path, form: str) -> None:
    path = written(tmp_path, {"timestamp": 0, "input_length": 100, "output_length": 7, "hash_ids": [0, 1]})

    assert read(path, form, block_tokens=64).new_tokens.tolist() == [100]


def tracelab(
    session: str, index: int, sent: str, tokens: int, output: int = 10, tool: str | None = None, **more: Any
) -> dict[str, Any]:
    """A round as TraceLab publishes it, without the fields of no interest. Times are within one hour."""
    day = "2026-06-01T05:"
    events = [
        {"event_type": "tool_result", "timestamp": f"{day}00:00.000Z", "source": "user.content.tool_result"},
        {"event_type": "user_message", "timestamp": f"{day}{sent}Z", "source": "user.message", "content_chars": 9},
        {"event_type": "text", "timestamp": f"{day}59:00.000Z", "source": "assistant.content.text"},
    ]
    tools = [{"tool_index": 0, "tool_name": "Bash", "emitted_at": f"{day}{tool}Z", "tool_wall_latency_ms": 5}]
    return {
        "provider": "claude",
        "session_id": session,
        "round_index": index,
        "input_tokens_total": tokens,
        "prefix_tokens": 0,
        "newly_append_tokens": tokens,
        "output_tokens": output,
        "reasoning_output_tokens": None,
        "timing_events": events,
        "tools": tools if tool else [],
        **more,
    }


def test_tracelabs_rounds_are_turns_at_the_time_of_their_last_input_in_any_order_of_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        tracelab("claude:b", 1, "10:08.000", 1500, 40),
        tracelab("claude:a", 0, "10:05.500", 300, 20),
        tracelab("claude:b", 0, "10:00.000", 1000, 100),
        tracelab("claude:a", 1, "10:09.500", 310, 20),
        tracelab("claude:b", 2, "10:20.000", 600, 40),  # The agent summarised its history.
        tracelab("claude:b", 3, "10:30.000", 700, 40),
    )

    assert format_of(path) == "tracelab"
    assert turns_of(read(path)) == [
        (0, 0, 1000, 100),
        (0, 8, 400, 40),
        (1, 5.5, 300, 20),
        (1, 9.5, 0, 20),
        (2, 20, 600, 40),
        (2, 30, 60, 40),
    ]


def test_tracelabs_tool_calls_are_hints_before_the_request_with_their_results(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        tracelab("b", 0, "10:09.000", 900, tool="10:10.000"),
        tracelab("a", 0, "10:00.000", 900, tool="10:03.000"),
        tracelab("a", 1, "10:08.000", 1000),
        tracelab("a", 2, "10:40.000", 1100),
    )

    assert hints_of(read(path)) == [(1, "tool_call", 5.0), (-4, "tool_call", 1.0)]


def test_tracelabs_rounds_without_a_time_or_tokens_and_copies_are_left_out_and_counted(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        tracelab("a", 0, "10:00.000", 900),
        tracelab("a", 0, "10:00.000", 900, project="another"),
        tracelab("a", 1, "10:01.000", 950, timing_events=[]),
        tracelab("a", 2, "10:02.000", 0),
        tracelab("a", 3, "10:03.000", 990, output_tokens=None),
        tracelab("a", 4, "10:04.000", 1000),
    )

    workload = read(path)

    assert turns_of(workload) == [(0, 0, 900, 10), (0, 4, 90, 10)]
    assert workload.notes == ("Left out: rounds without a time or tokens, and copies of rounds (4).",)


def request(t: float, tokens: int, ids: list[int], out: int = 10, stop: str = "", **more: Any) -> dict[str, Any]:
    """A request as Weka publishes it, with blocks of 64 tokens."""
    return {
        "t": t,
        "type": "s",
        "model": "opus",
        "in": tokens,
        "out": out,
        "hash_ids": ids,
        "input_types": ["text"],
        "output_types": ["text"],
        "stop": stop,
        **more,
    }


def agent(*requests: dict[str, Any], name: str = "trace_0001") -> dict[str, Any]:
    return {
        "id": name,
        "models": ["opus"],
        "block_size": 64,
        "hash_id_scope": "local",
        "tool_tokens": 12000,
        "system_tokens": 3000,
        "requests": list(requests),
    }


def subagent(t: float, *requests: dict[str, Any], status: str = "completed", **more: Any) -> dict[str, Any]:
    return {
        "t": t,
        "type": "subagent",
        "agent_id": "agent_001",
        "subagent_type": "Explore",
        "status": status,
        "requests": list(requests),
        "models": ["opus"],
        **more,
    }


def test_an_agents_requests_continue_the_prompts_whose_blocks_they_begin_with(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        agent(
            request(0.0, 200, [1, 2, 3]),
            request(5.0, 200, [1, 2, 3], type="n"),  # The same prompt again.
            request(6.0, 150, [1, 2, 90]),  # It shares the first prompt's full blocks but the last, so it continues.
            request(7.0, 300, [1, 2, 90, 4], model="haiku"),  # Another model has other KV.
            request(8.0, 400, [1, 2, 90, 5, 6, 7]),
            request(9.0, 130, [50, 51]),  # A summary: it begins with nothing known.
            request(12.0, 230, [50, 51, 52]),
        ),
    )

    assert format_of(path) == "weka"
    assert turns_of(read(path)) == [
        (0, 0, 200, 10),
        (0, 5, 0, 10),
        (0, 6, 0, 10),
        (0, 8, 170, 10),
        (1, 7, 300, 10),
        (2, 9, 130, 10),
        (2, 12, 90, 10),
    ]


def test_of_several_prompts_an_agents_request_continues_the_longest_then_the_latest(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        agent(
            request(0.0, 190, [1, 2, 3]),
            request(1.0, 190, [7, 8, 9]),
            request(2.0, 320, [7, 8, 9, 10, 11]),
            request(3.0, 190, [7, 8, 30]),
            request(4.0, 400, [7, 8, 9, 10, 12, 13]),
        ),
    )

    assert read(path).session.tolist() == [0, 1, 1, 1, 2]
    assert read(path).arrives_s.tolist() == [0, 1, 2, 4, 3]


def test_an_agents_requests_without_blocks_are_one_session_while_the_prompt_is_not_cut(tmp_path: Path) -> None:
    path = written(tmp_path, agent(request(0, 200, []), request(1, 300, []), request(2, 140, []), request(3, 200, [])))

    assert read(path).session.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("first", [1.0, 21.0])
def test_a_subagent_is_a_session_whose_times_count_from_its_begin_or_from_the_sessions(
    tmp_path: Path, first: float
) -> None:
    path = written(
        tmp_path,
        agent(
            request(0.0, 200, [1, 2, 3], stop="tool_use", api_time=4.0),
            subagent(20.0, request(first, 100, [5, 6]), request(first + 2, 200, [5, 6, 7, 8]), duration_ms=7000),
            request(30.0, 300, [1, 2, 3, 4]),
            subagent(20.0, request(first, 100, [5, 6]), status="async_launched", duration_ms=None),
        ),
    )

    workload = read(path)

    assert turns_of(workload) == [
        (0, 0, 200, 10),
        (0, 30, 90, 10),
        (1, 21, 100, 10),
        (1, 23, 90, 10),
        (2, 21, 100, 10),
    ]
    assert hints_of(workload) == [(1, "tool_call", 26.0), (-4, "ended", 4.0)]


def test_a_tool_call_without_a_known_end_of_its_answer_is_announced_at_the_answers_end(tmp_path: Path) -> None:
    path = written(tmp_path, agent(request(0.0, 200, [1, 2], stop="tool_use"), request(9.0, 300, [1, 2, 3])))

    assert hints_of(read(path)) == [(1, "tool_call", 9.0)]  # Not before the answer's end, where the engine replays it.


def test_a_session_may_be_written_over_several_lines_or_one_per_line(tmp_path: Path) -> None:
    one, two = agent(request(0, 200, [1, 2])), agent(request(0, 100, [3, 4]), name="trace_0002")
    indented = written(tmp_path, *json.dumps(one, indent=2).splitlines())

    assert format_of(indented) == "weka"
    assert turns_of(read(indented)) == [(0, 0, 200, 10)]

    workload = read(written(tmp_path, one, two))

    assert workload.new_tokens.tolist() == [200, 100]


def test_a_folders_sessions_begin_at_the_given_rate_in_an_order_that_the_seed_fixes(tmp_path: Path) -> None:
    for number in range(200):
        text = json.dumps(agent(request(0.0, 100 + number, [1, 2]), request(1.0, 300 + number, [1, 2, 3])))
        (tmp_path / f"trace_{number:04d}.json").write_text(text)
    (tmp_path / "trace_9999.json.gz").write_bytes(gzip.compress(json.dumps(agent(request(0, 9, [1]))).encode()))
    (tmp_path / "notes.txt").write_text("not a session")

    workload = read(tmp_path, session_rate=0.5, seed=3)

    assert (workload.name, workload.turns, workload.sessions) == (tmp_path.name, 401, 201)
    assert workload.new_tokens[::2].tolist() == [*range(100, 300), 9]
    assert workload.arrives_s[1::2].tolist() == pytest.approx((workload.arrives_s[:-1:2] + 1).tolist())
    assert 200 < workload.arrives_s.max() < 800
    assert workload.notes == ("The 201 sessions share no clock: 0.5 begin per second (--session-rate).",)
    assert turns_of(read(tmp_path, session_rate=0.5, seed=3)) == turns_of(workload)
    assert turns_of(read(tmp_path, session_rate=0.5, seed=4)) != turns_of(workload)
