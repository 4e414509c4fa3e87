"""Plays a workload on a machine with one policy: arrivals, the queue, the server, and what moves between."""

from __future__ import annotations

import heapq
import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from kvservice.policy.items import HINTS, NOT_QUEUED, Conditions, ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.account import Account
from kvservice.simulate.mover import Mover, overrides
from kvservice.simulate.policies import CONTENDERS, make
from kvservice.simulate.result import Result
from kvservice.simulate.server import server_of
from kvservice.simulate.sessions import SessionTurns
from kvservice.simulate.settings import Machine
from kvservice.simulate.workload import Workload


def simulate(
    workload: Workload, machine: Machine, policy: Placement | str, *, warmup_turns: int = 0, seed: int = 0
) -> Result:
    """Play all of it. Turns count from the `warmup_turns`th on whose time comes.

    A policy by name is made for this run (`kvservice.simulate.policies`); one that is given must be fresh.
    Raises ValueError for an unknown name, and for a workload or a machine that cannot be.
    """
    if isinstance(policy, str):
        policy = make(policy, workload, machine)
    return Engine(workload, machine, policy, warmup_turns).run()


class Engine:
    """One run."""

    def __init__(self, workload: Workload, machine: Machine, policy: Placement, warmup_turns: int = 0) -> None:
        self.workload = workload
        self.machine = machine
        self.policy = policy
        self.next_turn, self._firsts = _turns_of_sessions(workload)
        first_at = workload.arrives_s[self._firsts]
        if np.isnan(first_at).any():
            raise ValueError("a session's first turn has no time of arrival")
        order = np.argsort(first_at, kind="stable")
        self._firsts = self._firsts[order]
        self._first_at = first_at[order]
        self.now_s = float(self._first_at[0]) if len(order) else 0.0
        self.conditions = Conditions(machine.dram_bytes, machine.ssd_bytes, machine.ssd_bytes_per_s)
        self.server = server_of(machine)
        self.items = ItemTable(workload.sessions, self.conditions)
        self.mover = Mover(self.items, machine, policy, 0, self.now_s)
        self.account = Account(workload, machine, warmup_turns)
        self.reads = SessionTurns(workload, machine, policy, self.items, self.mover, self.account)

    def run(self) -> Result:
        workload, policy, items, server = self.workload, self.policy, self.items, self.server
        reads, mover, account, conditions = self.reads, self.mover, self.account, self.conditions
        channel, machine = mover.channel, self.machine
        advance = channel.advance
        tells_queued = overrides(policy, "queued")
        turn_count = workload.turns
        session = memoryview(workload.session)
        arrives_s, think_s = memoryview(workload.arrives_s), memoryview(workload.think_s)
        next_turn, outputs = memoryview(self.next_turn), memoryview(workload.output_tokens)
        new_tokens = memoryview(workload.new_tokens)
        firsts, first_at_s = memoryview(self._firsts), memoryview(self._first_at)
        came_at_s = memoryview(np.zeros(workload.sessions))
        queue: deque[int] = deque()
        rows: deque[int] = deque()
        # Times with what happens: below `turn_count` the turn's answer ends, below twice that it comes, then hints.
        events: list[tuple[float, int]] = []
        first, ended, came = 0, 0, 0
        next_first_s = first_at_s[0] if turn_count else math.inf
        now_s = self.now_s
        account.start(mover, now_s)
        link_s = machine.kv_bytes_per_token / machine.link_bytes_per_s
        token_s = 1.0 / machine.prefill_tokens_per_s
        conditions.turns_per_s = server.turns_per_s()
        while ended < turn_count:
            when = events[0][0] if events else math.inf
            if next_first_s < when:
                when = next_first_s
            look_at_s = policy.look_at_s
            if queue:
                at = server.free_at_s
                if at < now_s:
                    at = now_s
                if at < when and at <= look_at_s:
                    now_s = at
                    advance(now_s)
                    turn = queue.popleft()
                    rows.popleft()
                    number = account.dispatched
                    if number == account.warmup_turns:
                        account.start(mover, now_s)
                    wanted = reads.dispatch(turn, now_s)
                    loaded_s = channel.demand(wanted) if wanted else now_s
                    history, missing = account.history_tokens[number], account.missing_tokens[number]
                    prefill_s = max((history - missing) * link_s, (new_tokens[turn] + missing) * token_s)
                    begins_s, ends_s = server.take(now_s, loaded_s, prefill_s, outputs[turn])
                    heapq.heappush(events, (ends_s, turn))
                    account.turn[number] = turn
                    account.wait_s[number] = now_s - came_at_s[session[turn]]
                    account.load_s[number] = begins_s - now_s
                    account.queued[number] = len(queue)
                    account.dispatched = number + 1
                    conditions.served = number + 1
                    conditions.queued = len(queue)
                    continue
            if look_at_s < when:
                if look_at_s > now_s:
                    now_s = look_at_s
                advance(now_s)
                conditions.read_backlog_s = channel.read_backlog_s()
                conditions.written_bytes = channel.written_bytes
                for row, deadline_s, worth in policy.promotions(items, rows, now_s):
                    mover.promote(row, deadline_s, worth)
                if policy.look_at_s <= now_s:
                    raise RuntimeError(f"{policy.name} did not say when to ask it again")
                continue
            now_s = when
            advance(now_s)
            if next_first_s == when:
                turn = firsts[first]
                first += 1
                next_first_s = first_at_s[first] if first < len(firsts) else math.inf
            else:
                turn = heapq.heappop(events)[1]
                if turn < turn_count:
                    ended += 1
                    server.ended(now_s)
                    following = next_turn[turn]
                    reads.stored(turn, following < 0, now_s)
                    if following >= 0:
                        at = arrives_s[following]
                        if at != at:
                            at = now_s + think_s[following]
                        heapq.heappush(events, (at if at > now_s else now_s, turn_count + following))
                    continue
                turn -= turn_count
            came_at_s[session[turn]] = now_s
            queue.append(turn)
            rows.append(reads.queue_row(turn))
            reads.came(turn, came)
            came += 1
            conditions.queued = len(queue)
            if tells_queued:
                policy.queued(items, reads.queue_row(turn), now_s)
        advance(now_s)
        return account.result(policy.name, mover, now_s)


def _turns_of_sessions(workload: Workload) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Each turn's next of its session (-1 after the last), and the first turns."""
    order = np.argsort(workload.session, kind="stable").astype(np.int32)
    of = workload.session[order]
    same = of[1:] == of[:-1]
    following = np.full(workload.turns, -1, np.int32)
    following[order[:-1][same]] = order[1:][same]
    firsts = order[np.concatenate([[True], ~same])] if workload.turns else order
    return following, firsts


__all__ = ["CONTENDERS", "HINTS", "NOT_QUEUED", "Engine", "simulate"]
