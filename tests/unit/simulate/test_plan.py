"""The sizes for a target: the search alone, and ``kvctl plan`` on traces with a known answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from kvservice.simulate import result
from kvservice.simulate.command_plan import plan
from kvservice.simulate.cost import Prices
from kvservice.simulate.plan import PRECISION, footprint_tokens, mixes
from kvservice.simulate.traces import read
from kvservice.simulate.workload import Workload
from tests.unit.simulate.test_command import trace_of, turn

PRICES = Prices(dram_gb=0.0088, ssd_gb=0.000082, gpu=5.0)

program = typer.Typer()
program.command()(plan)


def figures(**known: float) -> result.Result:
    values: dict[str, Any] = {field.name: 0.0 for field in fields(result.Result)} | known
    return result.Result(**values)


def hits(share: Callable[[float, float], float], gpu_hours: Callable[[float, float], float]) -> Any:
    """The result of a simulation of sizes."""

    def measure(dram_gb: float, ssd_gb: float) -> result.Result:
        return figures(hit_rate_history=share(dram_gb, ssd_gb), gpu_hours=gpu_hours(dram_gb, ssd_gb))

    return measure


def reaches(found: result.Result) -> bool:
    return found.hit_rate_history >= 0.8


def test_the_least_of_a_tier_is_found_to_within_the_precision() -> None:
    measure = hits(lambda dram, ssd: 1.0 if ssd >= 777 else 0.5, lambda dram, ssd: 1.0)

    best = mixes(measure, reaches, 10_000, PRICES, 1)[0]

    assert best.dram_gb == 0  # It saves no GPU time here, so no size is worth its price.
    assert 777 <= best.ssd_gb <= 777 * (1 + PRECISION)
    assert best.storage_dollars_per_h == pytest.approx(best.ssd_gb * 0.000082)
    assert best.dollars == pytest.approx(5 + best.storage_dollars_per_h)


def test_dram_is_bought_where_it_saves_more_of_the_gpu_than_it_costs() -> None:
    measure = hits(lambda dram, ssd: 1.0 if dram + ssd >= 777 else 0.5, lambda dram, ssd: 1.0 if dram >= 30 else 2.0)

    found = mixes(measure, reaches, 10_000, PRICES, 1)

    assert found[0].dram_gb == 30
    assert found[0].ssd_gb == pytest.approx(747, rel=PRECISION)
    assert found == sorted(found, key=lambda mix: mix.dollars)
    assert any(mix.dram_gb == 0 for mix in found)


def test_a_target_that_needs_dram_gets_no_less() -> None:
    measure = hits(lambda dram, ssd: 0.9 if dram >= 50 and ssd >= 100 else 0.1, lambda dram, ssd: 1.0)

    best = mixes(measure, reaches, 10_000, PRICES, 1)[0]

    assert 50 <= best.dram_gb <= 50 * (1 + PRECISION)
    assert 100 <= best.ssd_gb <= 100 * (1 + PRECISION)


def test_a_target_that_nothing_reaches_has_no_mix() -> None:
    assert mixes(hits(lambda dram, ssd: 0.7, lambda dram, ssd: 1.0), reaches, 1000, PRICES, 1) == []


def test_gpus_work_side_by_side_and_share_the_storage() -> None:
    measure = hits(lambda dram, ssd: 1.0, lambda dram, ssd: 4.0)

    assert mixes(measure, reaches, 1000, Prices(1, 1, 10), 2)[0].dollars == 40
    assert Prices(1, 1, 10).dollars(4.0, 6.0, 2) == 4 * 10 + 2 * 6


def test_the_footprint_counts_each_session_no_longer_than_the_window(tmp_path: Path) -> None:
    def workload(context_tokens: int) -> Workload:
        lines = [turn(0, "a", 0, 500, 500), turn(1, "a", 1, 500, 500), turn(2, "b", 0, 100, 100)]
        return replace(read(trace_of(tmp_path, lines)), context_tokens=context_tokens)

    assert footprint_tokens(workload(0)) == 2200
    assert footprint_tokens(workload(1500)) == 1700


def round_robin(folder: Path, sessions: int = 8, rounds: int = 6) -> str:
    """Each session has 1,024 tokens from its first turn on, and a token more with each; they take turns."""
    lines = []
    for each in range(rounds):
        for number in range(sessions):
            first = {"new_tokens": 1000, "output_tokens": 24} if each == 0 else {"new_tokens": 0, "output_tokens": 1}
            lines.append(turn(10.0 * (each * sessions + number), f"s{number}", each, **first))
    return trace_of(folder, lines)


def run(*arguments: str) -> Result:
    common = ("--policy", "lru", "--kv-mb-per-token", "1", "--service-turns-per-s", "10", "--ssd-gbps", "50")
    return CliRunner(env={"COLUMNS": "250"}).invoke(program, [*arguments, *common])


def planned(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_sessions_that_take_turns_need_room_for_all_of_them_with_lru(tmp_path: Path) -> None:
    trace = round_robin(tmp_path)

    on_time = planned("--trace", trace, "--target-hit", "0.9", "--of", "on-time")
    anywhere = planned("--trace", trace, "--target-hit", "0.9", "--dram-price", "1000")

    assert 7.9 <= on_time["dram_gb"] <= 8.6  # 8 sessions of 1 GiB.
    assert on_time["dram_on_time"] == 1
    assert anywhere["dram_gb"] == 0
    assert 7.9 <= anywhere["ssd_gb"] <= 8.6
    assert anywhere["storage_dollars_per_h"] == pytest.approx(anywhere["ssd_gb"] * 0.000082)
    for found in (on_time, anywhere):
        assert found["without_storage"]["hit_rate"] == 0
        assert found["dollars"] == min(each["dollars"] for each in (found, *found["others"]))


def test_a_target_beyond_what_an_endless_store_has_is_refused_with_how_far_one_gets(tmp_path: Path) -> None:
    done = run("--trace", round_robin(tmp_path, rounds=4), "--target-hit", "0.8", "--of", "all", "--json")

    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        "kvctl: no size reaches 0.8 of all turns found in DRAM or on SSD: even unlimited DRAM has 0.750. "
        "Ask for less with --target-hit.\n"
    )


def test_the_text_output_states_the_mix_and_what_it_saves(tmp_path: Path) -> None:
    done = run("--trace", round_robin(tmp_path), "--target-hit", "0.9")

    assert done.exit_code == 0
    assert "With lru, 0.9 of turns with history found in DRAM or on SSD takes" in done.stdout
    assert "without storage; the first row saves" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--target-hit", "0"), "'--target-hit': 0 is too small; it must be above 0"),
        (("--target-hit", "1.1"), "'--target-hit': 1.1 is too large; it must be at most 1"),
        (("--target-hit", "nan"), "'--target-hit': nan is not a finite number"),
        (("--target-hit", "0.5", "--dram-price", "-1"), "'--dram-price': -1 is too small"),
        (("--target-hit", "0.5", "--policy", "lru,fifo"), "--policy: give one policy, not several"),
        (("--target-hit", "0.5", "--policy", "mru"), "--policy: no policy is called 'mru'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_with_the_option_and_the_reason(arguments: tuple[str, ...], reason: str) -> None:
    done = CliRunner(env={"COLUMNS": "250"}).invoke(program, ["--trace", "sharegpt", *arguments])

    assert (done.exit_code, done.stdout) == (2, "")
    assert f"Invalid value for {reason}" in done.stderr


def test_an_impossible_machine_is_refused_before_a_trace_is_read() -> None:
    done = run("--trace", "/no/such/file", "--target-hit", "0.5", "--batch", "3")

    assert done.exit_code == 2
    assert "--batch" in done.stderr
