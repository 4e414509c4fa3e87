"""How much may be read ahead of requests, and the price of such a read in hits.

Requests that wait have the SSD first. What they and the writes leave is free for reads ahead of time, but at most
a fifth of the bandwidth while the SSD is busy. And all reads together stay near those of a store that reads nothing
ahead: a read ahead replaces the read that the request would wait for, but it moves the whole item, where a request
computes a part again, and it may be for nothing.
"""

from __future__ import annotations

import math

from kvservice.policy.items import Conditions

_LEAST, _MOST = 0.01, 1.0  # Price of reading a mean item, in hits.
_BUSY = 0.5  # The SSD is busy if requests and writes take more than this share of its time; the price rises then.
_BUSY_SHARE = 0.2  # Of the bandwidth, for reads ahead of time while the SSD is busy.
_MEMORY_S = 60.0
#: All reads, of those of a store that reads nothing ahead.
_READS = 1.18
_SAVED_ITEMS = 64  # Unused allowance is kept up to DRAM's size, or up to so many items.
_LAST = 0.02  # The weight of the last use in the mean size of used items.
_FOUND_MEMORY = 4.0  # How many times as many bytes must be found on SSD until an observation of that counts 1/e.


class ReadBudget:
    """Fed with the counters of `Conditions`. A store that does not count its reads has no allowance to keep."""

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._counted = (0, 0, 0)
        self._demand = self._writing = 0.0  # Shares of recent time.
        self._returned = self._found = 0  # Bytes of items that were used since `learn`; those that only SSD had.
        self._found_sum = self._read_sum = 0.0
        self._used_bytes = 0.0  # Mean size of used items.
        self.allowance_bytes = math.inf
        self._per_item = _LEAST
        self._mean_density = 1.0

    def used(self, dram_bytes: int, ssd_bytes: int) -> None:
        """A request uses an item, with so much of it in the tiers."""
        stored_bytes = max(dram_bytes, ssd_bytes)
        self._returned += stored_bytes
        self._found += stored_bytes - dram_bytes
        self._used_bytes += _LAST * (stored_bytes - self._used_bytes)

    @property
    def per_density(self) -> float:
        """The price in hits, times what a use saves per byte: divide it by what a use of the item saves per byte."""
        return self._per_item * self._mean_density

    def readable_bytes(self, conditions: Conditions, within_s: float) -> float:
        """What may be read ahead within so many seconds, with what is coming."""
        free = max(1.0 - self._demand - self._writing, 0.0)
        share = free if free >= 1 - _BUSY else min(free, _BUSY_SHARE)
        coming_bytes = conditions.read_backlog_s * conditions.ssd_bytes_per_s
        return min(share * within_s * conditions.ssd_bytes_per_s, self.allowance_bytes) - coming_bytes

    def learn(self, conditions: Conditions, lru_share: float, mean_density: float, now_s: float) -> None:
        """`lru_share`: of the used bytes, those that `lru` would have had in DRAM. `mean_density`: what a use saves per
        byte, over the items.
        """
        now = conditions.read_bytes, conditions.demand_read_bytes, conditions.written_bytes
        read, demand, written = (after - before for after, before in zip(now, self._counted, strict=True))
        self._counted = now
        passed_s = now_s - self._at_s
        if passed_s > 0:
            weight = -math.expm1(-passed_s / _MEMORY_S)
            can_move = conditions.ssd_bytes_per_s * passed_s
            self._demand += (min(demand / can_move, 1.0) - self._demand) * weight
            self._writing += (min(written / can_move, 1.0) - self._writing) * weight
        self._at_s = now_s
        kept_bytes = max(conditions.dram_capacity_bytes, _SAVED_ITEMS * self._used_bytes)
        if conditions.read_bytes:
            self._allow(kept_bytes, read, demand, 1 - lru_share)
        self._returned = self._found = 0
        self._mean_density = mean_density or self._mean_density
        scarce = 1 - self.allowance_bytes / kept_bytes if kept_bytes else 0.0
        busy = (self._demand + self._writing - _BUSY) / (1 - _BUSY)
        self._per_item = _LEAST * (_MOST / _LEAST) ** min(max(busy, scarce, 0.0), 1.0)

    def _allow(self, kept_bytes: float, read: int, demand: int, missed: float) -> None:
        """Add what a store would have read that reads nothing ahead, and subtract what was read."""
        faded = math.exp(-self._found / max(_FOUND_MEMORY * kept_bytes, 1.0))
        self._found_sum = self._found_sum * faded + self._found
        self._read_sum = self._read_sum * faded + demand
        loaded = min(self._read_sum / self._found_sum, 1.0) if self._found_sum else 1.0
        allowance = min(self.allowance_bytes, kept_bytes) + _READS * loaded * missed * self._returned - read
        self.allowance_bytes = min(max(allowance, -kept_bytes), kept_bytes)
