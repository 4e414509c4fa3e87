"""``kvctl simulate`` and ``plan`` as users run them: found among the client's verbs, and without a daemon."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.test_client_kvctl import kvctl

NOBODY = "127.0.0.1:1"
SMALL = ("--trace", "sharegpt", "--sessions", "60", "--service-turns-per-s", "2", "--ssd-gb", "50", "--dram-gb", "5")


def test_the_simulators_verbs_stand_among_the_others() -> None:
    done = kvctl("--help")

    assert done.returncode == 0
    assert all(f" {verb} " in done.stdout for verb in ("simulate", "plan", "status"))


def refusals(stderr: str) -> list[str]:
    """Without the lines that a long run writes."""
    return [line for line in stderr.splitlines() if not line.startswith("kvctl: simulating ")]


def test_simulate_prints_one_document_and_nothing_else() -> None:
    done = kvctl("simulate", *SMALL, "--policy", "lru,lookahead", "--json", address=NOBODY)

    assert (done.returncode, refusals(done.stderr)) == (0, [])
    assert [each["policy"] for each in json.loads(done.stdout)] == ["lru", "lookahead"]


def test_plan_ends_with_1_and_a_line_where_nothing_reaches_the_target() -> None:
    done = kvctl("plan", *SMALL[:6], "--target-hit", "1", "--of", "all", "--policy", "lru", address=NOBODY)

    assert (done.returncode, done.stdout) == (1, "")
    [line] = refusals(done.stderr)
    assert line.startswith("kvctl: no size reaches 1 of all turns")


def test_a_bad_trace_ends_with_1_and_a_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"t": 0, "session": "a", "turn": 0, "new_tokens": 1, "output_tokens": 1}\n{"t": 1, "ses')

    done = kvctl("simulate", "--trace", str(trace), "--policy", "lru", "--json")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{trace}: line 2: " in done.stderr


def test_wrong_usage_ends_with_2() -> None:
    done = kvctl("simulate", *SMALL, "--policy", "lru", "--dram-gb", "nan")

    assert (done.returncode, done.stdout) == (2, "")
    assert "--dram-gb" in done.stderr
