from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from kvservice.policy.items import HINTS
from kvservice.simulate.traces import read
from kvservice.simulate.traces.turn_columns import NO_SESSIONS
from kvservice.simulate.workload import Workload

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "traces"


def written(folder: Path, *lines: str | dict[str, object], end: str = "\n") -> Path:
    """A trace under a name without a known suffix."""
    path = folder / "trace"
    path.write_text(end.join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return path


def turn(t: float, session: str, number: int, new: int = 10, output: int = 5) -> dict[str, object]:
    return {"t": t, "session": session, "turn": number, "new_tokens": new, "output_tokens": output}


def event(t: float, session: str, kind: str) -> dict[str, object]:
    return {"t": t, "session": session, "event": kind}


def request(ms: float, tokens: int, ids: list[int], output: int = 7) -> dict[str, object]:
    return {"timestamp": ms, "input_length": tokens, "output_length": output, "hash_ids": ids}


def turns_of(workload: Workload) -> list[tuple[int, float, int, int]]:
    columns = (workload.session, workload.arrives_s, workload.new_tokens, workload.output_tokens)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def hints_of(workload: Workload) -> list[tuple[int, str, float]]:
    hints = workload.hints
    return [
        (int(turn), HINTS[kind], float(lead))
        for turn, kind, lead in zip(hints.turn, hints.kind, hints.lead_s, strict=True)
    ]


def test_turns_of_a_session_stand_together_and_times_count_from_the_first_request(tmp_path: Path) -> None:
    path = written(
        tmp_path, turn(100, "b", 0, 1, 2), turn(101, "a", 0, 3, 4), turn(102.5, "b", 1, 5, 6), turn(103, "a", 1, 7, 8)
    )

    assert turns_of(read(path)) == [(0, 0, 1, 2), (0, 2.5, 5, 6), (1, 1, 3, 4), (1, 3, 7, 8)]


def test_equal_times_blank_lines_byte_order_marks_and_windows_line_ends_are_normal(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeff", turn(1, "a", 0), "  ", turn(1, "b", 0), turn(1, "a", 1), "", end="\r\n")

    assert [session for session, *_ in turns_of(read(path))] == [0, 0, 1]


def test_a_last_line_without_its_end_is_read_where_it_is_whole(tmp_path: Path) -> None:
    path = written(tmp_path, turn(1, "a", 0), turn(2, "a", 1))
    path.write_text(path.read_text().rstrip())

    assert read(path).turns == 2


def test_a_trace_may_begin_in_the_middle_of_a_session(tmp_path: Path) -> None:
    assert read(written(tmp_path, turn(1, "a", 7), turn(2, "a", 8))).turns == 2


def test_an_event_goes_ahead_of_the_request_that_follows_it(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        turn(0, "a", 0),
        turn(1, "b", 0),
        event(4, "b", "tool_call"),
        event(5, "a", "typing"),
        event(6, "a", "typing"),
        turn(7, "a", 1),
        turn(9, "b", 1),
    )

    assert hints_of(read(path)) == [(1, "typing", 2.0), (1, "typing", 1.0), (3, "tool_call", 5.0)]


def test_an_event_after_a_sessions_last_request_counts_from_its_answer(tmp_path: Path) -> None:
    path = written(tmp_path, turn(0, "a", 0), turn(1, "a", 1), turn(2, "b", 0), event(11, "a", "ended"))

    assert hints_of(read(path)) == [(-1 - 1, "ended", 10.0)]


def test_an_event_before_a_sessions_first_request_is_about_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, event(0, "a", "typing"), event(1, "stranger", "typing"), turn(2, "b", 0), turn(3, "a", 0))

    workload = read(path)

    assert hints_of(workload) == []
    assert turns_of(workload) == [(0, 0, 10, 5), (1, 1, 10, 5)]


def test_azures_requests_are_sessions_of_one_turn(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:15:50.9951690,1,0",
    )

    workload = read(path)

    assert turns_of(workload) == [
        (0, 0, 374, 44),
        (1, pytest.approx(4.314579, abs=2e-6), 396, 109),
        (2, pytest.approx(4.314579, abs=2e-6), 1, 0),
    ]


def test_azures_columns_may_come_in_any_order_with_others_and_with_zones(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "GeneratedTokens,Model,timestamp,ContextTokens",
        '44,"a, b",2024-05-10 00:00:00.5+00:00,374',
        "45,c,2024-05-10 01:00:01+01:00,375",
    )

    assert turns_of(read(path)) == [(0, 0, 374, 44), (1, 0.5, 375, 45)]


def test_a_users_rounds_that_start_again_begin_a_new_session(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "user_id time round query_length response_length",
        "x 10 1 35 44",
        "y 11 4 1 2",  # The trace began in the middle of it.
        "x 12 2 36 45",
        "y 13 5 3 4",
        "x 14 1 37 46",
        "y 15 1 5 6",
        "x 16 1 38 47",
    )

    assert turns_of(read(path)) == [
        (0, 0, 35, 44),
        (0, 2, 36, 45),
        (1, 1, 1, 2),
        (1, 3, 3, 4),
        (2, 4, 37, 46),
        (3, 5, 5, 6),
        (4, 6, 38, 47),
    ]


def test_rounds_may_count_from_nought(tmp_path: Path) -> None:
    path = written(tmp_path, "user time query response round", "x 0 1 1 0", "x 1 1 1 1", "x 2 1 1 0", "x 3 1 1 0")

    assert read(path).session.tolist() == [0, 0, 1, 2]


def test_without_rounds_a_user_is_one_session(tmp_path: Path) -> None:
    path = written(tmp_path, "user time query_length response_length", "x 0 1 2", "y 1 3 4", "x 2 5 6")

    assert turns_of(read(path)) == [(0, 0, 1, 2), (0, 2, 5, 6), (1, 1, 3, 4)]


@pytest.mark.parametrize(
    "header",
    [
        "user time query_length response_length round",
        "UserID Timestamp QueryLength ResponseLength Round",
        "# uid\tarrival_time\tprompt_len\toutput_len\tturn",
        "user-id ts input_tokens output_tokens round_id",
        "user t query response rounds",
    ],
)
def test_the_usual_spellings_of_columns_are_known_in_any_order(tmp_path: Path, header: str) -> None:
    names = header.lstrip("# ").split()
    row = dict(zip(names, ("x", "0", "35", "44", "1"), strict=True))
    reordered = [names[3], "model", names[1], names[4], names[0], names[2]]

    straight = read(written(tmp_path, header, " ".join(row.values())))
    shuffled = read(written(tmp_path, " ".join(reordered), " ".join(row.get(name, "m") for name in reordered)))

    assert turns_of(straight) == turns_of(shuffled) == [(0, 0, 35, 44)]


def test_a_column_of_milliseconds_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, "user timestamp_ms query response", "x 500 1 1", "x 2000 1 1")

    assert read(path).arrives_s.tolist() == [0, 1.5]


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("time_stamp(seconds)", 1.0),
        ("time_stamp (s)", 1.0),
        ("timestamp[sec]", 1.0),
        ("Time(MS)", 1e-3),
        ("arrival_time (milliseconds)", 1e-3),
        ("ts(us)", 1e-6),
        ("timestamp(\u00b5s)", 1e-6),
        ("t(ns)", 1e-9),
    ],
)
def test_a_unit_in_brackets_is_obeyed(tmp_path: Path, name: str, second: float) -> None:
    words = written(tmp_path, f"user {name} query_length(tokens) response_length", "x 2000 1 1", "x 5000 1 1")
    of_words = read(words)
    commas = written(tmp_path, f"user,{name},query_length (tokens),response_length", "x,2000,1,1", "x,5000,1,1")
    of_commas = read(commas)

    assert of_words.arrives_s.tolist() == of_commas.arrives_s.tolist() == pytest.approx([0, 3000 * second])


def test_the_service_trace_is_read_as_it_is_published(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "user_id time_stamp(seconds) query_length response_length round_index",
        "7 0 35 44 1",
        "8 0 12 90 1",
        "7 41 20 31 2",
    )

    assert turns_of(read(path)) == [(0, 0, 35, 44), (0, 41, 20, 31), (1, 0, 12, 90)]


BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
BURSTGPT_SESSIONS = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"


def test_burstgpts_requests_are_sessions_of_one_turn_where_it_has_no_session_ids(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        BURSTGPT,
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,0,1087,API log",
        "118,GPT-4,417,276,693,Conversation log",
    )

    workload = read(path)

    assert turns_of(workload) == [(0, 0, 472, 18), (1, 113, 417, 276)]
    assert workload.notes == (NO_SESSIONS, "Left out: requests without a response, which failed (1).")


def test_burstgpts_sessions_are_read_with_the_history_that_their_prompts_contain(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        BURSTGPT_SESSIONS,
        "100.0,s-a,4,ChatGPT,15,118,133,Conversation log",
        "110.0,,2,GPT-4,900,10,910,API log",
        "120.0,s-a,3,ChatGPT,147,125,272,Conversation log",
        "130.0,s-b,3,ChatGPT,20,5,25,Conversation log",
        "140.0,s-a,3,ChatGPT,291,163,454,Conversation log",
        "150.0,,2,GPT-4,900,10,910,API log",
        "160.0,s-a,3,ChatGPT,300,9,309,Conversation log",  # Too short for 291 + 163 tokens: its history was cut.
        "170.0,s-a,3,ChatGPT,320,9,329,Conversation log",
    )

    workload = read(path)

    assert turns_of(workload) == [
        (0, 0, 15, 118),
        (0, 20, 14, 125),
        (0, 40, 19, 163),
        (1, 10, 900, 10),
        (2, 30, 20, 5),
        (3, 50, 900, 10),
        (4, 60, 300, 9),
        (4, 70, 11, 9),
    ]
    assert workload.notes == ()


def test_burstgpts_header_may_be_quoted_with_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    header = ",".join(f'"{name}"' for name in BURSTGPT_SESSIONS.split(","))
    row = '"1.5","s","1","GPT-4","10","5","15","Conversation log"'
    path = written(tmp_path, "\ufeff" + header, row, end="\r\n")

    assert turns_of(read(path)) == [(0, 0, 10, 5)]


@pytest.mark.parametrize(
    "lines",
    [
        [turn(0, "a", 0), turn(1, "a", 1)],
        [request(0, 600, [0, 1]), request(1000, 600, [0, 1])],
        ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.68,374,44", "2023-11-16 18:15:47.68,1,2"],
        [BURSTGPT, "5,ChatGPT,472,18,490,API log", "6,ChatGPT,1087,30,1117,API log"],
        ["user time query response", "x 0 1 2", "y 1 3 4"],
    ],
)
def test_a_file_that_is_packed_with_gzip_is_read_like_the_plain_one_under_any_name(
    tmp_path: Path, lines: list[str | dict[str, object]]
) -> None:
    path = written(tmp_path, *lines)
    plain = read(path)
    path.write_bytes(gzip.compress(path.read_bytes()))

    assert turns_of(read(path)) == turns_of(plain)


def test_requests_with_hash_ids_share_the_runs_of_blocks_that_are_used_alike(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        request(0, 1100, [0, 1, 2]),
        request(1500, 2048, [0, 1, 3, 4]),
        request(2000, 1025, [0, 1, 2]),
        request(2000, 512, [9]),
    )

    workload = read(path)

    assert turns_of(workload) == [(0, 0, 1100, 7), (1, 1.5, 2048, 7), (2, 2, 1025, 7), (3, 2, 512, 7)]
    assert workload.block_tokens == 512
    assert workload.path_begins.tolist() == [0, 2, 4, 6, 7]
    assert workload.path_items.tolist() == [0, 1, 0, 2, 0, 1, 3]
    assert workload.item_blocks.tolist() == [2, 1, 2, 1]


def test_a_request_continues_the_one_with_which_it_shares_the_longest_chain(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        request(0, 1100, [0, 1, 2], 30),
        request(0, 1100, [0, 3, 4], 30),
        request(3000, 1200, [0, 3, 5], 30),  # Holds the second's 1024 tokens in full blocks, and its answer.
        request(6000, 1700, [0, 1, 6, 7], 30),
        request(9000, 1800, [0, 1, 6, 8], 30),  # The same three blocks, and 1730 tokens of history.
        request(9000, 1600, [0, 3, 5, 9], 30),
    )

    assert turns_of(read(path, "mooncake-sessions")) == [
        (0, 0, 1100, 30),
        (0, 6, 570, 30),
        (0, 9, 70, 30),
        (1, 0, 1100, 30),
        (1, 3, 70, 30),
        (1, 9, 370, 30),
    ]


def test_a_request_is_continued_once_later_and_with_room_for_its_answer(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        request(0, 1030, [0, 1, 2], 30),
        request(0, 1600, [0, 1, 3, 4]),  # An answer takes some time.
        request(1, 1059, [0, 1, 5]),  # A token short of the prompt and the answer.
        request(2, 1066, [0, 1, 6]),  # Enough for the one above.
        request(3, 1536, [0, 1, 7]),
        request(4, 1536, [0, 1, 8]),  # Only the first is left there, with 1060.
        request(5, 1536, [0, 1, 9]),  # And now nothing.
        request(6, 600, [0, 10]),
        request(7, 700, [0, 11]),  # All requests share the first block.
    )

    workload = read(path, "mooncake-sessions")

    assert workload.session.tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 5]
    assert workload.new_tokens.tolist() == [1030, 1536 - 1060, 1600, 1059, 0, 1536 - 1073, 1536, 600, 700]


def test_the_infinite_caches_block_hit_rate_of_the_conversation_trace_is_36_6_percent() -> None:
    path = SHARED / "mooncake_conversation_trace.jsonl"
    if not path.exists():
        pytest.skip(f"the trace is not in {SHARED}")

    workload = read(path)

    asked = int(workload.item_blocks[workload.path_items].sum())
    distinct = int(workload.item_blocks.sum())
    assert (workload.turns, asked, distinct) == (12_031, 288_500, 182_790)
    assert 1 - distinct / asked == pytest.approx(0.366, abs=5e-4)


def test_the_conversation_trace_as_sessions_has_turns_that_continue_one_another() -> None:
    path = SHARED / "mooncake_conversation_trace.jsonl"
    if not path.exists():
        pytest.skip(f"the trace is not in {SHARED}")

    workload = read(path, "mooncake-sessions")

    again = np.flatnonzero(np.diff(workload.session) == 0) + 1
    assert workload.turns == 12_031
    assert len(again) > 3000
    assert (workload.arrives_s[again] > workload.arrives_s[again - 1]).all()
    assert (workload.new_tokens >= 0).all()


def test_azures_conversations_are_read() -> None:
    path = SHARED / "azure2023_llm_conv.csv"
    if not path.exists():
        pytest.skip(f"the trace is not in {SHARED}")

    workload = read(path)

    assert (workload.turns, workload.sessions) == (19_366, 19_366)
    assert workload.new_tokens.max() == 14_050
