"""The result of one run of one policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Result:
    """Shares are of the measured turns, those after the warm-up. A turn counts as 1, split by its history's bytes.

    The four shares of turns with history add up to 1; `recomputed_hits` is a part of `dram_late` and `ssd`.
    `dram_on_time` was in DRAM when the turn was dispatched, `dram_late` had a promotion queued or running, `ssd` was
    on SSD without one, and `miss` was in no tier.
    With shared prefixes every block counts as 1, and a block has history if an earlier request had it.
    While that request still computes the block, no tier has it: a later request misses it, also with endless DRAM.
    """

    policy: str
    turns: int
    turns_with_history: int
    hit_rate: float
    hit_rate_history: float
    dram_on_time: float
    dram_late: float
    ssd: float
    miss: float
    recomputed_hits: float  # Share of turns with history that was on SSD and computed again, which was faster.
    ttft_mean_s: float  # From the request's arrival to its first token, with the wait in the queue.
    ttft_p50_s: float
    ttft_p99_s: float
    service_ttft_mean_s: float  # From its dispatch to its first token: reads from SSD, and prefill.
    service_ttft_p50_s: float
    service_ttft_p99_s: float
    prefill_tokens_per_s: float  # Prompt tokens, with the reused ones, per second of prefill.
    gpu_hours: float  # Prefill, decoding, and with `Machine.blocking_loads` the waits for KV.
    cost_dollars: float  # At the paper's prices.
    storage_share_of_cost: float
    read_gb: float  # From SSD.
    ssd_written_gb: float
    moved_gb: float  # Both together.
    promoted_unused_gb: float  # Promoted, and evicted from DRAM before a request used it.
    writes_dropped_gb: float  # Left DRAM before write-behind had written it: reads had the SSD. It is lost.
    queue_p50: float
    queue_p99: float
    server_share: float  # The share of the arriving load that the server processes, 0 to 1, over the whole run.
    live_gb_mean: float  # KV of sessions between their first and their last turn, if all of it were stored.
    read_busy: float  # Share of the simulated time in which the SSD read.
    simulated_s: float
    seconds: float  # Run time of the simulation.
    turns_simulated_per_s: float


def best_of(results: Sequence[Result]) -> Result:
    """A bound over several runs: the run with the highest share on time, with the highest hit rate of all runs.

    The two figures may belong to different runs: no single run needs to reach both.
    """
    on_time = max(results, key=lambda result: (result.dram_on_time, result.hit_rate))
    hits = max(results, key=lambda result: result.hit_rate_history)
    late_and_ssd = hits.hit_rate_history - on_time.dram_on_time
    of_these = on_time.dram_late + on_time.ssd
    late_share = on_time.dram_late / of_these if of_these else 0.0
    seconds = sum(result.seconds for result in results)
    return replace(
        on_time,
        hit_rate=hits.hit_rate,
        hit_rate_history=hits.hit_rate_history,
        dram_late=late_and_ssd * late_share,
        ssd=late_and_ssd * (1 - late_share),
        miss=hits.miss,
        seconds=seconds,
        turns_simulated_per_s=on_time.turns_simulated_per_s * on_time.seconds / seconds if seconds else 0.0,
    )
