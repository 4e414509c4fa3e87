"""The server's share of the load, and the notes on what the figures of a run mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import sharegpt
from kvservice.simulate.offered_load import unhindered_s
from kvservice.simulate.settings import GIB, MIB, Machine
from tests.unit.simulate.test_command import run, simulated, trace_of, turn
from tests.workloads import Request, machine, sessions

A, B = 0, 1


def test_a_load_that_nothing_delays_lasts_from_its_first_request_to_its_last_answer() -> None:
    timed = sessions(Request(A, 5.0), Request(A, 10.0), Request(B, 7.0))
    assert unhindered_s(timed, machine()) == (5.0, 11.0)
    early = sessions(Request(A, 5.0), Request(A, 5.5), Request(B, 2.0))  # A's second request waits for its answer.
    assert unhindered_s(early, machine()) == (2.0, 7.0)
    after_answers = sessions(Request(A, 5.0), Request(A, think_s=10.0), Request(A, think_s=2.0))
    assert unhindered_s(after_answers, machine()) == (5.0, 20.0)
    # 30 tokens of prefill at 1,000 per second and 20 of the answer at 25 per second.
    gpu = machine(service_turns_per_s=None)
    assert unhindered_s(after_answers, gpu) == pytest.approx((5.0, 5 + 10 + 2 + 3 * 0.83))


def test_a_server_that_keeps_up_takes_all_and_one_that_is_half_as_fast_takes_half() -> None:
    turns = sessions(*(Request(number, number / 2) for number in range(200)))
    assert simulate(turns, machine(service_turns_per_s=2.0), "lru").server_share == 1
    assert simulate(turns, machine(service_turns_per_s=1.0), "lru").server_share == pytest.approx(0.5, abs=0.01)


def test_users_who_wait_for_a_slow_server_are_still_more_than_it_takes() -> None:
    """5.75 turns per session and second come, and 2 are taken."""
    load = sharegpt(sessions=400, think_s=1.0, seed=1)
    on = Machine(GIB, GIB, GIB, MIB, service_turns_per_s=2.0)
    assert simulate(load, on, "none").server_share == pytest.approx(2 / 5.75, abs=0.06)


def test_an_overloaded_gpu_is_noted_with_its_share(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [turn(n / 10, f"s{n}", 0, new_tokens=8000, output_tokens=1) for n in range(100)])
    arguments = ("--trace", trace, "--policy", "none,lru")

    done = run(*arguments)

    assert "Note: The server processes 0.11 of the arriving load. So its queue grows, and times to" in done.stdout
    found = simulated(*arguments)
    assert found[0]["server_share"] == pytest.approx(10.94 / 100, rel=0.01)
    assert "The server processes 0.11" in found[1]["notes"]


def test_only_policies_with_which_the_server_does_not_keep_up_are_named(tmp_path: Path) -> None:
    turns = [turn(float(n), f"s{n % 5}", n // 5, new_tokens=4000, output_tokens=1) for n in range(60)]

    load = ("--trace", trace_of(tmp_path, turns), "--kv-mb-per-token", "0.125")

    (note,) = {each["notes"] for each in simulated(*load, "--policy", "none,infinite")}

    assert note.startswith("The server processes 0.")
    assert "(none) of the arriving load" in note and "infinite" not in note


def test_a_server_of_fixed_rate_is_noted_as_one_that_hits_do_not_speed_up() -> None:
    load = ("--trace", "people", "--sessions", "20", "--policy", "lru")

    assert "A server of --service-turns-per-s starts no turn sooner" in run(*load, "--service-turns-per-s", "9").stdout
    assert "Note" not in run(*load).stdout
    assert json.loads(run(*load, "--json").stdout)[0]["notes"] == ""


def test_an_optimum_of_everything_is_noted_as_no_bar_and_one_of_less_is_not() -> None:
    load = ("--trace", "people", "--sessions", "30", "--kv-mb-per-token", "0.125", "--ssd-gb")
    ample, none = (simulated(*load, ssd, "--policy", "optimum", "--dram-gb", "2")[0] for ssd in ("1000", "0"))

    assert ample["dram_on_time"] > 0.999 > none["dram_on_time"]
    assert ample["notes"].startswith("optimum has all history in DRAM on time by construction")
    assert none["notes"] == ""
