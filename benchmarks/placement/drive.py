"""Plays a workload on a real daemon in real time: arrivals, a first-come first-served queue, a server of fixed rate."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from benchmarks.placement.load import BLOCK_TOKENS, LAYOUT, Scenario
from kvservice.simulate.workload import Workload
from kvservice_client import BlockChain, Client, Lease, QueuedRequest, block_chain

_THREADS = 8
_LEASE_S = 120.0


@dataclass(slots=True)
class Turn:
    """One request, in seconds from the start. Counts are of its history's blocks at its dispatch."""

    session: int
    history: int
    new: int  # Blocks that the prompt and its answer add.
    prompt_tokens: int  # New ones.
    think_s: float  # After the session's turn before.
    arrived_s: float = 0.0
    dispatched_s: float = 0.0
    loaded_s: float = 0.0
    in_dram: int = 0
    on_ssd: int = 0

    @property
    def missing(self) -> int:
        return self.history - self.in_dram - self.on_ssd

    @property
    def waited_s(self) -> float:
        return self.dispatched_s - self.arrived_s

    def ttft_s(self, prefill_tokens_per_s: float) -> float:
        """From the arrival to the first token: the queue, the load, and the prefill of what is not stored."""
        computed = self.prompt_tokens + self.missing * BLOCK_TOKENS
        return self.loaded_s - self.arrived_s + computed / prefill_tokens_per_s


@dataclass(slots=True)
class _Running:
    turn: int
    lease: Lease | None
    ends_s: float = 0.0


@dataclass(slots=True)
class Played:
    """All turns in the order of their dispatch, and what DRAM held on average once the warm-up was over."""

    turns: list[Turn] = field(default_factory=list)
    dram_used_bytes: float = 0.0
    ssd_used_bytes: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)  # Of the daemon: growth since the end of the warm-up.
    refused: int = 0  # Blocks that a save could not store.
    late_s: float = 0.0  # The latest start of an event after its time: above some ms the machine was too slow.


class Player:
    """One run. The calling thread is the engine: it looks prefixes up; threads load and save."""

    def __init__(self, client: Client, workload: Workload, scenario: Scenario) -> None:
        self._client = client
        self._blocks = client.open_layout(LAYOUT)
        self._scenario = scenario
        self._hints = client.hints() if scenario.sends_queue else None
        self._turns = turns_of(workload)
        self._first_at_s = workload.arrives_s
        last = {turn.session: turn.history + turn.new for turn in self._turns}
        self._chains = {session: chain_of(session, blocks) for session, blocks in last.items()}
        size = LAYOUT.slice_bytes(LAYOUT.kv_heads, BLOCK_TOKENS)
        self._bytes = np.random.default_rng(0).integers(0, 256, size * max(last.values()), np.uint8)
        self._slice_bytes = size
        self._events: list[tuple[float, int, int]] = []  # (time, 0: arrival or 1: end of the answer, turn)
        self._running: dict[int, _Running] = {}
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._refused = 0

    def play(self) -> Played:
        """Play all turns. Raises what a call of the daemon raised."""
        played, queue = Played(), deque[int]()
        for number, turn in enumerate(self._turns):
            if not turn.history:
                heapq.heappush(self._events, (float(self._first_at_s[number]), 0, number))
        self._began = time.monotonic()
        ended, free_at_s, warm = 0, 0.0, None
        used: list[tuple[int, int]] = []
        busy_s = 1 / self._scenario.service_turns_per_s
        with ThreadPoolExecutor(_THREADS) as pool:
            while ended < len(self._turns):
                with self._changed:
                    next_s = min(self._events[0][0] if self._events else 1e9, free_at_s if queue else 1e9)
                    if (pause_s := next_s - self._now_s()) > 0:
                        self._changed.wait(min(pause_s, 60.0))
                    if self._failed is not None:
                        raise self._failed
                    now_s = self._now_s()
                    event = heapq.heappop(self._events) if self._events and self._events[0][0] <= now_s else None
                if event is not None:
                    at_s, kind, number = event
                    played.late_s = max(played.late_s, now_s - at_s)
                    if kind == 0:
                        self._arrive(number, at_s, queue, free_at_s)
                        queue.append(number)
                    else:
                        ended += 1
                        pool.submit(self._guarded, self._finish, self._running.pop(number))
                    continue
                if queue and free_at_s <= now_s:
                    number = queue.popleft()
                    free_at_s = now_s + busy_s
                    pool.submit(self._guarded, self._load, self._dispatch(number, now_s))
                    played.turns.append(self._turns[number])
                    if len(played.turns) >= self._scenario.warmup_turns and len(played.turns) % 8 == 0:
                        status = self._client.admin.status()
                        used.append((status.dram.used_bytes, status.ssd.used_bytes))
                        warm = warm or dict(status.counters)
        status = self._client.admin.status()
        played.refused = self._refused
        played.dram_used_bytes, played.ssd_used_bytes = map(float, np.mean(used, axis=0))
        played.counters = {name: value - (warm or {}).get(name, 0.0) for name, value in status.counters.items()}
        return played

    def _now_s(self) -> float:
        return time.monotonic() - self._began

    def _arrive(self, number: int, at_s: float, queue: deque[int], free_at_s: float) -> None:
        turn = self._turns[number]
        turn.arrived_s = at_s
        if self._hints is not None and turn.history:
            starts_in_s = max(0.0, free_at_s - at_s) + len(queue) / self._scenario.service_turns_per_s
            chain = self._chains[turn.session][: turn.history]
            self._hints.put(QueuedRequest(str(number), chain, starts_in_s=starts_in_s))

    def _dispatch(self, number: int, now_s: float) -> _Running:
        turn = self._turns[number]
        turn.dispatched_s = now_s
        running = self._running[number] = _Running(number, None)
        if turn.history:
            lease = running.lease = self._blocks.lookup(self._chains[turn.session][: turn.history], _LEASE_S)
            turn.in_dram = sum(run.count for run in lease.residency if run.dram)
            turn.on_ssd = lease.hit_blocks - turn.in_dram
            if self._hints is not None:
                self._hints.remove(str(number))
        return running

    def _load(self, running: _Running) -> None:
        turn = self._turns[running.turn]
        if running.lease is not None and running.lease.hit_blocks:
            for _ in running.lease.load():
                pass
        turn.loaded_s = self._now_s()
        if not turn.on_ssd:
            turn.loaded_s = turn.dispatched_s  # The copy from DRAM is no part of the simulator's load.
        running.ends_s = turn.loaded_s + 1 / self._scenario.service_turns_per_s
        with self._changed:
            heapq.heappush(self._events, (running.ends_s, 1, running.turn))
            self._changed.notify()

    def _finish(self, running: _Running) -> None:
        """Save what is new or was missing, end the lease, and let the user think."""
        turn, lease = self._turns[running.turn], running.lease
        first = 0 if lease is None else lease.hit_blocks
        part = self._chains[turn.session][first : turn.history + turn.new]
        layer = self._bytes[: self._slice_bytes * len(part)]
        saved = self._blocks.save(part, [layer] * LAYOUT.layers)
        self._refused += len(saved.refused)
        if lease is not None:
            lease.release()
        if self._hints is not None:
            answer_tokens = turn.new * BLOCK_TOKENS - turn.prompt_tokens
            prompt_tokens = turn.history * BLOCK_TOKENS + turn.prompt_tokens
            chain = self._chains[turn.session][: turn.history + turn.new]
            self._hints.turn_finished(chain, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)
        following = running.turn + 1
        if following < len(self._turns) and self._turns[following].session == turn.session:
            with self._changed:
                at_s = running.ends_s + self._turns[following].think_s
                heapq.heappush(self._events, (at_s, 0, following))
                self._changed.notify()

    def _guarded(self, work: Callable[[_Running], None], running: _Running) -> None:
        try:
            work(running)
        except BaseException as error:
            with self._changed:
                self._failed = self._failed or error
                self._changed.notify()


def turns_of(workload: Workload) -> list[Turn]:
    """The turns of a workload of sessions in whole blocks, with their histories if nothing is ever cut."""
    turns: list[Turn] = []
    for session, new, output, think_s in zip(
        workload.session.tolist(),
        workload.new_tokens.tolist(),
        workload.output_tokens.tolist(),
        workload.think_s.tolist(),
        strict=True,
    ):
        before = turns[-1] if turns and turns[-1].session == session else None
        history = 0 if before is None else before.history + before.new
        turns.append(Turn(session, history, (new + output) // BLOCK_TOKENS, new, think_s))
    return turns


def chain_of(session: int, blocks: int) -> BlockChain:
    """The chain of a session's first `blocks` blocks."""
    tokens = np.arange(blocks * BLOCK_TOKENS)
    tokens[0] = 1_000_000 + session
    return block_chain(LAYOUT, tokens)
