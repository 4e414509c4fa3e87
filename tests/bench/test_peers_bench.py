"""The benchmark beside other stores: its harness on tiny blocks, its table, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.leftovers import SHARED_MEMORY
from benchmarks.peers import __main__ as peers
from benchmarks.peers import report
from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Worker, WrongBytes
from benchmarks.peers.environments import NotInstalled, python_of
from benchmarks.peers.results import Cell, NoResults, Results
from benchmarks.peers.rounds import Measured, Outcome, run
from benchmarks.peers.systems import GROUPS, MIB, Group, System, named
from tests.daemon import until

REMOTE, SAME_HOST, SSD = GROUPS


def tiny(group: Group, *names: str) -> tuple[Group, list[System]]:
    """The group with 2 MiB in all, and these of its systems."""
    return replace(group, bytes_moved=2 * MIB), [system for system in group.systems if system.name in names]


def shared_memory_of(process_id: int) -> list[Path]:
    """What a run of this process has in /dev/shm."""
    return list(SHARED_MEMORY.glob(f"kvbench-{process_id}-*"))


def test_ours_and_the_limits_move_every_byte_and_leave_nothing_behind(tmp_path: Path) -> None:
    for group, names in ((SAME_HOST, ("memcpy-2", "view", "first-view")), (SSD, ("direct-2", "ssd"))):
        chosen, systems = tiny(group, *names)
        outcome = run(chosen, systems=systems, clients=[2], sizes=[MIB], rounds=1, directory=tmp_path)

        assert not outcome.skipped
        assert sorted((each.system, each.direction) for each in outcome.measured) == sorted(
            (name, direction) for name in names for direction in ("get", "put")
        )
        assert all(each.gbps > 0 and each.cpu_s[0] > 0 for each in outcome.measured)
    assert not shared_memory_of(os.getpid())
    assert not list(tmp_path.iterdir())


def test_redis_and_grpc_are_measured_beside_tcp(tmp_path: Path) -> None:
    try:
        python_of("redis")
    except NotInstalled as why:
        pytest.skip(str(why))
    chosen, systems = tiny(REMOTE, "tcp-2", "grpc", "redis")

    outcome = run(chosen, systems=systems, clients=[1], sizes=[MIB], rounds=1, directory=tmp_path)

    assert not outcome.skipped
    assert {each.system for each in outcome.measured} == {"tcp-2", "grpc", "redis"}


def test_a_peer_that_is_not_installed_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.peers.environments.FOLDER", tmp_path / "none")
    chosen, systems = tiny(REMOTE, "tcp-1", "mooncake")

    outcome = run(chosen, systems=systems, clients=[1], sizes=[MIB], rounds=1, directory=tmp_path)

    assert outcome.skipped == {"mooncake": "not installed: run `python -m benchmarks.peers.environments mooncake`"}
    assert {each.system for each in outcome.measured} == {"tcp-1"}


class Forgetful(Client):
    """Keeps nothing, and returns memory that once had the bytes."""

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        self.kept = blocks

    def get(self, names: Any, blocks: Sequence[Bytes]) -> Sequence[Any]:
        return self.kept


def test_a_system_that_delivers_other_bytes_than_were_put_is_refused() -> None:
    content = np.arange(MIB // 8, dtype=np.uint64)
    worker = Worker(Forgetful(), Memory.of(2 * MIB), 0, content)
    worker.prepare("turn", MIB, 2)
    worker.put()
    worker.settle()
    worker.get()

    with pytest.raises(WrongBytes, match="block 0 of turn turn-0 is not what was put"):
        worker.verify()


def test_an_interrupted_run_ends_its_servers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peers", "--group", "same-host", "--only", "shm"]
    command += ["--directory", str(tmp_path), "--results", str(tmp_path / "results.json")]

    def heed_interrupts() -> None:  # A process that is started in the background, as tests may be, ignores SIGINT.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts) as process:
        until(lambda: bool(list(SHARED_MEMORY.glob(f"kvbench-{process.pid}-shm/*/arena"))))  # A daemon has begun.
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    assert not shared_memory_of(process.pid)
    assert not list(tmp_path.iterdir())


def results() -> Results:
    """Ours at 0.9 of the limit with 1 MiB and 4 MiB blocks, Redis at 0.5 and with more CPU time; Mooncake skipped."""
    found = Results()
    for size in (MIB, 4 * MIB):
        for direction in ("put", "get"):
            for name, gbps, cpu_s in (
                ("tcp-1", 4.0, 0.5),
                ("tcp-2", 5.0, 0.5),
                ("grpc", 4.5, 0.9),
                ("redis", 2.5, 1.0),
            ):
                found.cells.setdefault("remote", {})[name, 1, size, direction] = Cell(gbps, cpu_s, 7)
    found.skipped["remote"] = {"mooncake": "no\nlibrary"}
    found.runs["remote"] = ["Commit 1."]
    return found


def test_the_table_has_shares_of_the_faster_limit_and_names_what_was_skipped(tmp_path: Path) -> None:
    page, plot = tmp_path / "page.md", tmp_path / "plot.svg"
    report.draw(results(), plot)
    report.write(results(), page, plot)
    text = page.read_text()

    assert "| 1 | get | **KVService, grpc** | 4.50 (0.90) | 4.50 (0.90) | 0.90, 0.90 |" in text
    assert "| 1 | put | Redis | 2.50 (0.50) | 2.50 (0.50) | 1.00, 1.00 |" in text
    assert "Mooncake Store, TCP: skipped: no library" in text
    assert "(plot.svg)" in text
    assert "<svg" in plot.read_text()


def test_goals_are_for_blocks_of_4_mib_and_more_against_the_best_peer() -> None:
    assert results().goals(REMOTE) == [
        (
            "speed: at least 1.2 x the best peer, or 0.9 x the limit if that is less",
            "2 of 2, without lm, mooncake, mp-tcp, nixl-ucx",
            "1.50 of it: get of 4 MiB, 1 client",
        ),
        (
            "CPU seconds per GB: at most the thriftiest peer's",
            "2 of 2, without lm, mooncake, mp-tcp, nixl-ucx",
            "1.11 of it: get of 4 MiB, 1 client",
        ),
    ]


def test_figures_are_kept_from_one_run_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "results.json"
    results().save(path)

    assert Results.read(path) == results()
    assert json.loads(path.read_text())["remote"]["skipped"] == {"mooncake": "no\nlibrary"}
    assert Results.read(tmp_path / "none.json") == Results()


def outcome(gbps: dict[str, float], skipped: dict[str, str] | None = None) -> Outcome:
    """Of one round with blocks of 4 MiB."""
    moved = [
        Measured(name, 1, 4 * MIB, direction, 10**9, [1 / speed], [0.1])
        for name, speed in gbps.items()
        for direction in ("put", "get")
    ]
    return Outcome(moved, skipped or {})


def test_figures_of_two_runs_are_not_compared_and_a_system_that_is_skipped_now_has_none() -> None:
    found = Results()
    found.begin(REMOTE, "first")
    found.add(REMOTE, outcome({"tcp-1": 20.0, "bulk": 5.0, "redis": 10.0, "lm": 10.0}), REMOTE.systems)
    found.begin(REMOTE, "second")
    found.add(REMOTE, outcome({"tcp-1": 20.0, "bulk": 18.0}, {"redis": "its driver ended"}), REMOTE.systems)

    text = report.markdown(found)

    assert "| 1 | get | **KVService, bulk** | 18.00 (0.90) [2] |" in text
    assert "| 1 | get | LMCache server (lm://) | 10.00 [1] |" in text
    assert "| Redis |" not in text
    assert "[1]: Commit" in text and "Reproduce with `second`" in text
    assert [met for _, met, _ in found.goals(REMOTE)] == ["not measured", "not measured"]


def test_each_get_is_compared_with_the_in_process_cache_of_its_kind_and_a_load_also_with_the_one_in_place() -> None:
    found = Results()
    found.begin(SAME_HOST, "command")
    speeds = {"memcpy-2": 9.0, "shm": 8.0, "view": 12.0, "first-view": 9.0, "local-cpu": 5.0, "local-view": 10.0}
    found.add(SAME_HOST, outcome(speeds), SAME_HOST.systems)

    where = "get of 4 MiB, 1 client"
    assert found.goals(SAME_HOST)[2:] == [
        ("in place, viewed before: at least the in-process cache's speed in place", "1 of 1", f"1.20 of it: {where}"),
        ("in place, first view: at least the in-process cache's speed in place", "0 of 1", f"0.90 of it: {where}"),
        ("a load's speed: at least the in-process cache's, copied out", "1 of 1", f"1.60 of it: {where}"),
        (
            "a load's speed: at least the in-process cache's in place, every page touched",
            "0 of 1",
            f"0.80 of it: {where}",
        ),
    ]


def test_a_file_with_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text in ("{", "[]", '{"remote": {"about": "x"}}'):
        path.write_text(text)
        with pytest.raises(NoResults, match=r"other\.json has no figures of this program .* name another file"):
            Results.read(path)


def test_an_unknown_system_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="no system is called reddis; there are bulk, direct-1"):
        named(["redis", "reddis"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--write", "."], "--write: . is a folder: name a file"),
        (["--plot", "nowhere/plot.svg"], "--plot: there is no folder nowhere"),
        (["--only", "mooncake,", "--group", "ssd"], "--only: the groups that are measured have direct-1"),
        (["--report", "--results", "nothing.json"], "--report: nothing.json has no figures yet"),
    ],
)
def test_wrong_arguments_are_refused_before_the_measurements(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])

    with pytest.raises(SystemExit, match="2"):
        peers.main()

    assert problem in capsys.readouterr().err
