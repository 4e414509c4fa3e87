"""Many clients of `benchmarks.clients`: what their figures mean, and that wrong bytes are no figure."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from benchmarks.client import parts
from benchmarks.client.parts import RunningDaemon
from benchmarks.clients.__main__ import Bench, Highest, loads_beside, p99, rate, run, table
from benchmarks.clients.worker import BLOCK_BYTES, LAYOUT, Done, OneClient, Work, chain_of, layers_of
from benchmarks.event_loop import FLAGS
from benchmarks.host_pauses import HostPauses
from benchmarks.leftovers import SHARED_MEMORY
from kvservice_client import Client
from tests.daemon import MIB


@pytest.fixture(scope="module")
def log_lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, log_lines: list[str]) -> Iterator[RunningDaemon]:
    folder = tmp_path_factory.mktemp("clients")
    with parts.daemon(folder, SHARED_MEMORY, 64 * MIB, 0, *FLAGS, log_lines=log_lines) as running:
        yield running


def test_the_rate_is_of_all_loads_from_the_first_begin_to_the_last_end() -> None:
    done = [Done([1.0] * 3, [], 10.0, 13.0, cpu_s=1.0), Done([0.5] * 4, [], 11.0, 14.0, cpu_s=1.0)]
    assert rate(done, 10**9) == pytest.approx(7 / 4)
    assert p99([1.0] * 99 + [2.0]) == pytest.approx(1.01)


def test_a_small_load_counts_while_the_huge_one_runs() -> None:
    small = Done([0.1, 0.2, 0.3, 0.4], [9.8, 9.9, 10.5, 12.1], 9.8, 12.5, cpu_s=1.0)
    huge = Done([2.0], [10.0], 9.8, 12.0, cpu_s=1.0)
    assert loads_beside(small, huge) == [0.2, 0.3]


def test_the_highest_value_is_found_although_it_lasts_for_a_moment() -> None:
    values, is_read = [3, 5, 90, 4], threading.Event()

    def read() -> int:
        value = values.pop(0) if len(values) > 1 else values[0]
        if len(values) == 1:
            is_read.set()
        return value

    with Highest(read, every_s=0.001) as highest:
        assert is_read.wait(30.0)
    assert highest.value == 90


def test_clients_of_several_processes_load_at_once_and_every_figure_is_in_the_table(
    daemon: RunningDaemon, log_lines: list[str]
) -> None:
    with HostPauses() as host:
        sizes = {"processes": 2, "clients_each": 2, "huge_blocks": 16}
        bench = Bench(daemon, daemon, log_lines, host, seconds=0.05, rounds=1, **sizes)
        measured = bench.measure("shm")

    assert measured.many_gbps > 0 and measured.p50_ms <= measured.p99_ms and measured.huge_gb > 0
    assert measured.clients_cpu_s_per_gb > 0
    text = table({"shm": measured})
    assert f"| {measured.many_gbps:.2f} |" in text
    stall = "under 10" if measured.stall_ms <= 10 else f"{measured.stall_ms:.1f}"
    assert f"| longest stall of the event loop, ms | {stall} |" in text


def test_wrong_bytes_end_the_measure(daemon: RunningDaemon) -> None:
    with Client(daemon.address) as client:
        assert client.open_layout(LAYOUT).save(chain_of(2), _other_bytes()).is_complete
    with pytest.raises(RuntimeError, match="a process of clients failed"):
        run(Work(daemon.address, "grpc", 1, 2, 0.01))


def test_a_load_that_writes_nothing_after_a_right_one_is_found(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(daemon.address) as client:
        assert client.open_layout(LAYOUT).save(chain_of(3), layers_of(3)).is_complete
    one = OneClient(Work(daemon.address, "grpc", 1, 3, 0.01), 0)
    one.run(0.0, threading.Event())
    assert one.failed is None
    monkeypatch.setattr(one, "load", lambda: None)
    one.loads_s.clear()  # Otherwise the time is over, and none begins.
    one.run(0.0, threading.Event())
    one.close()
    assert isinstance(one.failed, AssertionError)


def _other_bytes() -> list[bytes]:
    return [bytes(2 * BLOCK_BYTES // LAYOUT.layers)] * LAYOUT.layers


def test_an_unknown_transport_is_refused_with_those_there_are() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.clients", "tcp"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bulk, shm, grpc" in done.stderr
