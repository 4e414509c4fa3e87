"""``kvctl simulate``: its output, and the options that it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from kvservice.simulate import command_output as output
from kvservice.simulate import generate, plot
from kvservice.simulate.command import scaled, simulate
from kvservice.simulate.command_options import LoadOptions, RateOptions
from kvservice.simulate.engine import CONTENDERS
from kvservice.simulate.settings import GIB, MIB, Machine

KEYS = {
    "policy", "hit_rate", "hit_rate_history", "dram_on_time", "dram_late", "ssd", "miss", "ttft_p50_s", "ttft_p99_s",
    "ssd_written_gb", "moved_gb", "promoted_unused_gb", "writes_dropped_gb",
    "recomputed_hits", "server_share", "queue_p50", "turns", "turns_simulated_per_s",
}  # fmt: skip
SMALL = ("--sessions", "80", "--dram-gb", "8", "--ssd-gb", "64", "--service-turns-per-s", "3")

program = typer.Typer()
program.command()(simulate)


def run(*arguments: str) -> Result:
    # One line of an error is not broken into two.
    return CliRunner(env={"COLUMNS": "250", "TERMINAL_WIDTH": "250"}).invoke(program, list(arguments))


def simulated(*arguments: str) -> list[dict[str, Any]]:
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def refused(*arguments: str) -> str:
    """The text on stderr, without its frame."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    return " ".join(re.sub(r"[╭─╮│╰╯]", " ", done.stderr).split())


def trace_of(folder: Path, lines: Sequence[object]) -> str:
    file = folder / "trace.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(file)


def turn(t: float, session: str, number: int, new_tokens: int = 100, output_tokens: int = 100) -> dict[str, object]:
    return {"t": t, "session": session, "turn": number, "new_tokens": new_tokens, "output_tokens": output_tokens}


def test_json_is_a_list_with_an_object_for_each_policy_in_the_order_asked_for() -> None:
    found = simulated("--trace", "sharegpt", "--policy", "fifo,lru", *SMALL, "--warmup-turns", "50")

    assert [each["policy"] for each in found] == ["fifo", "lru"]
    for each in found:
        assert set(each) >= KEYS
        shares = [each[name] for name in ("dram_on_time", "dram_late", "ssd", "miss")]
        assert sum(shares) == pytest.approx(1)
        assert sum(shares[:3]) == pytest.approx(each["hit_rate_history"])
        assert each["hit_rate"] < each["hit_rate_history"]


def test_a_variant_of_a_policy_is_reported_under_the_requested_name() -> None:
    found = simulated("--trace", "people", "--policy", "foresight-unlearned,foresight", "--sessions", "20", *SMALL[2:])

    assert [each["policy"] for each in found] == ["foresight-unlearned", "foresight"]


@pytest.mark.parametrize("generator", ["sharegpt", "people"])
def test_the_same_seed_gives_the_same_figures_and_another_seed_others(generator: str) -> None:
    def figures(seed: str) -> list[dict[str, Any]]:
        found = simulated("--trace", generator, "--policy", "lru,lookahead", *SMALL, "--seed", seed)
        return [
            {name: each[name] for name in each if name not in ("seconds", "turns_simulated_per_s")} for each in found
        ]

    assert figures("1") == figures("1")
    assert figures("1") != figures("2")


def test_without_a_tier_nothing_is_there_and_figures_of_nothing_are_null(tmp_path: Path) -> None:
    (found,) = simulated(
        "--trace", "sharegpt", "--policy", "lru", *SMALL[:2], "--dram-gb", "0", "--ssd-gb", "0", *SMALL[6:]
    )
    assert (found["miss"], found["hit_rate"], found["moved_gb"]) == (1, 0, 0)

    trace = trace_of(tmp_path, [turn(t, f"s{t}", 0) for t in range(3)])
    (found,) = simulated("--trace", trace, "--policy", "lru", "--service-turns-per-s", "1")
    assert (found["turns"], found["turns_with_history"]) == (3, 0)
    assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in found.values())


def test_a_trace_is_played_with_its_own_times(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [turn(0, "a", 0), turn(1, "b", 0), turn(10, "a", 1), turn(11, "b", 1)])

    (found,) = simulated("--trace", trace, "--policy", "lru", "--service-turns-per-s", "5")

    assert (found["turns"], found["turns_with_history"], found["dram_on_time"]) == (4, 2, 1)
    assert found["simulated_s"] == pytest.approx(11.2)


def test_people_get_a_table() -> None:
    done = run("--trace", "people", "--policy", "lru,fifo", *SMALL)

    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["policy", "hits", "of"]
    assert [line.split()[0] for line in lines[1:3]] == ["lru", "fifo"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--dram-gb", "-1"), "'--dram-gb': -1 is too small; it must be at least 0"),
        (("--dram-gb", "nan"), "'--dram-gb': nan is not a finite number"),
        (("--ssd-gb", "inf"), "'--ssd-gb': inf is not a finite number"),
        (("--ssd-gb", "1e12"), "'--ssd-gb': 1e+12 is too large; it must be at most 1e+09"),
        (("--ssd-gbps", "0"), "'--ssd-gbps': 0 is too small; it must be above 0"),
        (("--link-gbps", "-3"), "'--link-gbps': -3 is too small"),
        (("--kv-mb-per-token", "0"), "--kv-mb-per-token: 0 MiB is less than a byte"),
        (("--kv-mb-per-token", "nan"), "'--kv-mb-per-token': nan is not a finite number"),
        (("--service-turns-per-s", "0"), "'--service-turns-per-s': 0 is too small; it must be above 0"),
        (("--service-turns-per-s", "inf"), "'--service-turns-per-s': inf is not a finite number"),
        (("--prefill-tokens-per-s", "0"), "'--prefill-tokens-per-s': 0 is too small"),
        (("--decode-tokens-per-s", "-1"), "'--decode-tokens-per-s': -1 is too small"),
        (("--batch", "0"), "'--batch': 0 is too small; it must be at least 1"),
        (("--batch", "8", "--service-turns-per-s", "2"), "--batch: belongs to the GPU's model"),
        (("--gpus", "0"), "'--gpus': 0 is too small"),
        (("--session-ttl-s", "0"), "'--session-ttl-s': 0 is too small"),
        (("--warmup-turns", "-1"), "'--warmup-turns': -1 is too small"),
        (("--warmup-turns", "10000000"), "--warmup-turns: 10000000 leaves nothing to measure: the load has"),
        (("--seed", "-1"), "'--seed': -1 is too small"),
        (("--sessions", "0"), "'--sessions': 0 is too small; it must be at least 1"),
        (("--session-rate", "0"), "'--session-rate': 0 is too small; it must be above 0"),
        (("--think-s", "-1"), "'--think-s': -1 is too small"),
        (("--think-s", "nan"), "'--think-s': nan is not a finite number"),
        (("--think-shape", "square"), "--think-shape: no shape is called 'square'; choose from people, exponential"),
        (("--start-tokens", "5"), "--start-tokens: is for people, not for sharegpt"),
        (("--answer-share", "0.9"), "'--answer-share': 0.9 is too large; it must be at most 0.88"),
        (("--context", "-1"), "'--context': -1 is too small"),
        (("--typing-lead-s", "5:2"), "--typing-lead-s: '5:2' ends before it begins"),
        (("--typing-lead-s", "-1:2"), "--typing-lead-s: '-1:2' begins below 0"),
        (("--typing-lead-s", "2"), "--typing-lead-s: '2' is not of the form A:B"),
        (("--typing-lead-s", "nan:2"), "--typing-lead-s: 'nan:2' has an end that is not a finite number"),
        (("--typing-lead-s", "2:5", "--false-hints", "1"), "'--false-hints': 1 is too large; it must be below 1"),
        (("--typing-lead-s", "2:5", "--false-hints", "-0.1"), "'--false-hints': -0.1 is too small"),
        (("--false-hints", "0.5"), "--false-hints: is the share of wrong hints: give --typing-lead-s too"),
        (("--format", "azure"), "--format: is for files; sharegpt is generated"),
        (("--policy", "lru,belady"), f"--policy: no policy is called 'belady'; choose from {', '.join(CONTENDERS)}"),
        (("--policy", "distribution-bound"), "--policy: 'distribution-bound' is called ages-only now"),
        (("--policy", "lru,fifo,lru"), "--policy: 'lru' is given more than once"),
        (("--policy", ""), "--policy: no policy is called ''"),
        (("--sweep", "ssd"), "--sweep: selects what --plot draws: give --plot too"),
        (("--plot", "picture.jpeg"), "--plot: picture.jpeg does not end in .svg, .png, .pdf"),
        (("--plot", "/no/such/folder/picture.svg"), "--plot: there is no folder /no/such/folder"),
        (("--plot", "picture.svg", "--dram-gb", "0"), "--sweep: --dram-gb is 0: there is no capacity to vary"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_with_the_option_and_the_reason(arguments: tuple[str, ...], reason: str) -> None:
    policy = () if "--policy" in arguments else ("--policy", "lru")
    assert f"Invalid value for {reason}" in refused("--trace", "sharegpt", *policy, *arguments)


@pytest.mark.parametrize(
    "option", [("--sessions", "5"), ("--session-rate", "2"), ("--think-s", "3"), ("--think-shape", "people")]
)
def test_what_is_for_generated_load_is_refused_with_a_file(tmp_path: Path, option: tuple[str, str]) -> None:
    trace = trace_of(tmp_path, [turn(0, "a", 0)])

    said = refused("--trace", trace, "--policy", "lru", *option)

    assert f"Invalid value for {option[0]}: is for generated load; {trace} is a file" in said


@pytest.mark.parametrize("option", [("--block-tokens", "64"), ("--spread-ticks",), ("--keep-ticks",)])
def test_what_is_for_files_is_refused_with_generated_load(option: tuple[str, ...]) -> None:
    said = refused("--trace", "people", "--policy", "lru", *option)

    assert "is for files; people is generated" in said


def test_a_size_of_blocks_is_refused_with_a_file_without_blocks(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [turn(0, "a", 0)])

    said = refused("--trace", trace, "--policy", "lru", "--block-tokens", "64")

    assert "--block-tokens: is for mooncake, mooncake-sessions, bailian-prefixes; the file is jsonl" in said


def test_a_size_of_blocks_makes_a_file_of_such_blocks_readable(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [{"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [0, 1]}])

    assert "--block-tokens" in run("--trace", trace, "--policy", "lru").stderr
    assert simulated("--trace", trace, "--policy", "lru", "--block-tokens", "64")[0]["turns"] == 1


def test_the_requests_of_a_coarse_clock_are_spread_unless_they_are_to_be_kept_and_a_note_says_so(
    tmp_path: Path,
) -> None:
    trace = trace_of(tmp_path, [turn(3.0 * (n // 4), f"s{n}", 0) for n in range(80)])
    arguments = ("--trace", trace, "--policy", "lru", "--service-turns-per-s", "2")

    (spread,), (kept,) = simulated(*arguments), simulated(*arguments, "--keep-ticks")

    assert (spread["queue_p99"], kept["queue_p99"]) == (0, 3)
    clock = "The file's clock ticks in 3 s, and up to 4 requests share a tick: they "
    assert spread["notes"].startswith(f"{clock}are spread over it (--keep-ticks keeps them).")
    assert kept["notes"].startswith(f"{clock}arrive together (--keep-ticks).")
    assert f"Note: {clock}are spread" in run(*arguments).stdout


def test_a_load_without_notes_has_none_in_its_output(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [turn(0, "a", 0), turn(1, "a", 1)])

    assert simulated("--trace", trace, "--policy", "lru")[0]["notes"] == ""
    assert "Note" not in run("--trace", trace, "--policy", "lru").stdout


def test_the_sessions_of_agents_begin_at_the_given_rate(tmp_path: Path) -> None:
    request = {"t": 0, "type": "s", "model": "m", "in": 64, "out": 9, "hash_ids": [1]}
    trace = trace_of(tmp_path, [{"id": f"a{n}", "block_size": 64, "requests": [request]} for n in range(50)])

    (slow,), (fast,) = (
        simulated("--trace", trace, "--policy", "lru", "--session-rate", rate) for rate in ("0.1", "10")
    )

    assert slow["simulated_s"] > 10 * fast["simulated_s"]
    assert slow["notes"] == "The 50 sessions share no clock: 0.1 begin per second (--session-rate)."


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [turn(0, "a", 0)])

    said = refused("--trace", trace, "--policy", "lru", "--format", "parquet")

    assert "Invalid value for --format: no format is called 'parquet'; choose from auto, jsonl" in said


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "is empty"),
        ([turn(5, "a", 0), turn(4, "b", 0)], ": line 2: "),
        ([turn(0, "a", 0), turn(1, "a", 0)], ": line 2: "),
        ([turn(0, "a", 0), turn(1, "a", 1, new_tokens=-3)], ": line 2: "),
        ([turn(0, "a", 0), '{"t": 1, "session": "a", "tu'], ": line 2: "),
        (["some words"], ": line 1: "),
    ],
)
def test_a_bad_trace_is_refused_in_one_line_that_names_the_file_the_line_and_the_reason(
    tmp_path: Path, lines: Sequence[object], reason: str
) -> None:
    trace = trace_of(tmp_path, lines)

    done = run("--trace", trace, "--policy", "lru", "--service-turns-per-s", "1", "--json")

    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"kvctl: --trace: {trace}")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_trace_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run("--trace", str(tmp_path / "missing"), "--policy", "lru")

    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "missing: cannot be read: No such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("lines", "option", "reason"),
    [
        ([turn(t, "a", t, new_tokens=2**24) for t in range(200)], (), None),
        ([turn(t, "a", t, new_tokens=2**24) for t in range(200)], ("--kv-mb-per-token", "100000"), "more than 2^60"),
    ],
)
def test_what_no_number_holds_is_refused_in_one_line(
    tmp_path: Path, lines: Sequence[object], option: tuple[str, ...], reason: str | None
) -> None:
    small = ("--dram-gb", "1", "--ssd-gb", "1")

    done = run("--trace", trace_of(tmp_path, lines), "--policy", "lru,foresight", *small, *option, "--json")

    if reason is None:
        assert done.exit_code == 0
    else:
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert reason in done.stderr


def test_a_load_that_no_clock_tells_apart_is_refused_in_one_line() -> None:
    load = ("--trace", "sharegpt", "--sessions", "20", "--session-rate", "1e-300")

    done = run(*load, "--policy", "foresight", "--dram-gb", "5", "--ssd-gb", "10", "--json")

    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "give shorter times or higher rates" in done.stderr


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_simulated(tmp_path: Path) -> None:
    file = tmp_path / "picture.svg"
    file.mkdir()

    said = refused("--trace", str(tmp_path / "missing"), "--policy", "lru", "--plot", str(file))

    assert "cannot be written: Is a directory" in said


def test_a_picture_without_matplotlib_is_refused_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "is_available", lambda: False)

    done = run("--trace", str(tmp_path / "missing"), "--policy", "lru", "--plot", str(tmp_path / "picture.svg"))

    assert done.exit_code == 1
    assert done.stderr == (
        "kvctl: --plot needs matplotlib, which is not installed. Install it: pip install matplotlib.\n"
    )


def test_a_picture_of_a_sweep_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{number}.svg" for number in range(2)]
    for file in files:
        done = run(
            "--trace",
            "sharegpt",
            "--policy",
            "lru,fifo",
            *SMALL,
            "--sessions",
            "20",
            "--plot",
            str(file),
            "--sweep",
            "ssd",
            "--json",
        )
        assert done.exit_code == 0, done.output

    assert files[0].read_bytes() == files[1].read_bytes()
    assert [each["policy"] for each in json.loads(done.stdout)] == ["lru", "fifo"]
    text = files[0].read_text()
    assert all(word in text for word in ("SSD (GiB)", "lru", "fifo", "time to first token"))


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_a_picture_is_of_the_kind_that_its_name_tells(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"picture{suffix}"

    plot.draw(file, [("hits", [("lru", [0.1, 0.2])])], [1, 2], "DRAM (GiB)", "a title")

    assert file.read_bytes().startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix])


def test_typing_is_hinted_in_a_trace_that_has_no_hints(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [turn(10.0 * n, "a", n) for n in range(5)])
    (plain,) = simulated("--trace", trace, "--policy", "lru", "--service-turns-per-s", "5")

    (hinted,) = simulated("--trace", trace, "--policy", "lru", "--service-turns-per-s", "5", "--typing-lead-s", "2:5")

    assert plain["hit_rate"] == hinted["hit_rate"]


def test_each_option_of_the_machine_is_the_machines() -> None:
    told = RateOptions(
        ssd_gbps=3,
        kv_mb_per_token=0.5,
        link_gbps=7,
        prefill_tokens_per_s=900,
        gpus=4,
        blocking_loads=True,
        always_load=True,
        unreported_answers=True,
        overflow_drops=True,
        session_ttl_s=60,
        decode_tokens_per_s=11,
        batch=5,
    )

    assert told.machine(2, 5) == Machine(
        dram_bytes=2 * GIB,
        ssd_bytes=5 * GIB,
        ssd_bytes_per_s=3 * GIB,
        kv_bytes_per_token=MIB // 2,
        link_bytes_per_s=7 * GIB,
        service_turns_per_s=None,
        prefill_tokens_per_s=900,
        decode_tokens_per_s=11,
        batch=5,
        blocking_loads=True,
        always_load=True,
        reports_answers=False,
        overflow_keeps=False,
        session_ttl_s=60,
        gpus=4,
    )
    assert RateOptions(service_turns_per_s=1.5).machine(1, 1).service_turns_per_s == 1.5


def test_each_option_of_the_load_is_the_loads() -> None:
    told = LoadOptions("sharegpt", "auto", 0, 3, 40, 2.0, 12.0, "lognormal", None, None, 1000, "1:2", 0.25)
    theirs = generate.sharegpt(
        sessions=40,
        session_rate=2.0,
        think_s=12.0,
        shape="lognormal",
        context_tokens=1000,
        typing_lead_s=(1, 2),
        false_hints=0.25,
        seed=3,
    )

    ours = told.workload()

    for name in ("session", "arrives_s", "think_s", "new_tokens", "output_tokens"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name), equal_nan=True)
    assert np.array_equal(ours.hints.lead_s, theirs.hints.lead_s)
    assert ours.context_tokens == 1000


def test_people_start_and_follow_answers_as_the_options_say() -> None:
    ours = LoadOptions("people", sessions=20, start_tokens=2000.0, answer_share=0.0).workload()
    theirs = generate.people(users=20, start_tokens=2000.0, answer_share=0.0)
    assert np.array_equal(ours.new_tokens, theirs.new_tokens) and np.array_equal(ours.think_s, theirs.think_s)
    assert not np.array_equal(ours.think_s, LoadOptions("people", sessions=20).workload().think_s)


def test_a_sweep_changes_one_tier() -> None:
    machine = RateOptions().machine(8, 16)

    assert scaled(machine, "dram", 0.5) == RateOptions().machine(4, 16)
    assert scaled(machine, "ssd", 2.0) == RateOptions().machine(8, 32)


def test_what_nothing_was_seen_of_is_null_in_json_and_a_dash_in_a_table() -> None:
    assert [output.plain(value) for value in (math.nan, math.inf, 0.5, 3, "lru")] == [None, None, 0.5, 3, "lru"]
    assert (output.share(math.nan), output.seconds(math.nan)) == ("-", "-")


def test_a_long_run_says_what_is_simulated_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_SILENT_S", 0.0)
    with output.Simulations(2) as simulations:
        simulations.begins("lru", 8, 2048)
        simulations._timer.join()
        simulations.begins("fifo", 16, 0)
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [
        "kvctl: simulating lru with 8 GiB of DRAM and 2.0 TiB of SSD",
        "kvctl: simulating fifo with 16 GiB of DRAM and 0 GiB of SSD",
    ]
