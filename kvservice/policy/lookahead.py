"""The paper's policy (CachedAttention, USENIX ATC 2024, 3.3): it looks ahead in the engine's queue.

Items of requests near the queue's head are read from SSD before the requests run. DRAM and SSD first evict items
without a waiting request, the least recently used first, and then the items nearest to the queue's tail. The number
of sessions that the tiers hold determines how far to look ahead: `prefetch_window` and `eviction_window`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Promotion
from kvservice.policy.items import NOT_QUEUED, ItemTable, grown
from kvservice.policy.placement import Placement, inputs_of

_NO_LIMIT = sys.maxsize
_CLASS = 2.0**50  # Distance between two classes of scores: above any number of requests, and exact in a float64.
_HEAD = 32  # Requests at the queue's head that every call looks at, so that a dropped fetch is requested again.


class LookaheadPolicy(Placement):
    """S_kv, the average size of a session's KV, is the average over the sessions that the tiers hold now.

    C_mem, the DRAM for prefetching, is DRAM without the bytes of running requests and without the part that stays free
    so that a fetch need not wait for space. The paper gives no number for that part. Here it is 1/32: two or three
    average sessions at the paper's 128 GB. The next fetch then starts while the space of the last one is evicted. A
    larger part would reduce the space for waiting sessions.
    """

    name: ClassVar[str] = "lookahead"
    whole_items: ClassVar[bool] = True

    def __init__(self, dram_kept_free: float = 1 / 32) -> None:
        self.dram_kept_free = dram_kept_free
        self._known_bytes = np.zeros(0, np.int64)  # By row: size of the items that count in S_kv, else 0.
        self._known = self._known_bytes.data
        self._known_count = 0
        self._known_sum_bytes = 0
        self._largest_bytes = 0
        self._running: set[int] = set()
        self._looked_to_seq = 0  # Requests before this number were returned by `promotions`, if within the window.

    # Events

    def split(self, items: ItemTable, row: int, front_row: int, now_s: float) -> None:
        self._know(items, row, int(items.size_bytes[row]))
        self._know(items, front_row, int(items.size_bytes[front_row]))

    def queued(self, items: ItemTable, row: int, now_s: float) -> None:
        if self.look_at_s <= now_s or not items.conditions.ssd_capacity_bytes:
            return  # It looks at once, or has nothing to read.
        if items.at.queue_seq[row] < items.conditions.served + self.prefetch_window(items):
            self.look_at_s = now_s

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        self._running.add(row)
        if items.conditions.ssd_capacity_bytes:
            self.look_at_s = now_s  # The window moved.

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        self._running.discard(row)
        self._know(items, row, items.at.size_bytes[row])

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        if tier is TierName.DRAM:
            seq = items.at.queue_seq[row]
            if seq != NOT_QUEUED and seq < self._looked_to_seq:
                self._looked_to_seq = seq

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        self._running.discard(row)
        self._know(items, row, 0)

    def _know(self, items: ItemTable, row: int, size_bytes: int) -> None:
        if row >= len(self._known):
            self._known_bytes = grown(self._known_bytes, items.row_count, 0)
            self._known = self._known_bytes.data
        before = self._known[row]
        if before == size_bytes:
            return
        self._known[row] = size_bytes
        self._known_sum_bytes += size_bytes - before
        self._known_count += (size_bytes > 0) - (before > 0)
        if size_bytes > self._largest_bytes:
            self._largest_bytes = size_bytes

    # Windows

    def prefetch_window(self, items: ItemTable) -> int:
        """L_pw = floor(C_mem / S_kv): the number of requests at the queue's head whose KV is fetched."""
        return self._sessions_in(self._prefetch_bytes(items))

    def eviction_window(self, items: ItemTable) -> int:
        """L_ev = floor((C_mem + C_disk) / S_kv): the number of requests at the queue's head that keep their KV."""
        return self._sessions_in(self._prefetch_bytes(items) + items.conditions.ssd_capacity_bytes)

    def _prefetch_bytes(self, items: ItemTable) -> int:
        capacity_bytes, dram_bytes = items.conditions.dram_capacity_bytes, items.at.dram_bytes
        running_bytes = sum([dram_bytes[row] for row in self._running])
        return max(0, capacity_bytes - int(capacity_bytes * self.dram_kept_free) - running_bytes)

    def _sessions_in(self, size_bytes: int) -> int:
        return size_bytes * self._known_count // self._known_sum_bytes if self._known_count else _NO_LIMIT

    # Scores

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        """By recency without a waiting request, else by the place in the queue. Items in the window are evicted last.

        On SSD, an item in the window that DRAM holds too is evicted before one that only SSD has.
        """
        seq = items.queue_seq[rows]
        waits = seq != NOT_QUEUED
        worth = np.where(waits, _CLASS - seq, items.access_seq[rows])
        if tier == TierName.SSD:
            inside = waits & (seq < items.conditions.served + self.eviction_window(items))
            only = items.ssd_bytes[rows] > items.dram_bytes[rows]
            worth += np.where(inside, _CLASS * (1 + only), 0.0)
        return worth

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        """Whether SSD can make space for it without evicting an item that is needed sooner.

        An item in the eviction window is evicted only for one that is needed before it, and only if DRAM has no
        item outside the window that could be evicted instead.
        """
        seq, conditions = int(items.queue_seq[row]), items.conditions
        if seq == NOT_QUEUED and items.unwanted_on_ssd[row]:
            return False  # SSD evicted it, and no request has used it since.
        window = self.eviction_window(items)
        room_bytes = conditions.ssd_capacity_bytes - int(items.size_bytes[row])
        if (min(conditions.queued, window) + len(self._running)) * self._largest_bytes <= room_bytes:
            return True
        if room_bytes < 0:
            return False
        inside = (items.queue_seq != NOT_QUEUED) & (items.queue_seq < conditions.served + window)
        kept = (inside & (items.ssd_bytes > items.dram_bytes)) | (items.in_use > 0)
        kept[row] = False
        if int(items.ssd_bytes[kept].sum()) <= room_bytes:
            return True
        if not inside[row]:
            return False
        idle_in_dram = (items.dram_bytes > 0) & (items.in_use == 0)
        if np.any(idle_in_dram & ~inside):
            return False
        return seq < int(items.queue_seq[kept].max())

    def explain(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> Mapping[str, float]:
        """With the window, in requests from the queue's head, that protects items in this tier."""
        window = self.prefetch_window(items) if tier == TierName.DRAM else self.eviction_window(items)
        return inputs_of(items, row, now_s) | ({"window_requests": float(window)} if window < _NO_LIMIT else {})

    # Promotions

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        """The items of requests in the window that are on SSD, in the order of the queue.

        The call looks at the requests that entered the window since the last call, and at the queue's head. If requests
        read several items (shared prefixes), the window counts items, and the call looks at the whole window.
        """
        self.look_at_s = math.inf
        conditions = items.conditions
        served = conditions.served
        end = min(len(queue), self.prefetch_window(items))
        if len(queue) == conditions.queued:
            new = min(max(self._looked_to_seq - served, 0), end)
            rows = np.array([*islice(queue, min(_HEAD, new)), *(queue[place] for place in range(new, end))], np.int64)
            self._looked_to_seq = max(self._looked_to_seq, served + end)
        else:
            rows = np.array(list(dict.fromkeys(islice(queue, end))), np.int64)
        rows = rows[items.ssd_bytes[rows] > items.dram_bytes[rows] + items.coming_bytes[rows]]
        if not len(rows):
            return ()
        due_s = now_s + np.maximum(items.queue_seq[rows] - served, 0) / conditions.turns_per_s
        worth = self.retention(items, rows, TierName.DRAM, now_s)
        return list(map(Promotion, rows.tolist(), due_s.tolist(), worth.tolist()))
