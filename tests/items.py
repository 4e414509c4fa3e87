"""A table of items and a mover for tests: it moves whole items in one step, as a policy decides, and records moves."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows, TierName
from kvservice.policy import Placement
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable

DRAM, SSD = TierName.DRAM, TierName.SSD


class Move(NamedTuple):
    what: str  # "fetch", "demote" (evicted from DRAM, with a copy on SSD) or "drop" (it was the last copy).
    item: int


class SmallMover:
    """Tiers, a queue and a server of one request at a time. Time advances only when a test says so.

    `items` has permanent numbers of items; `row_of` has the row of each. With `reuse`, rows that are not needed any
    more are given to other items.
    """

    def __init__(
        self, policy: Placement, dram_bytes: int, ssd_bytes: int, *, row_count: int = 64, reuse: bool = False
    ) -> None:
        self.policy = policy
        self.conditions = Conditions(dram_bytes, ssd_bytes, 1e9)
        self.table = ItemTable(row_count, self.conditions)
        self.queue: deque[int] = deque()
        self.moves: list[Move] = []
        self.now_s = 0.0
        self.row_of: dict[int, int] = {}
        self.item_of: dict[int, int] = {}
        self._written = NO_ROW  # Being written to SSD: its own copy there is not evicted for it.
        self._reuse = reuse
        self._free_rows = list(range(row_count))[::-1]
        self._sequence = 0
        self._requests = 0

    # Actions of the engine

    def request(self, item: int, *, look: bool = True) -> None:
        """Queue a request that continues the item. Whether the policy may ask for promotions at once."""
        row = self._row(item)
        table = self.table
        assert table.queue_seq[row] == NOT_QUEUED and not table.in_use[row], "a session has one request at a time"
        self.now_s += 1.0
        table.live[row] = True
        table.queue_seq[row] = self._requests
        self._requests += 1
        self.queue.append(row)
        self.conditions.queued = len(self.queue)
        self.policy.queued(table, row, self.now_s)
        if look:
            self.look()

    def begin(self) -> int:
        """Dispatch the queue's first request: its bytes on SSD are read. Returns the item."""
        row, table = self.queue.popleft(), self.table
        self.conditions.served += 1
        self.conditions.queued = len(self.queue)
        table.in_use[row] = 1
        table.uses[row] += 1
        table.queue_seq[row] = NOT_QUEUED
        table.access_seq[row] = self._next()
        table.unwanted_on_ssd[row] = False
        self.policy.used(table, row, self.now_s)
        missing_bytes = int(table.ssd_bytes[row] - table.dram_bytes[row])
        if missing_bytes > 0 and self._make_room(DRAM, missing_bytes):
            self._come(row, DRAM, int(table.ssd_bytes[row]))
        self.look()
        return self.item_of[row]

    def end(self, item: int, size_bytes: int) -> None:
        """The item's request has ended: the item has `size_bytes` now, in DRAM, and is written to SSD at once."""
        row, table = self.row_of[item], self.table
        self.now_s += 1.0
        table.size_bytes[row] = size_bytes
        table.in_use[row] = 0
        table.used_at_s[row] = self.now_s
        self._come(row, DRAM, size_bytes)
        self.policy.stored(table, row, self.now_s)
        self._make_room(DRAM, 0)
        if table.dram_bytes[row]:
            self._write(row)
        self._forget(row)
        self.look()

    def turn(self, item: int, size_bytes: int) -> None:
        """A request while no other request waits."""
        self.request(item)
        assert self.begin() == item
        self.end(item, size_bytes)

    def place(self, item: int, tier: TierName, size_bytes: int) -> None:
        """Put a stored item into one tier only."""
        row = self._row(item)
        self.table.size_bytes[row] = size_bytes
        self.table.access_seq[row] = self._next()
        self._come(row, tier, size_bytes)
        self.policy.stored(self.table, row, self.now_s)

    def evict(self, tier: TierName, count: int, *, rank_once: bool = False) -> list[int]:
        """Evict `count` items. Returns them in that order."""
        victims: list[int] = []
        ranked = self._victims(tier)
        for number in range(count):
            rows = ranked[number : number + 1] if rank_once else self._victims(tier)[:1]
            for row in rows:
                victims.append(self.item_of[row])
                self._leave(row, tier)
        return victims

    # Moves

    def bytes_in(self, tier: TierName) -> NDArray[np.int64]:
        return self.table.dram_bytes if tier is DRAM else self.table.ssd_bytes

    def idle_in(self, tier: TierName) -> Rows:
        """The items that may be evicted."""
        return np.flatnonzero((self.bytes_in(tier) > 0) & (self.table.in_use == 0))

    def free_bytes(self, tier: TierName) -> int:
        conditions = self.conditions
        capacity_bytes = conditions.dram_capacity_bytes if tier is DRAM else conditions.ssd_capacity_bytes
        return capacity_bytes - int(self.bytes_in(tier).sum())

    def look(self) -> None:
        """Execute the policy's promotions, if it is time to call it."""
        while self.policy.look_at_s <= self.now_s:
            kept_free_bytes = int(self.policy.dram_kept_free * self.conditions.dram_capacity_bytes)
            asked = self.policy.promotions(self.table, self.queue, self.now_s)
            for row, _, worth in sorted(asked, key=lambda promotion: promotion.deadline_s):
                missing_bytes = int(self.table.ssd_bytes[row] - self.table.dram_bytes[row])
                if missing_bytes > 0 and self._make_room(DRAM, max(missing_bytes, kept_free_bytes), worth):
                    self._fetch(row)
                    self._make_room(DRAM, kept_free_bytes, worth)

    def _fetch(self, row: int) -> None:
        self.note(Move("fetch", self.item_of[row]))
        self._come(row, DRAM, int(self.table.ssd_bytes[row]))

    def _victims(self, tier: TierName) -> list[int]:
        rows = self.idle_in(tier)
        rows = rows[rows != self._written]
        worth = self.policy.retention(self.table, rows, tier, self.now_s)
        return [int(row) for row in rows[np.argsort(worth, kind="stable")]]

    def _make_room(self, tier: TierName, size_bytes: int, worth: float = np.inf) -> bool:
        while self.free_bytes(tier) < size_bytes:
            victims = self._victims(tier)
            if not victims:
                return False
            [lowest] = self.policy.retention(self.table, np.array(victims[:1]), tier, self.now_s)
            if lowest >= worth:
                return False
            self._leave(victims[0], tier)
        return True

    def _leave(self, row: int, tier: TierName) -> None:
        table = self.table
        if tier is DRAM:
            if table.ssd_bytes[row] < table.dram_bytes[row]:
                self._write(row)
            kept = table.ssd_bytes[row] > 0
            table.dram_bytes[row] = 0
        else:
            kept = table.dram_bytes[row] > 0
            table.ssd_bytes[row] = 0
            table.unwanted_on_ssd[row] = True
        if tier is DRAM or not kept:
            self.note(Move("demote" if kept else "drop", self.item_of[row]))
        self.policy.left(table, row, tier, self.now_s)
        self._forget(row)

    def note(self, move: Move) -> None:
        self.moves.append(move)

    def _write(self, row: int) -> None:
        table = self.table
        if self.policy.wants_on_ssd(table, row, self.now_s):
            missing_bytes = int(table.dram_bytes[row] - table.ssd_bytes[row])
            self._written = row
            if self._make_room(SSD, missing_bytes):
                self._come(row, SSD, int(table.dram_bytes[row]))
            self._written = NO_ROW

    def _come(self, row: int, tier: TierName, size_bytes: int) -> None:
        table = self.table
        bytes_there, arrivals = self.bytes_in(tier), table.dram_seq if tier is DRAM else table.ssd_seq
        before = int(bytes_there[row])
        bytes_there[row] = size_bytes
        table.live[row] = True
        if not before and size_bytes:
            arrivals[row] = self._next()
            self.policy.arrived(table, row, tier, self.now_s)

    # Rows

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _row(self, item: int) -> int:
        if item not in self.row_of:
            row = self._free_rows.pop()
            self.row_of[item], self.item_of[row] = row, item
        return self.row_of[item]

    def _forget(self, row: int) -> None:
        table = self.table
        if table.dram_bytes[row] or table.ssd_bytes[row] or table.in_use[row] or table.queue_seq[row] != NOT_QUEUED:
            return
        table.live[row] = False
        self.policy.forgotten(table, row, self.now_s)
        if self._reuse:
            del self.row_of[self.item_of.pop(row)]
            self._free_rows.append(row)
            fresh = ItemTable(1, self.conditions)
            for name, column in vars(fresh).items():
                if isinstance(column, np.ndarray):
                    getattr(table, name)[row] = column[0]
