"""The experiments behind docs/policies-experiments.md: how they report, and one that runs."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.policies import EXPERIMENTS, Options, cost, goals, shared_prefixes
from benchmarks.policies.capacity_rule import distinct_sessions
from benchmarks.policies.report import Section
from kvservice.simulate import traces
from tests.unit.simulate.test_command import trace_of, turn

COMMAND = [sys.executable, "-m", "benchmarks.policies"]


def test_each_experiment_replaces_its_own_section(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Placement policies\n\nOurs.\n")
    first, second = Section("first", "The first", "About it."), Section("second", "The second", "About that.")
    first.at_least("hits", 12.3456, 10, " %")
    first.table("A table:", ("Policy", "Hits"), [("`lru`", "12")])

    first.write_into(page, first.markdown("command one", 1))
    second.write_into(page, second.markdown("command two", 2))
    first.goals.clear()
    first.at_least("hits", 9, 10, " %")
    first.write_into(page, first.markdown("command one", 1))

    text = page.read_text()
    assert text.startswith("# Placement policies\n\nOurs.\n\n<!-- experiment first: begin -->")
    assert text.index("### The first") < text.index("### The second")
    assert text.count("begin -->") == text.count("end -->") == 2
    assert "| hits | at least 10 % | 9 % | **no** |" in text
    assert "12.35" not in text
    assert "Reproduce with `command two` (2 s)." in text


@pytest.mark.parametrize(
    ("least", "most", "value", "is_met"),
    [(1.0, None, 1.0, True), (1.0, None, 0.99, False), (None, 2.0, 2.0, True), (None, 2.0, float("nan"), False)],
)
def test_a_goal_is_met_at_its_edge_and_not_beyond_or_by_what_was_not_seen(
    least: float | None, most: float | None, value: float, is_met: bool
) -> None:
    section = Section("some", "Some", "About.")
    if least is not None:
        section.at_least("what", value, least)
    if most is not None:
        section.at_most("what", value, most)

    assert [goal.is_met for goal in section.goals] == [is_met]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_that_is_named_is_there(name: str) -> None:
    module = importlib.import_module(f"benchmarks.policies.{name}")

    assert list(inspect.signature(module.measure).parameters) == ["options"]


def test_the_load_of_the_goals_ends_when_the_last_user_has_arrived() -> None:
    load = goals.workload(60, 1, hints=True)

    firsts = np.flatnonzero(np.diff(load.session, prepend=-1))
    assert np.nanmax(load.arrives_s) < 300
    assert np.isnan(np.delete(load.arrives_s, firsts)).all(), "only the first request of a session has its own time"
    follows = np.where(load.hints.turn >= 0, load.hints.turn - 1, -load.hints.turn - 1)
    assert len(follows) and (np.diff(follows) >= 0).all() and follows.min() >= 0 and follows.max() < load.turns
    assert not np.isin(load.hints.turn[load.hints.turn >= 0], firsts).any()


def test_the_papers_prices_give_the_papers_savings_and_shares() -> None:
    section = Section("cost", "Cost", "About.")

    cost.formula(section)

    assert len(section.goals) == 8
    assert all(goal.is_met for goal in section.goals)


def test_what_needs_a_trace_is_skipped_without_one() -> None:
    assert shared_prefixes.measure(Options(quick=True)) is None


def test_distinct_sessions_are_counted_by_window(tmp_path: Path) -> None:
    lines = [turn(float(number), f"s{number % 5}", number // 5) for number in range(100)]
    load = traces.read(trace_of(tmp_path, lines))

    assert distinct_sessions(load, turns_per_s=1000.0, window_s=2.0, warmup_turns=0) == pytest.approx(2, rel=0.1)
    assert distinct_sessions(load, turns_per_s=1000.0, window_s=50.0, warmup_turns=0) == 5


def test_the_first_part_of_a_trace_reads_the_same_blocks(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000 * number, "input_length": 1536, "output_length": 1, "hash_ids": ids}
        for number, ids in enumerate(([0, 1, 2], [0, 1, 3], [9, 8, 7], [0, 1, 2]))
    ]
    whole = traces.read(trace_of(tmp_path, list(lines)))

    part = shared_prefixes.first_part(whole, 2)

    assert (part.turns, int(part.path_begins[-1])) == (2, len(part.path_items))
    blocks = np.add.reduceat(part.item_blocks[part.path_items], part.path_begins[:-1])
    assert blocks.tolist() == [3, 3]
    assert part.item_blocks.sum() == 4
    assert len(np.unique(part.path_items)) == len(part.item_blocks)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nonsense"], f"no experiment is called nonsense; there are {', '.join(EXPERIMENTS)}"),
        (["cost", "--write", "/no/such/folder/page.md"], "--write: there is no folder /no/such/folder"),
        (["cost", "--traces", "/no/such/folder"], "--traces: there is no folder /no/such/folder"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_measured(arguments: list[str], reason: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.slow
def test_all_of_them_run_and_write_their_sections(tmp_path: Path) -> None:
    page = tmp_path / "page.md"

    done = subprocess.run([*COMMAND, "--quick", "--write", str(page)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "shared_prefixes is skipped" in done.stderr
    text = page.read_text()
    assert all(f"<!-- experiment {name}: end -->" in text for name in EXPERIMENTS if name != "shared_prefixes")
