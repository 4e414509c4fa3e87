"""One run: a policy in a daemon of its own, and in the simulator with the sizes and the rate measured there."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.placement.drive import Played, Player, Turn, chain_of
from benchmarks.placement.load import BLOCK_BYTES, LAYOUT, Scenario, workload_of
from kvservice.simulate.engine import simulate
from kvservice.simulate.result import Result
from kvservice_client import Client, Durability
from tests.daemon import MIB, DaemonProcess

_INDEX_BYTES = MIB  # Of DRAM's blocks: a part of the capacity of DRAM.
_FREE_LOW, _FREE_HIGH = 0.1, 0.15  # Of DRAM: space for two to four loads, as 5 % of a large tier have.
_LOADS, _LOAD_BLOCKS = 9, 15


@dataclass(frozen=True, slots=True)
class Run:
    """The measured turns of one run in the daemon, and the simulator's result for the same turns."""

    policy: str
    seed: int
    played: Played
    simulated: Result
    turns: list[Turn]  # Without the warm-up.
    ssd_bytes_per_s: float
    ttft_mean_s: float

    @property
    def on_time(self) -> float:
        """The share of histories that were in DRAM at their dispatch, as the simulator counts it."""
        return _mean([turn.in_dram / turn.history for turn in self.turns if turn.history])

    @property
    def hits(self) -> float:
        """The share of histories that were in any tier."""
        return _mean([1 - turn.missing / turn.history for turn in self.turns if turn.history])

    @property
    def waited(self) -> list[Turn]:
        """The requests that waited in the queue for longer than the SSD needs for their whole history."""
        return [
            turn
            for turn in self.turns
            if turn.history and turn.waited_s > turn.history * BLOCK_BYTES / self.ssd_bytes_per_s
        ]

    @property
    def waited_on_time(self) -> float:
        """The share of `waited` with the whole history in DRAM."""
        return _mean([float(turn.in_dram == turn.history) for turn in self.waited])


def run(scenario: Scenario, policy: str, seed: int) -> Run:
    """Play the scenario on a new daemon with this policy, then simulate it."""
    workload = workload_of(scenario, seed)
    began = time.monotonic()
    with _daemon(scenario, policy) as client:
        played = Player(client, workload, scenario).play()
    rate = measured_ssd_bytes_per_s(replace(scenario, sends_queue=False))  # One measurement for both.
    ssd_is_full = played.counters.get("evicted_ssd_blocks", 0) > 0
    machine = replace(
        scenario.machine(
            round(played.dram_used_bytes), round(played.ssd_used_bytes) if ssd_is_full else scenario.ssd_bytes
        ),
        ssd_bytes_per_s=rate,
    )
    simulated = simulate(workload, machine, policy, warmup_turns=scenario.warmup_turns)
    turns = played.turns[scenario.warmup_turns :]
    ttft_s = _mean([turn.ttft_s(scenario.prefill_tokens_per_s) for turn in turns])
    found = Run(policy, seed, played, simulated, turns, rate, ttft_s)
    print(
        f"  {policy}, seed {seed}: on time {found.on_time:.3f} (simulated {simulated.dram_on_time:.3f}), hits "
        f"{found.hits:.3f} ({simulated.hit_rate_history:.3f}), TTFT {ttft_s:.3f} s ({simulated.ttft_mean_s:.3f} s), "
        f"{len(found.waited)} waited, {found.waited_on_time:.3f} of them on time, events up to "
        f"{1e3 * played.late_s:.0f} ms late, {played.refused} blocks refused, "
        f"SSD {rate / 1e6:.1f} MB/s, {time.monotonic() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return found


@cache
def measured_ssd_bytes_per_s(scenario: Scenario) -> float:
    """Bytes per second of a load that is alone on the daemon, from SSD: the median of some. The limit is above it, by
    the time between the calls of a read.
    """
    rates = []
    with _daemon(scenario, "lru") as client:
        blocks = client.open_layout(LAYOUT)
        layer = np.zeros(_LOAD_BLOCKS * LAYOUT.slice_bytes(LAYOUT.kv_heads, LAYOUT.block_tokens), np.uint8)
        for number in range(_LOADS):
            chain = chain_of(-1 - number, _LOAD_BLOCKS)
            blocks.save(chain, [layer] * LAYOUT.layers, Durability.SSD)
            client.evict(chain.keys, "dram")
            with blocks.lookup(chain) as lease:
                began = time.perf_counter()
                for _ in lease.load():
                    pass
                rates.append(_LOAD_BLOCKS * BLOCK_BYTES / (time.perf_counter() - began))
    return statistics.median(rates)


@contextmanager
def _daemon(scenario: Scenario, policy: str) -> Iterator[Client]:
    with tempfile.TemporaryDirectory(prefix="kvservice-placement-") as folder:
        daemon = DaemonProcess(
            Path(folder),
            program=("-m", "benchmarks.placement.limited_daemon"),
            mover__policy=policy,
            dram__capacity_bytes=scenario.dram_bytes + _INDEX_BYTES,
            index__volatile_map_bytes=_INDEX_BYTES,
            ssd__capacity_bytes=scenario.ssd_bytes,
            mover__dram_free_low=_FREE_LOW,
            mover__dram_free_high=_FREE_HIGH,
        )
        try:
            daemon.start(environment={"BENCH_SSD_BYTES_PER_S": str(scenario.ssd_bytes_per_s)})
            with daemon.client("placement") as client:
                yield client
        finally:
            daemon.remove()


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
