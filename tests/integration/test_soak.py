"""A daemon that works for half an hour near its limit: nothing grows, its event loop keeps time, every byte is right.

The environment variable SOAK_S shortens it, for a trial. First the load's own limit is measured, without pauses. All
that was seen is printed, and written as series into the file SOAK_REPORT, by default one in the test's folder.

A heartbeat is judged with the time for which the event loop waited for a processor, which clients and daemon share;
without the time in which the host of this virtual machine did not run its processor (`benchmarks/host_pauses.py`).
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.event_loop import late_beats
from benchmarks.host_pauses import HostPauses, Pause, paused_s
from kvservice_client import BlockChain, Client, Layout, Session, Tier, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.soak_judgement import STEPS, Sample, Soak, growth

SOAK_S = float(os.environ.get("SOAK_S", 1800))
TRANSPORTS = ("shm", "bulk", "grpc")
LAYOUT = Layout("soak", "uint8", layers=8, kv_heads=8, k_head_dim=64, v_head_dim=64, block_tokens=256)
CHAIN_BLOCKS, CHAINS = 4, 24  # 8 MiB, and of each client.
PACE = 0.8  # Of the limit: what is asked for.

_BYTES = np.random.default_rng(1).integers(0, 256, 4 * MIB, np.uint8)
_CHAIN_BYTES = CHAIN_BLOCKS * LAYOUT.block_tokens * LAYOUT.bytes_per_token


def layers_of(salt: int) -> list[np.ndarray[Any, Any]]:
    """The bytes of a chain by layer: views of the same bytes, from another place for each."""
    size = _CHAIN_BYTES // LAYOUT.layers
    starts = [(salt * 7919 + layer * 104729) % (len(_BYTES) - size) for layer in range(LAYOUT.layers)]
    return [_BYTES[start : start + size] for start in starts]


@dataclass
class Pace:
    """Of all clients together: when the next operation may begin. None: at once."""

    bytes_per_s: float | None = None
    next_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, size_bytes: int, over: threading.Event) -> None:
        if self.bytes_per_s is None:
            return
        with self.lock:
            # A missed pause is made up for, by a second at most.
            begin_s = self.next_s = max(self.next_s, time.monotonic() - 1.0)
            self.next_s += size_bytes / self.bytes_per_s
        over.wait(max(0.0, begin_s - time.monotonic()))


class Worker:
    """One client: saves, loads, evicts, reads from SSD, and talks in sessions. For one thread."""

    def __init__(self, daemon: DaemonProcess, transport: str, pace: Pace) -> None:
        self._client: Client = daemon.client(name=transport, transport=transport)
        self._cache = self._client.open_layout(LAYOUT)
        self._chooser = random.Random(transport)
        self._transport = transport
        self._pace = pace
        self._salt = TRANSPORTS.index(transport) << 24
        self._chains: list[tuple[int, BlockChain]] = []
        self.moved_bytes = self.cold = self.missed = 0
        self.failed: BaseException | None = None
        for _ in range(CHAINS):
            self._save()

    def run(self, over: threading.Event) -> None:
        try:
            while not over.is_set():
                self._pace.wait(_CHAIN_BYTES, over)
                self._turn()
        except BaseException as error:
            self.failed = error
            over.set()

    def close(self) -> None:
        """Raises AssertionError if another transport carried its bytes."""
        stats = self._client.stats()
        self._client.close()
        for carried in (stats.loaded_bytes, stats.saved_bytes):
            assert {name for name, count in carried.items() if count} == {self._transport}, carried

    def _turn(self) -> None:
        chance = self._chooser.random()
        if chance < 0.25:
            _, old = self._chains.pop(self._chooser.randrange(len(self._chains)))
            self._client.admin.discard(old)
            self._save()
        elif chance < 0.35:
            salt, chain = self._chooser.choice(self._chains)
            with self._cache.lookup(chain) as lease:
                is_on_ssd = all(run.ssd for run in lease.residency)
            if is_on_ssd:
                self._client.evict(chain, Tier.DRAM)
                self.cold += 1
            self._load(salt, chain)
        elif chance < 0.45:
            self._talk()
        else:
            self._load(*self._chooser.choice(self._chains))

    def _save(self) -> None:
        self._salt += 1
        chain = block_chain(LAYOUT, np.arange(CHAIN_BLOCKS * LAYOUT.block_tokens), salt=self._salt.to_bytes(8, "big"))
        result = self._cache.save(chain, layers_of(self._salt))
        assert result.is_complete, result
        self._chains.append((self._salt, chain))
        self.moved_bytes += _CHAIN_BYTES

    def _load(self, salt: int, chain: BlockChain) -> None:
        """Or save it again, if it left DRAM before it was on SSD."""
        with self._cache.lookup(chain) as lease:
            is_whole = lease.hit_blocks == len(chain)
            if is_whole:
                for layer, expected in zip(lease.load(), layers_of(salt), strict=True):
                    assert np.array_equal(layer.data, expected), f"wrong bytes in layer {layer.index} of {salt}"
        if not is_whole:
            self.missed += 1
            assert self._cache.save(chain, layers_of(salt)).is_complete
        self.moved_bytes += _CHAIN_BYTES

    def _talk(self) -> None:
        """A session of one turn, and its end."""
        salt, chain = self._chooser.choice(self._chains)
        session: Session = self._client.session(LAYOUT, f"{salt}")
        self._load(salt, chain)
        session.append(chain)
        with session.lookup() as history:
            assert history.state.token_count == CHAIN_BLOCKS * LAYOUT.block_tokens
        assert session.end()


def sample(daemon: DaemonProcess, observer: Client, moved_bytes: int) -> Sample:
    process = Path(f"/proc/{daemon.process.pid}")
    status = dict(re.findall(r"(\w+):\s+(\d+)", (process / "status").read_text()))
    return Sample(
        time.monotonic(),
        int(status["RssAnon"]) / 1024,
        int(status["RssShmem"]) / 1024,
        len(list((process / "fd").iterdir())),
        int(status["Threads"]),
        observer.admin.status().leases,
        moved_bytes,
    )


def heartbeats(daemon: DaemonProcess) -> int:
    """How many there were so far."""
    port = daemon.wait_for_log("serving")["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        found = re.search(r"kvservice_event_loop_delay_seconds_count (\S+)", response.read().decode())
    assert found is not None
    return int(float(found[1]))


def series(**figures: Callable[[int], float]) -> list[Sample]:
    """Of 20 minutes, a sample each 10 seconds; figures by the number of the sample, others stay the same."""
    same: dict[str, Any] = {**dict.fromkeys(STEPS, 50.0), "moved_bytes": 0}
    return [Sample(10.0 * at, **{**same, **{name: of(at) for name, of in figures.items()}}) for at in range(120)]


def test_what_grows_by_more_than_a_step_is_found() -> None:
    noise = np.random.default_rng(3).uniform(0, 4, 120)
    samples = series(
        private_mib=lambda at: 200 + at / 360 * 10 + noise[at], files=lambda at: 60 + at // 12, threads=lambda at: 9
    )
    found = {name: growth(samples, name) for name in STEPS}
    assert {name for name, each in found.items() if each.is_too_fast(STEPS[name])} == {"private_mib", "files"}
    assert found["private_mib"].per_h == pytest.approx(0.05, rel=0.5)


def test_noise_and_a_step_are_no_growth() -> None:
    noise = np.random.default_rng(4).uniform(0, 4, 120)
    samples = series(
        private_mib=lambda at: 200 + noise[at] * 5,
        shared_mib=lambda at: 400 + (at > 100) * 30,
        files=lambda at: 60 + (at > 60),
        leases=lambda at: at % 3,
    )
    assert not any(growth(samples, name).is_too_fast(step) for name, step in STEPS.items())


def test_a_heartbeat_is_late_by_what_the_machine_gave_no_reason_for() -> None:
    late: dict[str, Any] = {"event": "the event loop was late", "used_ms": 1.0, "processor": 1}
    log: list[dict[str, Any]] = [
        {**late, "at_s": 10.0, "late_ms": 30.0, "own_ms": 30.0},  # In a pause of 25 ms.
        {**late, "at_s": 11.0, "late_ms": 30.0, "own_ms": 2.0},
        {**late, "at_s": 99.0, "late_ms": 30.0, "own_ms": 2.0},  # After the end.
        {"event": "evicted"},
    ]
    # Both processors stopped at the same time, and later one on which the loop's thread did not run.
    both = [Pause(9.97, 10.0, 0.025, processor) for processor in (0, 1)]
    pauses = [*both, Pause(10.5, 10.9, 0.4, 1), Pause(10.97, 11.0, 0.03, 0)]
    beats = late_beats(log, pauses, 9.0, 12.0)
    assert [round(each.charged_s, 6) for each in beats] == [0.005, 0.03]
    seen = Soak(1.0, series(), 1000, beats, 0.0, 100, 9, 0, judges_growth=True, leases_max=99)
    (too_slow, late_beat) = seen.problems()
    assert "0.00 of the limit" in too_slow
    assert "1 of 1000 heartbeats were later than 20 ms" in late_beat


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """With less DRAM than the clients keep: a part of the loads is from SSD."""
    kept_bytes = len(TRANSPORTS) * CHAINS * _CHAIN_BYTES
    with DaemonProcess(
        tmp_path,
        dram__capacity_bytes=kept_bytes * 3 // 4,
        ssd__capacity_bytes=4 * kept_bytes,
        server__metrics_address="127.0.0.1:0",
        # Full within minutes. With the default, which takes 20 MiB, it fills for half an hour and looks like a leak.
        history__events_max=16384,
        log__level="debug",  # A line for each late heartbeat.
    ) as process:
        yield process


def moved(workers: list[Worker]) -> int:
    return sum(worker.moved_bytes for worker in workers)


@pytest.mark.slow
def test_near_its_limit_nothing_grows_no_heartbeat_is_late_and_every_byte_is_right(
    daemon: DaemonProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pace, over = Pace(), threading.Event()
    workers = [Worker(daemon, transport, pace) for transport in TRANSPORTS]
    threads = [threading.Thread(target=worker.run, args=(over,)) for worker in workers]
    for thread in threads:
        thread.start()
    with daemon.client() as observer, HostPauses() as host:
        over.wait(SOAK_S / 60)  # Until connections, buffers and tables have their sizes.
        begin_bytes, begin_s = moved(workers), time.monotonic()
        over.wait(max(10.0, SOAK_S / 60))
        limit = (moved(workers) - begin_bytes) / (time.monotonic() - begin_s)
        pace.bytes_per_s = PACE * limit

        beats_before = heartbeats(daemon)
        samples = [sample(daemon, observer, moved(workers))]
        begin_s = time.monotonic()
        while time.monotonic() < begin_s + SOAK_S and not over.wait(SOAK_S / 180):
            samples.append(sample(daemon, observer, moved(workers)))
        end_s = time.monotonic()
        beats = heartbeats(daemon) - beats_before
        over.set()
        for thread in threads:
            thread.join()
        for worker in workers:
            if worker.failed is not None:
                raise worker.failed
        until(lambda: observer.admin.status().leases == 0)
    for worker in workers:
        worker.close()

    seen = Soak(
        limit,
        samples,
        beats,
        late_beats(daemon.log, host.pauses, begin_s, end_s),
        paused_s(host.pauses, begin_s, end_s) / (end_s - begin_s) / len(host.processors),
        orders=samples[-1].moved_bytes // _CHAIN_BYTES,
        cold=sum(worker.cold for worker in workers),
        missed=sum(worker.missed for worker in workers),
        judges_growth=SOAK_S >= 1200,
        leases_max=2 * len(workers),
    )
    report = Path(os.environ.get("SOAK_REPORT", tmp_path / "soak.json"))
    seen.write(report)
    with capsys.disabled():
        print(f"\n{seen.summary()}\nin full: {report}")
    problems = seen.problems()
    assert not problems, "\n".join([*problems, seen.summary(), f"in full: {report}"])
