"""A bound that knows when every item is used next, on the given machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.placement.views import ints
from kvservice.policy.base import Promotion
from kvservice.policy.items import NOT_QUEUED, ItemTable
from kvservice.simulate.bounds import Bound
from kvservice.simulate.settings import Machine
from kvservice.simulate.workload import Workload

_NEVER = math.inf
#: Promotions are planned with this share of the channel's bandwidth, and this many seconds ahead.
_PLANNED_SHARE = 0.9
_AHEAD_S = 1.0
#: The plan is updated at least this often, because queues grow and shrink.
_LOOK_S = 2.0
_LEAST_LOOK_S = 0.25
#: Factor on the score of an SSD copy of an item that is in DRAM too. It ranks below every item that is used again.
_DOUBLED = 1e-12
#: Lower limit on the time until the next use.
_LEAST_S = 1e-3
#: The lowest score on SSD is updated once per this many refusals, if SSD holds at least `_FEW` items.
_FLOOR_EVERY = 8
_FEW = 256
#: The plan covers this many items with the soonest next uses.
_PLANNED = 256


class Clairvoyant(Bound):
    """Keeps the items that need the least space until their next use, and promotes as late as the channel allows.

    *Blocks* have one size: the block with the latest next use is evicted first. In one tier no order gives more hits
    (Belady 1966). Of a path the end is evicted first, so that no prefix is missing.

    *Sessions* differ in size, and the optimal choice among them is NP-hard, even with one tier. They are ranked by
    bytes times seconds until the next use, and an item is cut only as far as needed. The bound is the best of two
    runs (`optimum_plays`). They differ in whether SSD keeps copies of items in DRAM: with `exclusive`, a full SSD
    evicts such copies first, which frees space and costs writes. The share on time and the hit rate are each the best
    of all runs. There is no proof that this is the optimum. The runs of every policy are therefore part of the bound
    (`kvservice.simulate.policies`), so that no policy exceeds it.
    """

    name: ClassVar[str] = "optimum"
    newcomers_may_leave: ClassVar[bool] = True

    def __init__(self, workload: Workload, exclusive: bool = False) -> None:
        self._exclusive = exclusive
        self.look_at_s = -math.inf
        self._shared = workload.shares_prefixes
        self._plan = np.empty(0, np.int64)
        self._plan_again_at_s = -math.inf
        self._looked_at_s = -math.inf
        self._left: set[int] = set()
        self._asked_at_s: dict[int, float] = {}
        self._refused = 0
        self._ssd_floor = -math.inf
        if self._shared:
            self._next = _NextTurns(workload)
            self._next_at_s = np.full(len(workload.item_blocks), _NEVER)
        else:
            self._next_at_s = np.full(workload.sessions, _NEVER)

    def set_next_request(self, session: int, at_s: float) -> None:
        """The session's next request arrives at `at_s`; infinity for never. The engine calls this per answer."""
        if not self._shared:
            self._next_at_s[session] = at_s

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        self._asked_at_s.pop(row, None)
        if self._shared:
            self._next_at_s[row] = self._next.advance(row)
        else:
            self._next_at_s[row] = _NEVER

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        if tier == TierName.DRAM and items.ssd_bytes[row]:
            lacks_s = (items.ssd_bytes[row] - items.dram_bytes[row]) / items.conditions.ssd_bytes_per_s
            due_s = float(self._due_s(items, np.array([row]), now_s)[0])
            if math.isfinite(due_s):
                self._left.add(row)
            self._asked_at_s.pop(row, None)
            self.look_at_s = min(
                self.look_at_s, max(now_s, self._looked_at_s + _LEAST_LOOK_S, due_s - lacks_s - _AHEAD_S)
            )

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        if self._shared:
            return self._next.worth(rows)
        kept = self._density(items, rows, now_s)
        if self._exclusive and tier == TierName.SSD:
            kept[items.dram_bytes[rows] >= items.ssd_bytes[rows]] *= _DOUBLED
        return kept

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        if math.isinf(self._next_at_s[row]) and items.queue_seq[row] == NOT_QUEUED:
            return False
        conditions = items.conditions
        free_bytes = conditions.ssd_capacity_bytes - int(items.ssd_bytes.sum())
        if free_bytes >= items.size_bytes[row] - items.ssd_bytes[row]:
            return True
        if self._refused % _FLOOR_EVERY == 0:
            there = (items.ssd_bytes > 0) & (items.in_use == 0)
            there[row] = False
            worth = self.retention(items, np.flatnonzero(there), TierName.SSD, now_s)
            self._ssd_floor = float(worth.min(initial=math.inf))
            if len(worth) < _FEW:
                self._refused = -1
        wanted = float(self._density(items, np.array([row]), now_s)[0]) > self._ssd_floor
        self._refused = 0 if wanted else self._refused + 1
        return wanted

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        """The promotions that would end too late if they started later, by the time of the next use."""
        self._looked_at_s = now_s
        rows = self._soonest(items, now_s)
        rows = rows[(items.ssd_bytes[rows] > items.dram_bytes[rows]) & (items.in_use[rows] == 0)]
        due_s = self._due_s(items, rows, now_s)
        order = np.argsort(due_s, kind="stable")
        rows, due_s = rows[order], due_s[order]
        lacks = items.ssd_bytes[rows] - items.dram_bytes[rows]
        reading_s = np.cumsum(lacks) / (items.conditions.ssd_bytes_per_s * _PLANNED_SHARE)
        slack_s = due_s - now_s - reading_s - _AHEAD_S
        pressing = np.flatnonzero(slack_s <= 0)
        count = int(pressing[-1]) + 1 if len(pressing) else 0
        self.look_at_s = now_s + min(_LOOK_S, max(_LEAST_LOOK_S, float(slack_s[count:].min(initial=_LOOK_S))))
        asked = [index for index, row in enumerate(rows[:count].tolist()) if not self._asked_lately(row, now_s)]
        worth = self.retention(items, rows[asked], TierName.DRAM, now_s)
        return list(map(Promotion, rows[asked].tolist(), due_s[asked].tolist(), worth.tolist()))

    def _soonest(self, items: ItemTable, now_s: float) -> Rows:
        """The items on SSD with the soonest next uses: a plan at most `_LOOK_S` old, and evictions from DRAM since."""
        if now_s >= self._plan_again_at_s:
            self._plan_again_at_s = now_s + _LOOK_S
            rows = np.flatnonzero((items.ssd_bytes > items.dram_bytes) & (items.in_use == 0))
            due_s = self._due_s(items, rows, now_s)
            if len(rows) > _PLANNED:
                soonest = np.argpartition(due_s, _PLANNED)[:_PLANNED]
                rows, due_s = rows[soonest], due_s[soonest]
            self._plan = rows[np.isfinite(due_s)]
            self._left.clear()
        elif self._left:
            self._plan = np.union1d(self._plan, np.fromiter(self._left, np.int64))
            self._left.clear()
        return self._plan

    def _asked_lately(self, row: int, now_s: float) -> bool:
        """Whether the item was returned less than `_LOOK_S / 4` ago. A dropped promotion is requested again later."""
        if now_s < self._asked_at_s.get(row, -math.inf) + _LOOK_S / 4:
            return True
        self._asked_at_s[row] = now_s
        return False

    def _density(self, items: ItemTable, rows: Rows, now_s: float) -> NDArray[np.float64]:
        """Uses per byte and second until the next use."""
        if self._shared:
            return self._next.worth(rows)
        waits_s = self._due_s(items, rows, now_s) - now_s + _LEAST_S
        density: NDArray[np.float64] = 1.0 / (items.size_bytes[rows] * waits_s)
        return density

    def _due_s(self, items: ItemTable, rows: Rows, now_s: float) -> NDArray[np.float64]:
        """When each item is used next, in seconds: from its place in the queue, or from its arrival plus the wait."""
        conditions = items.conditions
        place = items.queue_seq[rows]
        comes_s: NDArray[np.float64] = np.maximum(self._next_at_s[rows], now_s)
        if not conditions.queued:
            return comes_s
        waits_s = now_s + (place - conditions.served) / conditions.turns_per_s
        comes_s += conditions.queued / conditions.turns_per_s
        waiting = place != NOT_QUEUED
        comes_s[waiting] = waits_s[waiting]
        return comes_s


class _NextTurns:
    """The next turn that reads each item, from the paths of all turns."""

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
        # An item further along the path has a slightly later next use, so that it is evicted first.
        self._turn = np.full(len(workload.item_blocks), _NEVER)

    def worth(self, rows: Rows) -> NDArray[np.float64]:
        """Scores, shape [rows]: an item that is read sooner has a higher score."""
        next_turn: NDArray[np.float64] = self._turn[rows]
        return np.negative(next_turn)

    def advance(self, row: int) -> float:
        """The item is read now. Returns when the next request for it arrives, in seconds."""
        self._at[row] += 1
        at = self._at[row]
        if at >= self._ends[row]:
            self._turn[row] = _NEVER
            return _NEVER
        following = self._turns[at]
        self._turn[row] = following + self._depth[row]
        return float(self._arrives_s[following])


def optimum_plays(workload: Workload, machine: Machine) -> Iterator[Clairvoyant]:
    """The clairvoyant's runs: the bound is the best of them."""
    yield Clairvoyant(workload)
    if machine.dram_bytes and machine.ssd_bytes and not workload.shares_prefixes:
        yield Clairvoyant(workload, exclusive=True)
