"""The experiments: what a queue in advance is worth, foresight without one, and whether both worlds agree."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.placement.event_loop import event_loop
from benchmarks.placement.load import Scenario
from benchmarks.placement.runs import Run, run
from benchmarks.policies.report import Section, percent
from tests.daemon import MIB

#: A queue of about 20 requests, four times what DRAM holds of their histories.
QUEUED = Scenario(
    sessions=64,
    turns_for_s=48.0,
    think_s=8.0,
    start_blocks=3.0,
    service_turns_per_s=5.0,
    dram_bytes=20 * MIB,
    ssd_bytes=256 * MIB,
    ssd_bytes_per_s=16e6,
    prefill_tokens_per_s=2000.0,
    warmup_turns=150,
    sends_queue=True,
)
#: No queue, and no hints: only return times help.
UNQUEUED = replace(QUEUED, service_turns_per_s=40.0, turns_for_s=70.0, warmup_turns=200, sends_queue=False)
#: A short queue, and an SSD that is too small for all.
SHORT = replace(QUEUED, service_turns_per_s=9.0, ssd_bytes=34 * MIB)

_COLUMNS = (
    "Policy", "Seed", "On time", "simulated", "Hits", "simulated", "TTFT mean (s)", "simulated", "Turns",
    "Waited long enough", "of them on time",
)  # fmt: skip
_ABOUT = (
    "64 conversations on a daemon of its own per run (gRPC and shared memory, 20 MiB of DRAM for blocks of 64 KiB, an "
    "SSD file behind a limit of 16 MB/s), think times of 8 s on average that follow the answers, a first-come "
    "first-served queue and a server that begins a turn at a fixed rate. The simulator gets the same turns, the DRAM "
    "that the daemon used on average, and the rate of a load alone on the daemon. Without a queue it knows of answers "
    "what the daemon knows: the tokens that a later request adds. Shares are in percent of turns with history, counted "
    "at the dispatch."
)


@dataclass(frozen=True, slots=True)
class Options:
    """How long and how often. `time_scale` makes all times longer and all rates lower: for a slow or busy machine."""

    quick: bool = False
    time_scale: float = 1.0
    seeds: int = 3

    def of(self, scenario: Scenario) -> Scenario:
        shorter = replace(scenario, turns_for_s=24.0, warmup_turns=80) if self.quick else scenario
        return shorter.slower(self.time_scale)


def queued(options: Options) -> Section:
    """The engine sends its queue: what has waited long enough is in DRAM."""
    section = Section("placement-queue", "A real daemon with the engine's queue", _ABOUT)
    runs = [run(options.of(QUEUED), policy, 0) for policy in ("lookahead", "foresight")]
    for each in runs:
        section.at_least(f"`{each.policy}`: waited long enough, and in DRAM", 100 * each.waited_on_time, 95, " %")
    section.table("", _COLUMNS, list(map(_row, runs)))
    section.notes.append(
        "A request has waited long enough if it was queued for longer than its whole history takes to be read."
    )
    return section


def unqueued(options: Options) -> Section:
    """No hints: what foresight gains over lru, in the daemon and simulated."""
    section = Section("placement-ages", "A real daemon without hints", _ABOUT)
    runs = [run(options.of(UNQUEUED), policy, seed) for seed in range(options.seeds) for policy in ("lru", "foresight")]
    lru, foresight = runs[::2], runs[1::2]
    gain = _mean_on_time(foresight) - _mean_on_time(lru)
    simulated = statistics.fmean(
        each.simulated.dram_on_time - beside.simulated.dram_on_time for each, beside in zip(foresight, lru, strict=True)
    )
    section.at_most("points of `foresight` over `lru`, off the simulated gain", 100 * abs(gain - simulated), 3)
    section.table("", _COLUMNS, list(map(_row, runs)))
    section.notes.append(
        f"The gain is {100 * gain:.1f} points, simulated {100 * simulated:.1f}, as means over the seeds. In one run it "
        "varies: the simulator's share changes by up to 3 points if sessions begin some hundredths of a second later."
    )
    return section


def agreement(options: Options) -> Section:
    """The same turns in both worlds."""
    section = Section("placement-agreement", "The daemon and the simulator on the same load", _ABOUT)
    runs = []
    for seed in range(options.seeds):
        for policy in ("lru", "lookahead", "foresight"):
            # The daemon promotes what a queue needs under every policy: lru is compared without it.
            scenario = replace(SHORT, sends_queue=policy != "lru")
            runs.append(run(options.of(scenario), policy, seed))
    hits = max(abs(each.hits - each.simulated.hit_rate_history) for each in runs)
    section.at_most("points of hits, the largest difference", 100 * hits, 2)
    ttft = max(abs(each.ttft_mean_s / each.simulated.ttft_mean_s - 1) for each in runs)
    section.at_most("mean TTFT, the largest difference", 100 * ttft, 10, " %")
    on_time = statistics.fmean(abs(each.on_time - each.simulated.dram_on_time) for each in runs)
    section.notes.append(f"On time differs by {100 * on_time:.1f} points on average.")
    section.table("", _COLUMNS, list(map(_row, runs)))
    return section


EXPERIMENTS: dict[str, Callable[[Options], Section]] = {
    "queued": queued,
    "unqueued": unqueued,
    "agreement": agreement,
    "event-loop": lambda options: event_loop(options.quick),
}


def _mean_on_time(runs: Sequence[Run]) -> float:
    return statistics.fmean(each.on_time for each in runs)


def _row(each: Run) -> Sequence[str]:
    shares = (each.on_time, each.simulated.dram_on_time, each.hits, each.simulated.hit_rate_history)
    return (
        f"`{each.policy}`",
        str(each.seed),
        *map(percent, shares),
        f"{each.ttft_mean_s:.3f}",
        f"{each.simulated.ttft_mean_s:.3f}",
        str(len(each.turns)),
        str(len(each.waited)),
        percent(each.waited_on_time),
    )
