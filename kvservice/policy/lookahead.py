"""The paper's policy (CachedAttention, USENIX ATC 2024, 3.3): the engine's queue is the future that is known.

What waits near the queue's head is fetched from SSD before its turn comes. DRAM and SSD give up what no request
waits for, the least recently used first, and then what waits nearest to the queue's tail. How far ahead to look
follows from how many sessions the tiers hold: `prefetch_window` and `eviction_window`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Promotion
from kvservice.policy.items import NOT_QUEUED, ItemTable
from kvservice.policy.placement import Placement

_NO_LIMIT = sys.maxsize
_CLASS = 2.0**50  # Between two classes of worth. More than there will ever be requests, and exact in a float64.
_HEAD = 32  # Requests at the queue's head that are looked at every time: a fetch that found no room is asked for again.


class LookaheadPolicy(Placement):
    """S_kv, the average size of a session's KV, is taken over the sessions that the tiers know now.

    C_mem, the DRAM for prefetching, is what remains of DRAM without what running requests have there and without
    the part that is kept free so that a fetch never waits for room. The paper gives no number for that part. Here it
    is a thirty-second: at the paper's 128 GB, two or three average sessions, so that the next fetch begins while the
    one before it is being made up for; more would be taken from the sessions that wait.
    """

    name: ClassVar[str] = "lookahead"
    whole_items: ClassVar[bool] = True

    def __init__(self, dram_kept_free: float = 1 / 32) -> None:
        self.dram_kept_free = dram_kept_free
        self._known_bytes = np.zeros(1024, np.int64)  # By row, of what counts in S_kv; 0 else.
        self._known_count = 0
        self._known_sum_bytes = 0
        self._largest_bytes = 0
        self._running: set[int] = set()
        self._looked_to_seq = 0  # What waits before it was asked for, if it was within the window.

    # What happens

    def queued(self, items: ItemTable, row: int, now_s: float) -> None:
        if items.queue_seq[row] < items.conditions.served + self.prefetch_window(items):
            self.look_at_s = now_s

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        self._running.add(row)
        self.look_at_s = now_s  # The window moved on.

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        self._running.discard(row)
        self._know(row, int(items.size_bytes[row]))

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        seq = int(items.queue_seq[row])
        if tier is TierName.DRAM and seq != NOT_QUEUED and seq < self._looked_to_seq:
            self._looked_to_seq = seq

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        self._running.discard(row)
        self._know(row, 0)

    def _know(self, row: int, size_bytes: int) -> None:
        if row >= len(self._known_bytes):
            more = np.zeros(max(row + 1, 2 * len(self._known_bytes)) - len(self._known_bytes), np.int64)
            self._known_bytes = np.concatenate([self._known_bytes, more])
        before = int(self._known_bytes[row])
        self._known_bytes[row] = size_bytes
        self._known_sum_bytes += size_bytes - before
        self._known_count += (size_bytes > 0) - (before > 0)
        self._largest_bytes = max(self._largest_bytes, size_bytes)

    # How far it looks

    def prefetch_window(self, items: ItemTable) -> int:
        """L_pw = floor(C_mem / S_kv): so many requests from the queue's head have their KV fetched."""
        return self._sessions_in(self._prefetch_bytes(items))

    def eviction_window(self, items: ItemTable) -> int:
        """L_ev = floor((C_mem + C_disk) / S_kv): so many requests from the queue's head keep their KV."""
        return self._sessions_in(self._prefetch_bytes(items) + items.conditions.ssd_capacity_bytes)

    def _prefetch_bytes(self, items: ItemTable) -> int:
        capacity_bytes, dram_bytes = items.conditions.dram_capacity_bytes, items.dram_bytes
        running_bytes = sum(int(dram_bytes[row]) for row in self._running)
        return max(0, capacity_bytes - int(capacity_bytes * self.dram_kept_free) - running_bytes)

    def _sessions_in(self, size_bytes: int) -> int:
        return size_bytes * self._known_count // self._known_sum_bytes if self._known_count else _NO_LIMIT

    # What stays

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        """No request waits: by recency. Else by the place in the queue: so what is within the window leaves last.

        Where DRAM has all that SSD has of an item within the window, no byte is lost with the copy on SSD: it leaves
        before one that is the only one.
        """
        seq = items.queue_seq[rows]
        waits = seq != NOT_QUEUED
        worth = np.where(waits, _CLASS - seq, items.access_seq[rows])
        if tier is TierName.SSD:
            inside = waits & (seq < items.conditions.served + self.eviction_window(items))
            only = items.ssd_bytes[rows] > items.dram_bytes[rows]
            worth += np.where(inside, _CLASS * (1 + only), 0.0)
        return worth

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        """Whether room for it can be had there without dropping what is needed sooner.

        An item within the eviction window is dropped only for one that is needed before it, and only once
        DRAM has nothing outside the window that could leave instead.
        """
        seq, conditions = int(items.queue_seq[row]), items.conditions
        if seq == NOT_QUEUED and items.unwanted_on_ssd[row]:
            return False  # It was the first to leave there, and nothing has happened since.
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

    # What comes

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        """What waits within the window and is on SSD, in the order of the queue.

        Only what came into the window since the last time is looked at, and the head of the queue. Where requests
        read several items, shared prefixes, the window is in items, and all of it is looked at.
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
