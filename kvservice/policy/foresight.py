"""KVService's own policy: keep the items with the most expected hits per byte and second, and read them in time.

The score of an item in a tier is the rate of hits that it earns there, per second and byte. An item whose request is
queued returns at a known time. For other items the return time is predicted from past returns (`return_times`) or
from hints (`hint_times`), and `worth` turns the hazard into a score. So a session leaves DRAM soon after its
answer, since users do not reply at once, and is read again shortly before they usually do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from kvservice.blocks import Rows, TierName
from kvservice.policy import hint_times, learned
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.hint_times import HintTimes
from kvservice.policy.item_scores import LEAST_S, ItemScores
from kvservice.policy.items import NOT_QUEUED, ItemTable, grown
from kvservice.policy.look_times import LOOKS, LOOKS_ALONE, LookTimes
from kvservice.policy.placement import Placement, inputs_of
from kvservice.policy.queue_waits import QueueWaits
from kvservice.policy.read_budget import ReadBudget
from kvservice.policy.return_times import ReturnTimes
from kvservice.policy.shadow_lru import LruChoice
from kvservice.policy.survival import Floats

_FULL_SCAN_PART = 4  # All items, not only candidates, are scored once per (live items / 4) events.
_MARGIN_PART = 48  # The eviction threshold is the score at 1/48 of DRAM from the bottom.
_CANDIDATE_SHARE = 0.5  # Partial scans skip items whose best future score is below this share of the threshold.
_RELEARN_GROWTH = 3  # The model is fitted again when there are 1/3 more returns...
_LEARN_RETURNS = (16, 1024)  # ... but at least and at most after so many returns.
#: While requests are queued that may read from SSD, an item without an SSD copy scores this factor higher.
_DIRTY = 4.0
#: An item is written to SSD if it scores at least this share of what SSD evicted last: scores are estimates, and a
#: miss costs more than a write.
_SSD_ADMIT_SHARE = 0.9
_RECENCY = 1e-60  # A score per use, below that of any queued request.


class ForesightPolicy(Placement):
    """Learns online, starting from LRU's order. `learning=False`: recency and the queue only."""

    name: ClassVar[str] = "foresight"

    def __init__(self, learning: bool = True) -> None:
        self._learning = learning
        self._started = False
        self._restored = b""

    def _start(self, items: ItemTable, now_s: float) -> None:
        self._started = True
        self._returns, self._hints = self._start_learning(items.row_count)
        self._waits = QueueWaits()
        self._reads = ReadBudget(now_s)
        self._scores = ItemScores(
            items.row_count, self._returns, self._hints, self._waits, self._reads, items.conditions
        )
        self._candidate = np.zeros(items.row_count, np.bool_)  # In DRAM, or may score above the threshold soon.
        self._is_candidate = self._candidate.data
        self._since_all = 0  # Events since the last full scan.
        self._lru = LruChoice(items.conditions.dram_capacity_bytes, may_differ=self._learning)
        self._looks = LookTimes(now_s)
        self.look_at_s = self._looks.soonest_s
        self._all_due = 0
        self._level = 0.0  # DRAM's eviction threshold.
        self._ssd_level = 0.0
        self._learn_at = _LEARN_RETURNS[0]
        self._passed = 0  # Requests that left the queue since it was scanned.
        self._window = 1  # How many requests from the queue's head fitted into DRAM then.
        self._all_fit = True  # All of them.
        if self._restored:
            self._lru.restored(learned.unpack(self._restored, self._returns, self._hints))
            self._restored = b""
            self._learn_at = 0
            self._learn_if_due(np.empty(0, np.int64), now_s)

    def _start_learning(self, row_count: int) -> tuple[ReturnTimes, HintTimes]:
        return ReturnTimes(row_count, self._learning), HintTimes(row_count)

    # Over restarts

    def state(self) -> bytes:
        if not self._started or not self._learning:
            return b""
        return learned.packed(self._returns, self._hints, self._lru.knows_enough)

    def restore(self, state: bytes) -> bool:
        if self._started or not self._learning or not learned.fits(state, *self._start_learning(0)):
            return False
        self._restored = state
        return True

    # The table

    def grow(self, row_count: int) -> None:
        if not self._started:
            return
        for part in (self._returns, self._hints, self._scores):
            part.grow(row_count)
        self._candidate = grown(self._candidate, row_count, False)
        self._is_candidate = self._candidate.data

    def split(self, items: ItemTable, row: int, front_row: int, now_s: float) -> None:
        if not self._started:
            return
        self._returns.split(row, front_row)
        self._scores.split(row, front_row)
        self._candidate[front_row] = True

    # Events

    def queued(self, items: ItemTable, row: int, now_s: float) -> None:
        if not self._started:
            self._start(items, now_s)
        at, returns, hints = items.at, self._returns, self._hints
        called_at_s = math.nan
        if hints.is_hinted(row):
            called_at_s = hints.called_at_s(row)
            if self._learning and returns.is_waiting(row):
                reading_s = at.size_bytes[row] / items.conditions.ssd_bytes_per_s
                hints.record_return(row, returns.hazard(row, now_s), reading_s, now_s)
        elif self._learning and returns.is_waiting(row):
            hints.count_return()
        returns.record_return(row, now_s, called_at_s)
        self._waits.queued(row, now_s)
        self._is_candidate[row] = True
        if self._looks.happened(now_s) and now_s < self.look_at_s:
            self.look_at_s = now_s
        if at.dram_bytes[row] < at.ssd_bytes[row] and self._has_room(items, row):
            self.look_at_s = now_s

    def _has_room(self, items: ItemTable, row: int) -> bool:
        """Whether DRAM may hold the queued request together with those before it."""
        return self._all_fit or items.at.queue_seq[row] - items.conditions.served < self._window

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        if not self._started:
            self._start(items, now_s)
        at = items.at
        self._waits.served(row, now_s)
        in_dram = at.dram_bytes[row]
        self._reads.used(in_dram, at.ssd_bytes[row])
        self._lru.shadow.used(at.key[row] or row, at.size_bytes[row], in_dram)
        self._passed += 1
        conditions = items.conditions
        if conditions.queued and conditions.ssd_capacity_bytes and self._passed * 8 >= self._window:
            self.look_at_s = now_s

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        if not self._started:
            self._start(items, now_s)
        at, returns, shadow = items.at, self._returns, self._lru.shadow
        size, key, uses, value = at.size_bytes[row], at.key[row], at.uses[row], at.value[row]
        if key and uses == 1 and not returns.is_waiting(row):
            shadow.used(key, shadow.size_of(key), 0)  # `lru` may have it, where this store forgot it.
        returns.start_waiting(row, uses, at.answer_tokens[row], now_s, value)
        self._scores.stored(items.conditions, row, size or 1, value, at.access_seq[row])
        self._lru.stored(key or row, size)
        self._is_candidate[row] = True
        if self._looks.happened(now_s) and now_s < self.look_at_s:
            self.look_at_s = now_s

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float, kind: int = 0) -> None:
        if not self._started or not self._learning:
            return
        self._hints.hinted(row, hint, self._returns.hazard(row, now_s) * self._returns.typical_s, now_s, kind)
        if hint is Hint.ENDED and self._returns.is_waiting(row):  # Else it has no age.
            rows = np.array((row,))
            sizes = np.maximum(items.size_bytes[rows], 1)
            dense = self._scores.dense(items, rows, sizes)
            self._scores.score(items, rows, sizes, dense, self._looks.hinted_every_s, now_s)
        self._is_candidate[row] = True
        self._looks.hinted(now_s)
        self._looks.happened(now_s)
        self.look_at_s = min(self.look_at_s, self._looks.soonest_s)

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        if self._started and tier is TierName.SSD:
            self._ssd_level = self._scores.at.on_ssd[row]

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        if self._started:
            self._returns.forgotten(row, now_s)
            self._hints.cancel(row, now_s)
            self._waits.forgotten(row)
            self._scores.forgotten(row)
            self._is_candidate[row] = False

    # Scores

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> Floats:
        if not self._started:
            return items.access_seq[rows].astype(np.float64)
        lost = tier is TierName.SSD or not items.conditions.ssd_capacity_bytes
        worth: Floats
        if self._lru.follows:
            worth = np.multiply(items.access_seq[rows], _RECENCY)
            worth[items.ended[rows]] = 0.0
        else:
            worth = (self._scores.on_ssd if lost else self._scores.in_dram)[rows]
        queue_seq = items.queue_seq[rows]
        waiting = (queue_seq != NOT_QUEUED).nonzero()[0]
        if len(waiting):
            worth[waiting] = self._scores.of_queued(items, rows[waiting], queue_seq[waiting], self._window, lost)
        if not lost and items.conditions.queued:  # Copying it now would delay reads of the SSD.
            dirty = (items.ssd_bytes[rows] < items.dram_bytes[rows]).nonzero()[0]
            if len(dirty):
                worth[dirty] *= _DIRTY
        return worth

    def wants_in_dram(self, items: ItemTable, row: int, now_s: float) -> bool:
        return not self._started or self._lru.follows or self._scores.at.in_dram[row] >= self._level

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        if not self._started:
            return True
        score = self._scores.at.on_ssd[row]
        if self._lru.follows:
            return score > 0.0 and not items.at.unwanted_on_ssd[row] and not self._hints.has_ended(row)
        return score > 0.0 and score >= _SSD_ADMIT_SHARE * self._ssd_level and not self._hints.has_ended(row)

    def explain(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> Mapping[str, float]:
        """`returns_per_s` is the expected rate of the item's next use now; `value` is in units of the table."""
        found = inputs_of(items, row, now_s)
        if self._started:
            found["returns_per_s"] = self._returns.hazard(row, now_s)
            found["value"] = float(items.value[row])
            found["least_score_kept"] = float(self._level if tier == TierName.DRAM else self._ssd_level)
        return found

    # Promotions

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        if not self._started:
            self._start(items, now_s)
        wanted = self._queued_soon(items, queue, now_s) if queue and items.conditions.ssd_capacity_bytes else []
        if now_s >= self._looks.soonest_s:
            wanted += self._rescan(items, now_s)
        self.look_at_s = self._looks.soonest_s
        return wanted

    def _promotions_of(self, rows: Rows, dense: Floats, worths: Floats, now_s: float) -> list[Promotion]:
        """Deadlines: for hinted items the soonest arrivals after such hints; for others the mean time to the return."""
        hints = self._hints
        deadlines = now_s + dense / worths
        if hints.count:
            hinted = (hints.in_class[rows] != hint_times.NONE).nonzero()[0]
            soonest = hints.since_s[rows[hinted]] + hints.soonest_s[hints.in_class[rows[hinted]]]
            deadlines[hinted] = np.minimum(deadlines[hinted], np.maximum(soonest, now_s))
        return list(map(Promotion, rows.tolist(), deadlines.tolist(), worths.tolist()))

    def _queued_soon(self, items: ItemTable, queue: Sequence[int], now_s: float) -> list[Promotion]:
        """Reads for the queued requests, from the queue's head on, as far as DRAM has space."""
        self._passed = 0
        conditions = items.conditions
        at = items.at
        room = conditions.dram_capacity_bytes
        wanted = []
        ahead = 0
        self._all_fit = True
        for row in queue:
            ahead = at.queue_seq[row] - conditions.served
            size = at.size_bytes[row]
            room -= size
            if room < 0:
                self._all_fit = False
                break
            if at.ssd_bytes[row] > at.dram_bytes[row] + at.coming_bytes[row]:
                coming_s = max(ahead / conditions.turns_per_s, LEAST_S)  # One request may read several rows.
                dense = self._scores.dense_of(size, at.value[row])
                wanted.append(Promotion(row, now_s + coming_s, dense / coming_s))
        self._window = max(ahead, 1)
        return wanted

    def _rescan(self, items: ItemTable, now_s: float) -> list[Promotion]:
        """Score the candidates (or all items), and read ahead what scores above the items that would have to leave."""
        conditions = items.conditions
        returns = self._returns
        self._since_all += self._looks.events
        if self._since_all >= self._all_due or self._returns_seen >= self._learn_at:
            rows = items.live.nonzero()[0]
            self._candidate[rows] = True
            self._since_all = 0
            self._all_due = len(rows) // _FULL_SCAN_PART
            thinking = rows[returns.since_s[rows] <= now_s]
            self._learn_if_due(thinking, now_s)
        else:
            rows = self._candidate.nonzero()[0]
            thinking = rows[returns.since_s[rows] <= now_s]
        looks = LOOKS if conditions.ssd_capacity_bytes else LOOKS_ALONE
        self._looks.looked(len(rows), returns.typical_s, self._hints.soonest_s.item(0), now_s, looks)
        if not len(thinking):
            self._looks.plan(False, False, now_s)
            return []
        scores = self._scores
        scores.rates_changed(conditions)
        saved_bytes = items.size_bytes[thinking]
        sizes = np.maximum(saved_bytes, 1)
        dense = scores.dense(items, thinking, sizes)
        mean_dense = float((dense[0] * saved_bytes).sum()) / max(float(saved_bytes.sum()), 1.0)
        self._reads.learn(conditions, self._lru.shadow.hit_share, mean_dense, now_s)
        fetch, later = scores.score(items, thinking, sizes, dense, self._looks.hinted_every_s, now_s)

        has = items.dram_bytes[rows]
        in_dram = rows[(has > 0) & (items.in_use[rows] == 0)]
        worths = self.retention(items, in_dram, TierName.DRAM, now_s)
        order = worths.argsort()
        leaves = worths[order]
        # A store that frees space in advance may have more in DRAM for a moment than it lets the policy use.
        free = max(conditions.dram_capacity_bytes - int((has + items.coming_bytes[rows]).sum()), 0)
        room = free + items.dram_bytes[in_dram[order]].cumsum()  # Free bytes once items up to this one have left.
        self._level = self._level_at(conditions.dram_capacity_bytes / _MARGIN_PART, free, room, leaves)
        candidate = later > _CANDIDATE_SHARE * self._level
        has = items.dram_bytes[thinking]
        self._candidate[thinking] = candidate | (has > 0)
        if not conditions.ssd_capacity_bytes:
            self._looks.plan(False, bool(self._hints.expected), now_s)
            return []
        if int(items.ssd_bytes.sum()) < 0.95 * conditions.ssd_capacity_bytes:
            self._ssd_level = 0.0

        lacks = items.ssd_bytes[thinking] - has - items.coming_bytes[thinking]
        is_lacking = lacks > 0
        self._looks.plan(bool((candidate & is_lacking).any()), bool(self._hints.expected), now_s)
        wanted = (is_lacking & (items.in_use[thinking] == 0) & (fetch > self._level)).nonzero()[0]
        if not len(wanted):
            return []
        wanted = wanted[(-fetch[wanted]).argsort()]
        readable = self._reads.readable_bytes(conditions, 2 * self._looks.every_s)
        count = after = 0
        for score, lack in zip(fetch[wanted].tolist(), lacks[wanted].tolist(), strict=True):
            if after >= readable:
                break
            after += lack
            if after > free:  # Then an item must leave for it, after those that leave for the reads before.
                leaving = int(room.searchsorted(after))
                if self._lru.follows or leaving == len(leaves) or score <= leaves[leaving]:
                    break
            count += 1
        wanted = wanted[:count]
        return self._promotions_of(thinking[wanted], dense[0][wanted], fetch[wanted], now_s) if count else []

    @staticmethod
    def _level_at(wanted_bytes: float, free_bytes: int, room: Floats, leaves: Floats) -> float:
        """The score of the last item that must leave to free `wanted_bytes`."""
        if free_bytes >= wanted_bytes or not len(room):
            return 0.0
        return leaves.item(min(int(room.searchsorted(wanted_bytes)), len(leaves) - 1))

    @property
    def _returns_seen(self) -> int:
        return self._returns.survival.event_count + self._hints.calls_ended

    def _learn_if_due(self, thinking: Rows, now_s: float) -> None:
        seen = self._returns_seen
        if seen < self._learn_at:
            return
        least, most = _LEARN_RETURNS
        self._learn_at = seen + min(max(seen // _RELEARN_GROWTH, least), most)
        self._returns.learn(thinking, now_s)
        self._hints.learn(thinking, now_s)
        self._waits.learn()
        self._scores.learn()
