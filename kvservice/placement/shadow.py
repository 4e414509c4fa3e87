"""A policy beside the real one: what it would have found in DRAM, on a model of the tiers, for the same requests.

The shadow gets the events of the items that a store has. A `PlacementCore` of its own models which tier has them.
Its model: what a request saves enters DRAM at once, and SSD if the policy wants that; requests read what only SSD has;
reads ahead wait for both. All of them take time by the SSD's measured bandwidth. An item that the store has lost from
all tiers is unknown to the shadow, too: a request for it counts for neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from kvservice.blocks import TierName
from kvservice.placement.core import PlacementCore
from kvservice.placement.item_state import ItemPart
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.items import NOT_QUEUED, Conditions, ItemTable
from kvservice.policy.placement import Placement

_DRAM, _SSD = TierName.DRAM, TierName.SSD
_NO_REQUEST = -1


@dataclass(slots=True)
class Found:
    """What requests have found. A request finds a prefix of each item that it reads."""

    requests_in_dram: int = 0  # With all that they read.
    dram_bytes: int = 0
    ssd_bytes: int = 0  # Only on SSD.
    missing_bytes: int = 0
    read_ahead_bytes: int = 0  # The shadow's own; the real ones are counted where they happen.


class _Reading(NamedTuple):
    item: int
    size_bytes: int
    ends_s: float


class ShadowStore(Placement):
    """A `Placement` that decides nothing: it is called as the store's policy is, and asks `policy` for the shadow.

    Events before `begin` are ignored. Call `promotions` often: reads ahead begin and end there.
    """

    name: ClassVar[str] = "shadow"

    def __init__(self, policy: Placement, conditions: Conditions) -> None:
        """`conditions` are the policy's; the store of the events keeps `served` and `queued` in them."""
        self.policy = policy
        self.look_at_s = -math.inf
        self.requests = 0
        self.real, self.shadow = Found(), Found()
        self._core = PlacementCore(ItemTable(1024, conditions), policy, block_bytes=1)
        self._conditions = conditions
        self._has_begun = False
        self._request = _NO_REQUEST  # The number of the one that is counted now.
        self._real_has_all = self._shadow_has_all = False
        self._reading: _Reading | None = None
        self._ssd_free_s = -math.inf  # When the SSD has done what it was asked so far.
        self._looked_s = -math.inf

    def begin(self, items: ItemTable, now_s: float) -> None:
        """Begin with what the real tiers have now."""
        self._has_begun = True
        self._need_rows(items)
        core = self._core
        for row in np.flatnonzero(items.live).tolist():
            core.created(row)
            self._mirror(items, row)
            core.resized(row, int(items.size_bytes[row]))
            for tier, size_bytes in ((_DRAM, items.dram_bytes[row]), (_SSD, items.ssd_bytes[row])):
                if size_bytes:
                    core.entered(row, tier, int(size_bytes), now_s)
            core.items.used_at_s[row] = now_s
            core.stored([row], now_s)
            core.forget_if_gone(row, now_s)

    def counts(self) -> tuple[int, Found, Found]:
        """Requests since `begin`, what they found, and what they would have found."""
        self._end_request()
        return self.requests, self.real, self.shadow

    # Events

    def split(self, items: ItemTable, row: int, front_row: int, now_s: float) -> None:
        self._need_rows(items)
        mine = self._core.items
        if not self._has_begun or not mine.live[row]:
            return
        self._stop_read(row)
        size = min(int(items.size_bytes[front_row]), int(mine.size_bytes[row]))
        in_dram, on_ssd = (min(size, int(column[row])) for column in (mine.dram_bytes, mine.ssd_bytes))
        value = float(items.value[front_row])
        mine.value[row] = items.value[row] + value
        self._core.split(row, front_row, ItemPart(size, in_dram, on_ssd, 0, value), now_s)

    def queued(self, items: ItemTable, row: int, now_s: float) -> None:
        if self._knows(items, row):
            self._core.items.queue_seq[row] = items.queue_seq[row]
            self.policy.queued(self._core.items, row, now_s)

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        if not self._knows(items, row):
            return
        core, mine = self._core, self._core.items
        self._stop_read(row)
        if items.conditions.served != self._request:
            self._end_request()
            self._request = items.conditions.served
            self.requests += 1
            self._real_has_all = self._shadow_has_all = True
        size = max(int(items.size_bytes[row]), int(mine.size_bytes[row]))
        self._real_has_all &= _count(self.real, size, int(items.dram_bytes[row]), int(items.ssd_bytes[row]))
        in_dram, on_ssd = int(mine.dram_bytes[row]), int(mine.ssd_bytes[row])
        self._shadow_has_all &= _count(self.shadow, size, in_dram, on_ssd)
        if on_ssd > in_dram:
            self._occupy_ssd(on_ssd - in_dram, now_s)
            self._conditions.read_bytes += on_ssd - in_dram
            self._conditions.demand_read_bytes += on_ssd - in_dram
        mine.queue_seq[row] = NOT_QUEUED
        core.used([row], NOT_QUEUED, now_s)
        self._mirror(items, row)

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        if not self._knows(items, row):
            return
        core, mine = self._core, self._core.items
        size = int(items.size_bytes[row])
        enters = mine.in_use[row] or size > mine.size_bytes[row]  # Else its request has left the queue.
        if mine.in_use[row]:
            core.answered(row, int(items.answer_tokens[row]), now_s)
        mine.used_at_s[row] = now_s
        if enters:
            self._stop_read(row)
            core.saved(row, max(size, int(mine.size_bytes[row])), now_s)
        core.stored([row], now_s)
        if enters:
            self._write(row, now_s)
            self._free(_DRAM, 0, math.inf, now_s)

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float, kind: int = 0) -> None:
        if self._knows(items, row):
            self._core.hinted(row, hint, now_s, kind)

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        if self._has_begun and row < self._core.items.row_count and self._core.items.live[row]:
            self._stop_read(row)
            self._core.items.queue_seq[row], self._core.items.in_use[row] = NOT_QUEUED, 0
            self._core.dropped(row, now_s)

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        """Carries out the shadow's reads ahead. The store gets none."""
        if not self._has_begun:
            return ()
        self._need_rows(items)
        core, mine = self._core, self._core.items
        known = np.flatnonzero(mine.live[: items.row_count])
        mine.in_use[known], mine.queue_seq[known] = items.in_use[known], items.queue_seq[known]
        self._read(now_s)
        backlog_s = max(0.0, self._ssd_free_s - now_s)
        waiting_bytes = sum(int(mine.ssd_bytes[item] - mine.dram_bytes[item]) for item in core.reading)
        self._conditions.read_backlog_s = backlog_s + waiting_bytes / self._conditions.ssd_bytes_per_s
        if now_s >= self.policy.look_at_s:
            core.reads([item for item in queue if mine.live[item]], now_s)
        self._looked_s = now_s
        return ()

    # The model

    def _knows(self, items: ItemTable, row: int) -> bool:
        """Make the row ready, if the shadow has begun."""
        if not self._has_begun:
            return False
        self._need_rows(items)
        if not self._core.items.live[row]:  # It is new, or the shadow has lost it.
            self._core.created(row)
        self._mirror(items, row)
        return True

    def _need_rows(self, items: ItemTable) -> None:
        if items.row_count > self._core.items.row_count:
            self._core.grow(items.row_count)

    def _mirror(self, items: ItemTable, row: int) -> None:
        """Columns that do not depend on where the item is."""
        mine = self._core.items
        mine.uses[row], mine.access_seq[row], mine.value[row] = items.uses[row], items.access_seq[row], items.value[row]

    def _end_request(self) -> None:
        if self._request != _NO_REQUEST:
            self.real.requests_in_dram += self._real_has_all
            self.shadow.requests_in_dram += self._shadow_has_all
            self._request = _NO_REQUEST

    def _occupy_ssd(self, size_bytes: int, now_s: float) -> float:
        """The SSD moves so many bytes more. Returns when it has done so."""
        begins_s = max(self._ssd_free_s, now_s)
        self._ssd_free_s = begins_s + size_bytes / self._conditions.ssd_bytes_per_s
        return self._ssd_free_s

    def _write(self, row: int, now_s: float) -> None:
        core = self._core
        lacks = core.write_began(row, int(core.items.dram_bytes[row]), now_s)
        if not lacks:
            return
        self._free(_SSD, lacks, math.inf, now_s)
        size = core.reserve(row, _SSD, lacks)
        if size:
            self._occupy_ssd(size, now_s)
            self._conditions.written_bytes += size
            core.entered(row, _SSD, size, now_s)
        core.write_ended(row)

    def _free(self, tier: TierName, wanted_bytes: int, worth: float, now_s: float) -> None:
        core, mine = self._core, self._core.items
        column = mine.dram_bytes if tier is _DRAM else mine.ssd_bytes
        for item, keep_bytes, _ in core.victims(tier, wanted_bytes, worth, now_s):
            if not mine.in_use[item]:
                core.left(item, tier, int(column[item]) - keep_bytes, now_s)

    def _read(self, now_s: float) -> None:
        """Carry out reads until now: one at a time, the most urgent first, when nothing else uses the SSD."""
        core = self._core
        while True:
            if self._reading is not None:
                item, size, ends_s = self._reading
                if ends_s > now_s:
                    return
                core.entered(item, _DRAM, size, ends_s)
                core.read_ended(item)
                self.shadow.read_ahead_bytes += size
                self._reading = None
            begins_s = max(self._ssd_free_s, self._looked_s)
            if begins_s > now_s or not core.reading:
                return
            item = min(core.reading, key=lambda each: core.reading[each].deadline_s)
            worth, wanted_bytes = core.reading[item].worth, core.read_began(item)
            if not wanted_bytes:
                continue
            self._free(_DRAM, wanted_bytes + core.kept_free_bytes, worth, now_s)
            size = core.reserve(item, _DRAM, wanted_bytes)
            if size:
                self._reading = _Reading(item, size, self._occupy_ssd(size, begins_s))
                self._conditions.read_bytes += size
            else:
                core.read_ended(item)

    def _stop_read(self, row: int) -> None:
        """A request reads the item itself, or the item changes."""
        if row not in self._core.reading:
            return
        if self._reading is not None and self._reading.item == row:
            self._core.read_ended(row, self._reading.size_bytes)
            self._reading = None
        else:
            self._core.read_cancelled(row)


def _count(found: Found, size: int, in_dram: int, on_ssd: int) -> bool:
    """Count what a use of an item of this size finds. Returns whether DRAM has all of it."""
    in_dram = min(in_dram, size)
    stored = min(max(in_dram, on_ssd), size)
    found.dram_bytes += in_dram
    found.ssd_bytes += stored - in_dram
    found.missing_bytes += size - stored
    return in_dram == size
