"""Who knows when everything is used next, on the machine that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Promotion
from kvservice.policy.items import NOT_QUEUED, ItemTable
from kvservice.simulate.bounds import Bound
from kvservice.simulate.views import ints
from kvservice.simulate.workload import Workload

_NEVER = math.inf
#: Promotions are planned as if the channel had this share of its bandwidth, and so many seconds ahead.
_PLANNED_SHARE = 0.9
_AHEAD_S = 1.0
#: The plan is made anew at least so often: queues grow and shrink.
_LOOK_S = 2.0
_LEAST_LOOK_S = 0.05


class Clairvoyant(Bound):
    """Belady's rule in both tiers, and promotions as late as the channel allows.

    What is used the furthest ahead leaves first, and what is not used again leaves at once. For blocks in one tier,
    which have one size, no order gives more hits (Belady 1966; a path's end leaves before its beginning, so that
    no prefix is missing). For items of different sizes that problem is NP-hard: `by_area` goes by bytes times the
    seconds until the next use instead, so that what is kept costs the least space for a use.
    """

    name: ClassVar[str] = "optimum"

    def __init__(self, workload: Workload, by_area: bool = False, exclusive: bool = False) -> None:
        self._by_area = by_area
        self._exclusive = exclusive  # What is in DRAM until its next use needs no copy on SSD.
        self.look_at_s = -math.inf
        self._shared = workload.shares_prefixes
        self._refused = 0
        self._ssd_floor = -math.inf
        if self._shared:
            self._next = _NextTurns(workload)
            self._next_at_s = np.full(len(workload.item_blocks), _NEVER)
        else:
            self._next_at_s = np.full(workload.sessions, _NEVER)

    def foretell(self, session: int, at_s: float) -> None:
        """The session's next request comes at `at_s`."""
        if not self._shared:
            self._next_at_s[session] = at_s

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        if self._shared:
            self._next_at_s[row] = self._next.advance(row)
        else:
            self._next_at_s[row] = _NEVER

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        if tier is TierName.DRAM and items.ssd_bytes[row]:
            lacks_s = (items.ssd_bytes[row] - items.dram_bytes[row]) / items.conditions.ssd_bytes_per_s
            due_s = float(self._due_s(items, np.array([row]), now_s)[0])
            self.look_at_s = min(self.look_at_s, max(now_s, due_s - lacks_s - _AHEAD_S))

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        if self._shared:
            return -self._next.turn[rows]
        due_s = self._due_s(items, rows, now_s)
        kept = 1.0 / (items.size_bytes[rows] * (due_s - now_s + 1e-3)) if self._by_area else -due_s
        if self._exclusive and tier is TierName.SSD:
            doubled = items.dram_bytes[rows] >= items.ssd_bytes[rows]
            return np.where(doubled, kept - 1e18, kept)
        return kept

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        if math.isinf(self._next_at_s[row]) and items.queue_seq[row] == NOT_QUEUED:
            return False
        here = np.array([row])
        if self._refused % 8 == 0:
            conditions = items.conditions
            free = conditions.ssd_capacity_bytes - int(items.ssd_bytes.sum())
            rows = np.flatnonzero((items.ssd_bytes > 0) & (items.in_use == 0))
            full = free < items.size_bytes[row] and len(rows)
            self._ssd_floor = float(self.retention(items, rows, TierName.SSD, now_s).min()) if full else -math.inf
        wanted = float(self.retention(items, here, TierName.DRAM, now_s)[0]) > self._ssd_floor
        self._refused = 0 if wanted else self._refused + 1
        return wanted

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        """Reads what would come too late if it began later, by time of use."""
        self.look_at_s = now_s + _LOOK_S
        rows = np.flatnonzero((items.ssd_bytes > items.dram_bytes) & (items.in_use == 0))
        due_s = self._due_s(items, rows, now_s)
        rows, due_s = rows[np.isfinite(due_s)], due_s[np.isfinite(due_s)]
        if not len(rows):
            return ()
        order = np.argsort(due_s, kind="stable")
        rows, due_s = rows[order], due_s[order]
        lacks = items.ssd_bytes[rows] - items.dram_bytes[rows]
        reading_s = np.cumsum(lacks) / (items.conditions.ssd_bytes_per_s * _PLANNED_SHARE)
        slack_s = due_s - now_s - reading_s - _AHEAD_S
        pressing = np.flatnonzero(slack_s <= 0)
        count = int(pressing[-1]) + 1 if len(pressing) else 0
        self.look_at_s = now_s + min(_LOOK_S, max(_LEAST_LOOK_S, float(slack_s[count:].min(initial=_LOOK_S))))
        worth = self.retention(items, rows[:count], TierName.DRAM, now_s)
        return list(map(Promotion, rows[:count].tolist(), due_s[:count].tolist(), worth.tolist()))

    def _due_s(self, items: ItemTable, rows: Rows, now_s: float) -> NDArray[np.float64]:
        """When each is used next: its place in the queue, or when it comes and has waited."""
        conditions = items.conditions
        place = items.queue_seq[rows]
        comes_s = np.maximum(self._next_at_s[rows], now_s)
        if not conditions.queued:
            return comes_s
        waits_s = now_s + (place - conditions.served) / conditions.turns_per_s
        return np.where(place == NOT_QUEUED, comes_s + conditions.queued / conditions.turns_per_s, waits_s)


class _NextTurns:
    """The turn that reads each item next, from the paths of all turns."""

    def __init__(self, workload: Workload) -> None:
        turns = np.repeat(np.arange(workload.turns), np.diff(workload.path_begins))
        depth = np.arange(len(workload.path_items)) - workload.path_begins[turns]
        order = np.argsort(workload.path_items, kind="stable")
        self._turns = ints(turns[order])
        counts = np.bincount(workload.path_items, minlength=len(workload.item_blocks))
        begins = np.concatenate([[0], np.cumsum(counts)])
        self._at = ints(begins[:-1].copy())
        self._ends = ints(begins[1:].copy())
        self._arrives_s = workload.arrives_s
        self._depth = np.zeros(len(workload.item_blocks))
        self._depth[workload.path_items] = depth
        self._depth /= self._depth.max(initial=0) + 1
        #: Its number; later on the path counts a little more.
        self.turn = np.full(len(workload.item_blocks), _NEVER)

    def advance(self, row: int) -> float:
        """The item is read now. Returns when the next request for it comes."""
        self._at[row] += 1
        at = self._at[row]
        if at >= self._ends[row]:
            self.turn[row] = _NEVER
            return _NEVER
        following = self._turns[at]
        self.turn[row] = following + self._depth[row]
        return float(self._arrives_s[following])
