"""The GPU's benchmark without a GPU: its decoder on the CPU, and what it says where it cannot measure."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks.gpu import PARTS
from benchmarks.gpu.compute import TINY, TorchCompute
from benchmarks.gpu.report import Goal
from benchmarks.gpu.rig import Clock, rounds

HISTORY, NEW = 80, 20


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_new_tokens_after_a_history_are_computed_as_in_one_pass() -> None:
    compute = TorchCompute(TINY, HISTORY + NEW, torch.device("cpu"))
    compute.forward(HISTORY + NEW, 0)
    at_once, token = compute.kv.clone(), compute.next_token.item()

    compute.erase()
    compute.forward(HISTORY, 0)
    compute.forward(NEW, HISTORY)

    assert torch.allclose(compute.kv, at_once, rtol=0.05, atol=0.02)  # Of bfloat16; other sums round differently.
    assert compute.next_token.item() == token


def test_a_layers_history_is_awaited_before_it_is_read_and_its_new_kv_is_given_away_after() -> None:
    compute, calls = TorchCompute(TINY, HISTORY + NEW, torch.device("cpu")), list[tuple[str, int]]()

    compute.forward(
        NEW, HISTORY, lambda layer: calls.append(("before", layer)), lambda layer: calls.append(("after", layer))
    )

    assert calls == [(hook, layer) for layer in range(TINY.layers) for hook in ("before", "after")]


def test_changed_kv_is_not_taken_for_what_was_kept() -> None:
    compute = TorchCompute(TINY, HISTORY, torch.device("cpu"))
    compute.forward(HISTORY, 0)
    compute.keep(HISTORY)
    assert compute.holds()

    compute.kv[1, 1, 2, 3, 0, 5] += 1

    assert not compute.holds()


def test_each_way_runs_once_per_round_in_rotated_order_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def way(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = rounds({name: partial(way, name) for name in "abc"}, 2, Clock(60))

    assert "".join(order) == "abcbcacab"
    assert found == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_after_its_time_a_part_makes_three_rounds_all_the_same() -> None:
    assert len(rounds({"a": lambda: 1.0}, 9, Clock(0))["a"]) == 3


@pytest.mark.parametrize(("goal", "last"), [(Goal("", 0.9, least=0.9), "met"), (Goal("", 0.021, most=0.02), "missed")])
def test_a_goal_is_met_or_missed(goal: Goal, last: str) -> None:
    assert goal.row[-1] == last


def test_without_a_gpu_it_says_so_in_one_sentence_and_writes_nothing() -> None:
    done = run("--write", "/nonexistent/page.md")

    assert done.returncode == 0
    assert done.stdout.startswith("Nothing was measured on a GPU: ")
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
def test_the_parts_that_need_no_cuda_are_rehearsed_on_the_cpu() -> None:
    done = run("ttft", "saving", "--rehearsal")

    assert done.returncode == 0, done.stdout + done.stderr
    assert {"copies", "ttft", "saving"} == set(PARTS)
    assert done.stdout.count("#### ") == 3  # With the goals.
    assert "Not measured" not in done.stdout
