"""Files of ``kvctl trace record``: what the simulator reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice.simulate.engine import simulate
from kvservice.simulate.settings import MIB, Machine
from kvservice.simulate.traces.lines import TraceError
from kvservice.simulate.traces.read import format_of, read

HEADER: dict[str, Any] = {"kvservice_trace": 1, "block_tokens": 16, "kv_bytes_per_token": 4096}


def turn(t: float, prompt_tokens: int, answer_tokens: int, ids: list[int]) -> dict[str, Any]:
    return {"t": t, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "hash_ids": ids}


def written(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "load.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_file_is_recognised_and_tells_the_sizes(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER, turn(0.0, 32, 16, [1, 2, 3]), turn(5.0, 64, 20, [1, 2, 3, 4, 5]))

    assert format_of(path) == "recorded"
    workload = read(path)
    assert (workload.turns, workload.block_tokens, workload.kv_bytes_per_token) == (2, 16, 4096)
    assert workload.arrives_s.tolist() == [0.0, 5.0]
    assert workload.new_tokens.tolist() == [32, 64]
    assert workload.output_tokens.tolist() == [16, 20]


def test_lines_are_in_the_order_in_which_turns_ended(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER, turn(3.0, 16, 0, [7]), turn(1.0, 16, 0, [8]), turn(2.0, 16, 0, [9]))
    assert np.diff(read(path).arrives_s).tolist() == [1.0, 1.0]


def test_a_turn_hits_what_the_turn_before_stored_of_its_prompt_and_its_answer(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER, turn(0.0, 32, 16, [1, 2, 3]), turn(9.0, 64, 0, [1, 2, 3, 4]))
    machine = Machine(10 * MIB, 0, 1e9, 4096, service_turns_per_s=10.0, prefill_tokens_per_s=100.0)

    result = simulate(read(path), machine, "lru")

    assert (result.turns_with_history, result.dram_on_time) == (1, 1.0)
    assert result.ttft_mean_s == pytest.approx((0.32 + 0.16) / 2)  # 32 tokens, and 16 new ones.


def test_a_turn_without_a_whole_block_is_left_out(tmp_path: Path) -> None:
    assert read(written(tmp_path, HEADER, turn(0.0, 9, 1, []), turn(1.0, 16, 0, [1]))).turns == 1
    with pytest.raises(TraceError, match="has no turn with a whole block"):
        read(written(tmp_path, HEADER, turn(0.0, 9, 1, [])))


@pytest.mark.parametrize(
    ("header", "row", "line", "reason"),
    [
        ({"kvservice_trace": 2}, {}, 1, "kvservice_trace is 2: this version reads 1"),
        ({"block_tokens": 0}, {}, 1, "must be above 0"),
        ({"kv_bytes_per_token": None}, {}, 1, "kv_bytes_per_token is missing"),
        ({}, {"hash_ids": [1, 2, 3, 4]}, 2, "hash_ids has 4 blocks, more than its tokens fill"),
        ({}, {"hash_ids": [-1]}, 2, "hash_ids must be from 0"),
        ({}, {"answer_tokens": -1}, 2, "answer_tokens is negative"),
        ({}, {"t": "now"}, 2, "t must be a number"),
    ],
)
def test_a_wrong_line_is_named(
    tmp_path: Path, header: dict[str, Any], row: dict[str, Any], line: int, reason: str
) -> None:
    path = written(tmp_path, HEADER | header, turn(0.0, 32, 16, [1, 2, 3]) | row)
    with pytest.raises(TraceError, match=reason) as caught:
        read(path, "recorded")
    assert caught.value.line == line
