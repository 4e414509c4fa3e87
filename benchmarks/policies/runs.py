"""Runs that experiments share: the paper's machine and load, and each run once per process."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.policies.report import percent
from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import sharegpt
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.workload import Workload

PAPER_SERVICE = 1.9  # Turns per second: 42K turns in 6.25 hours.
PAPER_PREFILL = 2000.0  # Tokens per second: a prompt of some 1,700 tokens takes 0.85 s, as the paper's without storage.
POLICIES = ("lru", "fifo", "s3fifo", "lookahead", "foresight")
BOUNDS = ("none", "ages-only", "optimum", "infinite")

_runs: dict[tuple[int, Machine, str, int], Result] = {}
_kept: list[Workload] = []  # Keeps the objects alive, so that the ids in `_runs` stay unique.


def paper_machine(ssd_tb: float, dram_gb: float = 128, *, kv_mb: float = 0.78125, **rest: Any) -> Machine:
    """PAPER's testbed with LLaMA-13B: 0.78 MiB of KV per token, an SSD that moves 5 GiB/s, and an engine that waits for
    KV and reads all that is stored.
    """
    settings: dict[str, Any] = {
        "service_turns_per_s": PAPER_SERVICE,
        "prefill_tokens_per_s": PAPER_PREFILL,
        "gpus": 2,
        "always_load": True,
        "blocking_loads": True,
        **rest,
    }
    return Machine(
        dram_bytes=round(dram_gb * GIB),
        ssd_bytes=round(ssd_tb * 1024 * GIB),
        ssd_bytes_per_s=5 * GIB,
        kv_bytes_per_token=round(kv_mb * MIB),
        **settings,
    )


@cache
def paper_load(quick: bool, session_rate: float = 1.0, context: int = 4096, seed: int = 0) -> tuple[Workload, int]:
    """9,000 conversations, one per second, and the number of warm-up turns. With `quick` a tenth of both."""
    sessions = 900 if quick else 9000
    load = sharegpt(sessions=sessions, session_rate=session_rate, context_tokens=context, seed=seed)
    return load, 1_000 if quick else 10_000


def shrunk(quick: bool) -> float:
    """What sizes are multiplied by where the load is smaller."""
    return 0.1 if quick else 1.0


def play(load: Workload, machine: Machine, name: str, warmup_turns: int) -> Result:
    """One run. Results are cached by arguments."""
    key = (id(load), machine, name, warmup_turns)
    if key not in _runs:
        result = simulate(load, machine, name, warmup_turns=warmup_turns)
        found = _runs[key] = replace(result, policy=name)  # A policy has variants by other names.
        _kept.append(load)
        print(
            f"  {load.name}, {machine.dram_bytes / GIB:.0f}+{machine.ssd_bytes / GIB:.0f} GiB, {name}: on time "
            f"{percent(found.dram_on_time)} %, found {percent(found.hit_rate_history)} %, {found.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return _runs[key]


def play_all(load: Workload, machine: Machine, names: Iterable[str], warmup_turns: int) -> dict[str, Result]:
    return {name: play(load, machine, name, warmup_turns) for name in names}


COLUMNS = (
    "Policy", "Hits, all turns", "Hits, of history", "On time", "Late", "SSD", "Miss",
    "TTFT from its turn, p50 / p99 (s)", "Written (TiB)", "Moved (TiB)", "Queue p50",
)  # fmt: skip


def row(result: Result) -> tuple[str, ...]:
    """In the order of COLUMNS. Shares in percent."""
    shares = (result.hit_rate, result.hit_rate_history, result.dram_on_time, result.dram_late, result.ssd, result.miss)
    return (
        f"`{result.policy}`",
        *map(percent, shares),
        f"{result.service_ttft_p50_s:.3g} / {result.service_ttft_p99_s:.3g}",
        f"{result.ssd_written_gb / 1024:.3g}",
        f"{result.moved_gb / 1024:.3g}",
        f"{result.queue_p50:.0f}",
    )


def rows(results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    return [row(each) for each in results.values()]


def points(first: float, second: float) -> float:
    """By how many percentage points the first share is above the second."""
    return 100 * (first - second)


def mean(results: Sequence[Result], figure: Callable[[Result], float]) -> float:
    return statistics.fmean(map(figure, results)) if results else math.nan


def on_time_of_hits(result: Result) -> float:
    """The share of hits that were in DRAM on time."""
    found = result.hit_rate_history
    return result.dram_on_time / found if found else math.nan
