"""Records per dispatched turn, the sums over them, and the result of a run."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice.placement.views import floats, ints
from kvservice.simulate import cost
from kvservice.simulate.offered_load import unhindered_s
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, Machine
from kvservice.simulate.store_model import StoreModel
from kvservice.simulate.workload import Workload

#: One row per dispatch. Small dtypes, so that five million turns fit into memory beside their trace.
_COLUMNS = {
    "turn": np.int32,
    "wait_s": np.float32,  # From the request's arrival to its dispatch.
    "load_s": np.float32,  # From its dispatch to the start of its prefill: the time to read what is not in DRAM.
    "history_tokens": np.int64,
    "missing_tokens": np.int64,  # Tokens of the history that the engine computes again.
    "queued": np.int32,  # Requests that wait after it.
}


class Account:
    """Sums over the measured turns. A turn counts as 1 unit, or as its number of blocks if prefixes are shared."""

    def __init__(self, workload: Workload, machine: Machine, warmup_turns: int) -> None:
        self._workload = workload
        self._machine = machine
        self._began = time.perf_counter()
        self.warmup_turns = min(warmup_turns, workload.turns)
        self._columns: dict[str, NDArray[Any]] = {
            name: np.zeros(workload.turns, dtype) for name, dtype in _COLUMNS.items()
        }
        columns = self._columns
        self.turn, self.queued = ints(columns["turn"]), ints(columns["queued"])
        self.wait_s, self.load_s = floats(columns["wait_s"]), floats(columns["load_s"])
        self.history_tokens, self.missing_tokens = ints(columns["history_tokens"]), ints(columns["missing_tokens"])
        self._new = ints(workload.new_tokens)
        self._new_is_prompt = workload.shares_prefixes
        self._block_tokens = workload.block_tokens
        self._link_token_s = machine.kv_bytes_per_token / machine.link_bytes_per_s
        self._token_s = 1.0 / machine.prefill_tokens_per_s
        self._decode_s = 1.0 / (machine.decode_tokens_per_s * machine.batch)
        self.dispatched = 0
        # The sums below include only the measured turns.
        self.units = 0  # Turns, or blocks if prefixes are shared.
        self.units_with_history = 0
        self.turns_with_history = 0
        self.on_time = 0.0
        self.late = 0.0
        self.ssd = 0.0
        self.miss = 0.0
        self.recomputed = 0.0
        self._gpu_s = 0.0
        self._prefill_s = 0.0
        self._live_bytes = 0
        self._live_since_s = 0.0
        self._live_byte_s = 0.0
        self._start_s = 0.0
        self._start_bytes = (0, 0, 0, 0)
        self._start_read_s = 0.0

    def start(self, store: StoreModel, now_s: float) -> None:
        """The warm-up is over."""
        self.live(0, now_s)
        self._live_byte_s = 0.0
        self._start_s = now_s
        channel = store.channel
        self._start_bytes = _bytes_of(store)
        self._start_read_s = channel.read_s

    def to_compute(self, turn: int, number: int) -> int:
        """Tokens that the dispatch computes if it reads all that is on SSD."""
        new = self._new[turn]
        if self._new_is_prompt:
            new = max(0, new - self.history_tokens[number])
        return new + self.missing_tokens[number]

    def recompute(self, number: int, tokens: int) -> None:
        """The dispatch computes so many tokens again that are on SSD."""
        self.missing_tokens[number] += tokens
        if number >= self.warmup_turns:
            self.recomputed += tokens / (self._block_tokens or self.history_tokens[number])

    def prefill_s(self, turn: int, number: int) -> float:
        """Seconds of the dispatch's prefill. The copy of its history from DRAM to the GPU overlaps it."""
        held = self.history_tokens[number] - self.missing_tokens[number]
        return max(held * self._link_token_s, self.to_compute(turn, number) * self._token_s)

    def served(self, number: int, prefill_s: float, output_tokens: int) -> None:
        """Add the GPU time of a dispatch: its prefill, with the GPU's wait for its KV, and its share of decoding."""
        if number >= self.warmup_turns:
            self._prefill_s += prefill_s
            self._gpu_s += prefill_s + output_tokens * self._decode_s

    def live(self, change_bytes: int, now_s: float) -> None:
        """The KV of live sessions changed by `change_bytes`. A session is live until its last turn."""
        self._live_byte_s += self._live_bytes * (now_s - self._live_since_s)
        self._live_since_s = now_s
        self._live_bytes += change_bytes

    def result(self, name: str, store: StoreModel, now_s: float) -> Result:
        """The result of the run, which ends at `now_s`."""
        workload, machine = self._workload, self._machine
        self.live(0, now_s)
        measured = slice(self.warmup_turns, self.dispatched)
        turn, wait_s, load_s, history, missing, queued = (self._columns[c][measured] for c in _COLUMNS)
        new = workload.new_tokens[turn]
        if workload.shares_prefixes:
            new = np.maximum(new - history, 0)
        loaded_s = (history - missing) * (machine.kv_bytes_per_token / machine.link_bytes_per_s)
        computed_s = (new + missing) / machine.prefill_tokens_per_s
        service_s = load_s + np.maximum(loaded_s, computed_s)
        ttft_s = wait_s + service_s
        prompt = float((history.astype(np.float64) + new).sum())
        gpu_hours = self._gpu_s * machine.gpus / 3600
        elapsed_s = max(now_s - self._start_s, 1e-9)
        channel = store.channel
        read_gb, written_gb, unused_gb, dropped_gb = (
            (now - then) / GIB for now, then in zip(_bytes_of(store), self._start_bytes, strict=True)
        )
        hits = self.on_time + self.late + self.ssd
        known = max(self.units_with_history, 1)
        ttft_p50, ttft_p99 = _quantiles(ttft_s)
        service_p50, service_p99 = _quantiles(service_s)
        queue_p50, queue_p99 = _quantiles(queued)
        begins_s, ends_s = unhindered_s(workload, machine)
        seconds = time.perf_counter() - self._began
        return Result(
            policy=name,
            turns=len(turn),
            turns_with_history=self.turns_with_history,
            hit_rate=hits / max(self.units, 1),
            hit_rate_history=hits / known,
            dram_on_time=self.on_time / known,
            dram_late=self.late / known,
            ssd=self.ssd / known,
            miss=self.miss / known,
            recomputed_hits=self.recomputed / known,
            ttft_mean_s=_mean(ttft_s),
            ttft_p50_s=ttft_p50,
            ttft_p99_s=ttft_p99,
            service_ttft_mean_s=_mean(service_s),
            service_ttft_p50_s=service_p50,
            service_ttft_p99_s=service_p99,
            prefill_tokens_per_s=prompt / self._prefill_s if self._prefill_s else 0.0,
            gpu_hours=gpu_hours,
            cost_dollars=cost.dollars(gpu_hours / machine.gpus, machine),
            storage_share_of_cost=cost.storage_share(machine),
            read_gb=read_gb,
            ssd_written_gb=written_gb,
            moved_gb=read_gb + written_gb,
            promoted_unused_gb=unused_gb,
            writes_dropped_gb=dropped_gb,
            queue_p50=queue_p50,
            queue_p99=queue_p99,
            server_share=min(1.0, (ends_s - begins_s) / max(now_s - begins_s, 1e-9)) if workload.turns else 1.0,
            live_gb_mean=self._live_byte_s / elapsed_s / GIB,
            read_busy=min(1.0, (channel.read_s - self._start_read_s) / elapsed_s),
            simulated_s=elapsed_s,
            seconds=seconds,
            turns_simulated_per_s=self.dispatched / max(seconds, 1e-9),
        )


def _bytes_of(store: StoreModel) -> tuple[int, int, int, int]:
    """Bytes since the start: read, written, promoted and not used, not written in time."""
    channel = store.channel
    return channel.read_bytes, channel.written_bytes, store.core.read_unused_bytes, store.writes_dropped_bytes


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0


def _quantiles(values: NDArray[Any]) -> tuple[float, float]:
    if not len(values):
        return 0.0, 0.0
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return float(p50), float(p99)
