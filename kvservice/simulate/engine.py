"""Simulates a workload on a machine with one policy: arrivals, the queue, the server, and both tiers."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvservice.placement.core import PlacementCore
from kvservice.placement.views import floats, ints
from kvservice.policy.items import Conditions, ItemTable
from kvservice.policy.placement import Placement, overrides
from kvservice.simulate.account import Account
from kvservice.simulate.bounds import Bound
from kvservice.simulate.inference_server import server_of
from kvservice.simulate.load_or_recompute import LoadOrRecompute
from kvservice.simulate.plan import footprint_tokens
from kvservice.simulate.policies import CONTENDERS, plays
from kvservice.simulate.prefix_replay import PrefixReplay
from kvservice.simulate.result import Result, best_of
from kvservice.simulate.session_replay import SessionReplay
from kvservice.simulate.settings import Machine
from kvservice.simulate.store_model import StoreModel
from kvservice.simulate.workload import Workload


def simulate(workload: Workload, machine: Machine, policy: Placement | str, *, warmup_turns: int = 0) -> Result:
    """Simulate the whole workload. The result leaves out the first `warmup_turns` turns that are dispatched.

    `policy` is a name (`kvservice.simulate.policies`), or a new object that no other run has used.
    Raises ValueError for an unknown name, and for a workload or a machine that is not possible.
    """
    if isinstance(policy, Placement):
        return _play(workload, machine, policy, warmup_turns)
    results = []
    for play in plays(policy, workload, machine):
        results.append(_play(workload, machine, play, warmup_turns))
        if results[-1].dram_on_time == 1.0:
            break  # No play can have a higher share.
    return replace(best_of(results), policy=policy)


def _play(workload: Workload, machine: Machine, policy: Placement, warmup_turns: int) -> Result:
    played_on = policy.plays_on(machine) if isinstance(policy, Bound) else machine
    paid = machine if played_on.dram_bytes > machine.dram_bytes else played_on
    return Engine(workload, played_on, policy, warmup_turns, paid).run()


#: Time constant of the moving average of the channel's busy share.
_MEASURE_S = 60.0
#: The weight of the last read in the moving average of the reads' waits.
_LAST_READ = 0.02
#: Seconds beyond which the resolution of a float may be, and is, too coarse for policies.
_CLOCK_COARSE_S, _CLOCK_MAX_S = 1e9, 1e12
#: Limit on the bytes that a workload stores in total, so that sums fit into 64 bits.
_STORED_MAX_BYTES = 2**60
#: Two sums of the same durations may differ by this much.
_LATER_S = 1e-6


@dataclass(slots=True, order=True)
class _CalledTurn:
    """A turn whose KV is being loaded while other turns run."""

    loaded_s: float
    turn: int
    number: int
    called_s: float


class Engine:
    """One run of one policy. Not reusable."""

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        policy: Placement,
        warmup_turns: int = 0,
        paid: Machine | None = None,
    ) -> None:
        """`paid` is the machine whose price counts, if it differs from the simulated one.

        Raises ValueError for a workload that cannot be simulated.
        """
        self.workload = workload
        self.machine = machine
        self.policy = policy
        session = workload.session
        firsts = np.flatnonzero(np.diff(session, prepend=-1)).astype(np.int32)
        first_at = workload.arrives_s[firsts]
        if (np.diff(session) < 0).any():
            raise ValueError("the turns of a session are not consecutive")
        if np.isnan(first_at).any():
            raise ValueError("the first turn of a session has no arrival time")
        if footprint_tokens(workload) * machine.kv_bytes_per_token > _STORED_MAX_BYTES:
            raise ValueError("the load stores more than 2^60 bytes of KV: give fewer tokens, or less KV per token")
        order = np.argsort(first_at, kind="stable")
        self._firsts = firsts[order]
        self._first_at = first_at[order]
        after, begins = _hints_by_gap(workload)
        self._hint_after, self._hint_begins = ints(after), ints(begins)
        self._hint_turn, self._hint_lead_s = ints(workload.hints.turn), floats(workload.hints.lead_s)
        self._hint_kind = ints(workload.hints.kind)
        self.now_s = float(self._first_at[0]) if len(order) else 0.0
        computed_per_s = machine.prefill_tokens_per_s * machine.kv_bytes_per_token
        self.conditions = Conditions(
            machine.dram_bytes,
            machine.ssd_bytes,
            machine.ssd_bytes_per_s,
            recompute_bytes_per_s=0.0 if machine.always_load else computed_per_s,
            link_bytes_per_s=machine.link_bytes_per_s,
        )
        self.server = server_of(machine)
        row_count = len(workload.item_blocks) if workload.shares_prefixes else workload.sessions
        self.items = ItemTable(row_count, self.conditions)
        block_bytes = workload.block_tokens * machine.kv_bytes_per_token
        self.core = PlacementCore(self.items, policy, block_bytes)
        self.store = StoreModel(self.core, machine, self.now_s)
        self._decision = LoadOrRecompute(machine, self.store.channel, workload.block_tokens)
        self.account = Account(workload, paid or machine, warmup_turns)
        kind = PrefixReplay if workload.shares_prefixes else SessionReplay
        self.replay = kind(workload, machine, self.store, self.account)
        self._queue: deque[int] = deque()
        self._rows: deque[int] = deque()  # The rows of the queued requests, for a policy that reads ahead.
        self._called: list[_CalledTurn] = []
        self._loads_aside = machine.service_turns_per_s is None and not machine.blocking_loads
        # (time, event). With T turns and H hints, an event below T is the end of that turn's answer, below 2 T the
        # arrival of turn event - T, below 2 T + H a hint, and from there on the expiry after a turn.
        self._events: list[tuple[float, int]] = []
        self._number = 0  # The number of the next request.
        self._ended = 0
        self._set_next_request = getattr(policy, "set_next_request", None)
        self._expires = math.isfinite(machine.session_ttl_s)
        self._looks = overrides(policy, "promotions")
        self._session, self._outputs = ints(session), ints(workload.output_tokens)
        self._arrives_s, self._think_s = floats(workload.arrives_s), floats(workload.think_s)
        self._arrived_at_s = floats(np.zeros(workload.sessions))
        self._measured_s, self._measured_read_s = self.now_s, 0.0

    def run(self) -> Result:
        """Simulate until the last answer has ended."""
        policy, server, queue, called, events = self.policy, self.server, self._queue, self._called, self._events
        advance = self.store.channel.advance
        dispatch = self._dispatch_loaded if self._loads_aside else self._dispatch_first
        loads_max = self.machine.batch
        push, pop = heapq.heappush, heapq.heappop
        turn_count = self.workload.turns
        firsts, first_at_s = iter(ints(self._firsts)), itertools.chain(floats(self._first_at), [math.inf])
        next_first_s = next(first_at_s)
        now_s = self.now_s
        self.account.start(self.store, now_s)
        self.conditions.turns_per_s = server.turns_per_s
        while self._ended < turn_count:
            when = events[0][0] if events else math.inf
            if next_first_s < when:
                when = next_first_s
            if queue or called:
                at = server.free_at_s
                if at < now_s:
                    at = now_s
                if called and (not queue or len(called) >= loads_max):
                    at = max(at, called[0].loaded_s)
                if at < when and at <= policy.look_at_s:
                    now_s = at
                    advance(now_s)
                    taken = dispatch(now_s)
                    if taken is not None:
                        push(events, taken)
                    continue
            if policy.look_at_s < when:
                now_s = max(now_s, policy.look_at_s)
                advance(now_s)
                self._ask_policy(now_s)
                continue
            now_s = when
            advance(now_s)
            if next_first_s == when:
                next_first_s = next(first_at_s)
                self._enqueue(next(firsts), now_s)
                continue
            event = pop(events)[1]
            if event < turn_count:
                self._finish(event, now_s)
            elif event < 2 * turn_count:
                self._enqueue(event - turn_count, now_s)
            else:
                self._hint_or_expire(event - 2 * turn_count, now_s)
        advance(now_s)
        return self.account.result(policy.name, self.store, now_s)

    def _enqueue(self, turn: int, now_s: float) -> None:
        """The turn's request arrives."""
        self._arrived_at_s[self._session[turn]] = now_s
        self._queue.append(turn)
        self.conditions.queued = len(self._queue)
        self.replay.enqueue(turn, self._number, now_s)
        if self._looks:
            self._rows.extend(self.replay.rows(turn))
        self._number += 1

    def _finish(self, turn: int, now_s: float) -> None:
        """The turn's answer has ended: schedule its session's next request, and the hints before it."""
        self._ended += 1
        self.server.finish()
        following, turn_count, session = turn + 1, self.workload.turns, self._session[turn]
        goes_on = following < turn_count and self._session[following] == session
        at = math.inf
        if goes_on:
            at = self._arrives_s[following]
            if at != at:
                at = now_s + self._think_s[following]
            elif at < now_s:
                at = now_s
            heapq.heappush(self._events, (at, turn_count + following))
        if self._set_next_request is not None:
            self._set_next_request(session, at)
        self.replay.finish(turn, not goes_on, now_s)
        if self._hint_begins:
            self._plan_hints(turn, at, now_s)
        if self._expires:
            expires_at_s = now_s + self.machine.session_ttl_s
            heapq.heappush(self._events, (expires_at_s, 2 * turn_count + len(self._hint_after) + turn))

    def _hint_or_expire(self, number: int, now_s: float) -> None:
        """Event `number` is a hint, or, after all hints, the expiry of the sessions idle since turn number - H."""
        hint_count = len(self._hint_after)
        if number < hint_count:
            self.replay.hint(self._hint_after[number], self._hint_kind[number], now_s)
        else:
            self.replay.expire(number - hint_count, now_s - self.machine.session_ttl_s + _LATER_S, now_s)

    def _dispatch_first(self, now_s: float) -> tuple[float, int]:
        """Start the first turn in the queue. Returns (end of its answer in s, turn)."""
        turn, number, loaded_s = self._call(now_s)
        return self._take(turn, number, now_s, loaded_s, now_s)

    def _dispatch_loaded(self, now_s: float) -> tuple[float, int] | None:
        """Start the first turn whose KV is loaded. Returns (end of its answer in s, turn).

        Returns None if the first turn in the queue started to load its KV, so that another turn may run first.
        At most as many turns load at a time as the batch has places.
        """
        called = self._called
        if called and called[0].loaded_s <= now_s:
            soonest = heapq.heappop(called)
            return self._take(soonest.turn, soonest.number, soonest.called_s, soonest.loaded_s, now_s)
        turn, number, loaded_s = self._call(now_s)
        if loaded_s > now_s:
            heapq.heappush(called, _CalledTurn(loaded_s, turn, number, now_s))
            return None
        return self._take(turn, number, now_s, loaded_s, now_s)

    def _call(self, now_s: float) -> tuple[int, int, float]:
        """Take the first request out of the queue and load its KV. Returns (turn, number, end of the load in s)."""
        account, conditions = self.account, self.conditions
        turn = self._queue.popleft()
        number = account.dispatched
        if number == account.warmup_turns:
            account.start(self.store, now_s)
        if self._looks:
            for _ in self.replay.rows(turn):
                self._rows.popleft()
            self._measure(now_s)
        conditions.served = number + 1
        conditions.queued = len(self._queue)
        wanted = self.replay.dispatch(turn, now_s)
        account.turn[number] = turn
        account.wait_s[number] = now_s - self._arrived_at_s[self._session[turn]]
        account.queued[number] = len(self._queue)
        account.dispatched = number + 1
        return turn, number, self._load(turn, number, wanted, now_s) if wanted else now_s

    def _load(self, turn: int, number: int, on_ssd_bytes: int, now_s: float) -> float:
        """Read from SSD what is not computed again. Returns the latest start of the prefill, in s, with which it does
        not wait for the read: what is computed again comes first, while the rest is read.
        """
        account = self.account
        read = self._decision.read(on_ssd_bytes, account.to_compute(turn, number))
        loaded_s = now_s
        if read.size_bytes:
            channel, conditions = self.store.channel, self.conditions
            conditions.demand_wait_s += _LAST_READ * (channel.read_now_backlog_s() - conditions.demand_wait_s)
            conditions.demand_read_bytes += read.size_bytes
            loaded_s = channel.read_now(read.size_bytes)
        if not read.computed_tokens:
            return loaded_s
        account.recompute(number, read.computed_tokens)
        return max(now_s, loaded_s - read.computed_tokens / self.machine.prefill_tokens_per_s)

    def _take(self, turn: int, number: int, called_s: float, loaded_s: float, now_s: float) -> tuple[float, int]:
        account = self.account
        prefill_s = account.prefill_s(turn, number)
        begins_s, ends_s = self.server.take(now_s, loaded_s, prefill_s, self._outputs[turn])
        self.conditions.turns_per_s = self.server.turns_per_s
        account.load_s[number] = begins_s - called_s
        waits_s = begins_s - now_s if self.machine.blocking_loads else 0.0
        account.served(number, waits_s + prefill_s, self._outputs[turn])
        return ends_s, turn

    def _ask_policy(self, now_s: float) -> None:
        policy, read = self.policy, self.store.read
        self._measure(now_s)
        is_coarse = now_s > _CLOCK_MAX_S
        if not is_coarse:
            for command in self.core.reads(self._rows, now_s):
                read(command)
            is_coarse = policy.look_at_s <= now_s > _CLOCK_COARSE_S
        if is_coarse:
            raise ValueError(f"the load takes more than {now_s:.3g} s: give shorter times or higher rates")
        if policy.look_at_s <= now_s:
            raise RuntimeError(f"{policy.name} did not set look_at_s to a later time")

    def _measure(self, now_s: float) -> None:
        """Update what a policy may know of the channel."""
        channel, conditions = self.store.channel, self.conditions
        conditions.read_backlog_s = channel.read_backlog_s()
        conditions.written_bytes, conditions.read_bytes = channel.written_bytes, channel.read_bytes
        passed_s = now_s - self._measured_s
        if passed_s >= _MEASURE_S / 64:
            share = min(1.0, (channel.read_s - self._measured_read_s) / passed_s)
            conditions.read_busy += (share - conditions.read_busy) * -math.expm1(-passed_s / _MEASURE_S)
            self._measured_s, self._measured_read_s = now_s, channel.read_s

    def _plan_hints(self, turn: int, next_at_s: float, now_s: float) -> None:
        for index in range(self._hint_begins[turn], self._hint_begins[turn + 1]):
            lead_s = self._hint_lead_s[index]
            at = now_s + lead_s if self._hint_turn[index] < 0 else max(now_s, next_at_s - lead_s)
            if at < next_at_s:
                heapq.heappush(self._events, (at, 2 * self.workload.turns + index))


def _hints_by_gap(workload: Workload) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(turn whose answer each hint follows, ascending; index of the first hint after each turn, shape [turns + 1])."""
    turn = workload.hints.turn
    if not len(turn):
        return np.empty(0, np.int32), np.empty(0, np.int64)
    after = np.where(turn >= 0, turn - 1, -turn - 1).astype(np.int32)
    return after, np.searchsorted(after, np.arange(workload.turns + 1))


__all__ = ["CONTENDERS", "Engine", "simulate"]
