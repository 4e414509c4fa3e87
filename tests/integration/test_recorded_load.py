"""``kvctl trace record`` on a real daemon: the simulator replays what it writes, with the same turns and hits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvservice.simulate.engine import simulate
from kvservice.simulate.settings import GIB, Machine
from kvservice.simulate.traces.read import read
from kvservice_client import BlockChain, Client
from tests.daemon import DaemonProcess, until
from tests.integration.known_blocks import SMALL, new_chain, save

NewDaemon = Callable[..., DaemonProcess]
# The verb, also where the installed program is of another checkout.
# Programs that are started in the background, as tests may be, ignore SIGINT.
KVCTL = """import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import typer; from kvservice_client.cli.trace import trace; typer.run(trace)"""


@contextmanager
def recording(daemon: DaemonProcess, file: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``kvctl trace record``, from the time when the daemon records."""
    environment = {**os.environ, "KVCTL_ADDRESS": daemon.address}
    command = [sys.executable, "-c", KVCTL, "record", str(file), "--json", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        with daemon.client() as client:
            until(lambda: process.poll() is not None or client.admin.status().recordings > 0)
        try:
            yield process
        finally:
            process.kill()


def a_turn(client: Client, chain: BlockChain, history: int, blocks: int) -> int:
    """Look the history up, and save the blocks after it. Returns the hits."""
    with client.open_layout(SMALL).lookup(chain[:history]) as lease:
        save(client, SMALL, chain[: blocks + history])
        return lease.hit_blocks


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    answer: dict[str, Any] = json.loads(stdout)
    return answer


def test_the_simulator_has_the_turns_and_the_hits_of_the_daemon(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon, file = new_daemon(), tmp_path / "load.jsonl"
    chains = [new_chain(SMALL, 9) for _ in range(2)]
    with recording(daemon, file) as process, daemon.client() as client:
        hits = []
        for number in range(3):
            hits += [a_turn(client, chain, 3 * number, 3) for chain in chains]
        daemon.terminate()
        answer = ended(process)

    assert answer == {"file": str(file), "turns": 6, "dropped": 0, "done": True}
    workload = read(file)
    assert (workload.turns, workload.block_tokens) == (6, SMALL.block_tokens)
    machine = Machine(GIB, GIB, 1e9, workload.kv_bytes_per_token, service_turns_per_s=1e4)
    result = simulate(workload, machine, "lru")
    assert result.turns_with_history == sum(each > 0 for each in hits) == 4
    assert result.hit_rate == pytest.approx(sum(hits) / (sum(hits) + 6 * 3))
    assert workload.kv_bytes_per_token == 16 * 1024 // SMALL.block_tokens


def test_ctrl_c_leaves_a_file_of_whole_lines(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    with recording(daemon, file) as process, daemon.client() as client:
        save(client, SMALL, new_chain(SMALL, 2))
        until(lambda: file.read_text().count("\n") == 2)
        process.send_signal(signal.SIGINT)
        assert ended(process)["turns"] == 1
        until(lambda: not client.admin.status().recordings)
    assert read(file).turns == 1


def test_a_recording_ends_after_its_time(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    with recording(daemon, file, "--for", "1s") as process, daemon.client() as client:
        save(client, SMALL, new_chain(SMALL, 2))
        assert ended(process) == {"file": str(file), "turns": 1, "dropped": 0, "done": True}


def test_a_file_that_cannot_be_written_is_named(daemon: DaemonProcess, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KVCTL, "record", str(tmp_path), "--address", daemon.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path} cannot be written" in done.stderr
