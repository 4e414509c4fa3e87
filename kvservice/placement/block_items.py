"""The items of a block table and the requests for them, for one policy: events in, its decisions about blocks out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nsmallest
from itertools import islice

import numpy as np
import numpy.ma  # np.unique imports it, which must not fail later where no more files may be opened.
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.placement.item_tree import EVICTED, NO_ITEM, ItemTree
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.items import NOT_QUEUED, Conditions
from kvservice.policy.placement import Placement

_SETTLED = 2048
_GIVEN = 64  # Reads are given to the mover so many at a time: thousands may be wanted, and change often.
_REPORTED_WITHIN_S = 5.0  # After the end of an answer, an engine's report of its length counts.
_RATE_WEIGHT = 0.05  # Of the last request, in the mean time between two that leave a queue.


class BlockItems(ItemTree):
    """The policy is called for each event. Times are seconds of any one clock."""

    def __init__(self, policy: Placement, conditions: Conditions, row_capacity: int = 1024) -> None:
        super().__init__(policy, conditions, row_capacity)
        self.policy = policy
        self._answers: dict[int, int] = {}  # By item: the tokens of its last answer, as an engine has reported them.
        self._queue: list[int] = []  # Items that queued requests will read, in the order of the queue.
        self._wanted: dict[int, Promotion] = {}  # By item: the reads that the policy wants and that have not begun.
        self._wants_changed = False  # Since the last answer of `reads`.
        self._served_at_s = math.nan  # When a request was last served while others waited.

    def _was_split(self, item: int, front: int) -> None:
        if self.items.queue_seq[item] != NOT_QUEUED:
            self._queue.insert(self._queue.index(item), front)

    def _was_forgotten(self, item: int) -> None:
        self.unwant(item)
        self._answers.pop(item, None)
        if self.items.queue_seq[item] != NOT_QUEUED:
            self._queue.remove(item)
            self.items.queue_seq[item] = NOT_QUEUED

    # What is known

    def to_guess(self, rows: Rows) -> Rows:
        """Those of the rows that may be read to DRAM on a guess: not what a client has evicted from it."""
        may: Rows = rows[self._flags[rows] & EVICTED == 0]
        return may

    def known(self) -> tuple[int, int, int]:
        """How many items there are, and blocks in them, and items that queued requests will read."""
        items = len(self.live_items())
        return items, int(np.count_nonzero(self._item_of[: self._row_end] != NO_ITEM)), len(self._queue)

    def lowest(self, rows: Rows, tier: TierName, count_max: int, now_s: float) -> tuple[Rows, NDArray[np.float64]]:
        """Those of the rows that should leave `tier` first, the first one first, and the score of each one's item.

        The order is that of their items' scores; of one item, the end leaves before its front.
        """
        rows = rows[rows < self._row_end]
        items = self._item_of[rows]
        rows, items = rows[items != NO_ITEM], items[items != NO_ITEM]
        is_asked = np.zeros(self._end, np.bool_)
        is_asked[items] = True
        asked = np.flatnonzero(is_asked)
        score_of = np.zeros(self._end)
        score_of[asked] = self.policy.retention(self.items, asked, tier, now_s)
        scores = score_of[items]
        if len(rows) > count_max:
            few = scores <= np.partition(scores, count_max - 1)[count_max - 1]  # Of the last item, all: its end leaves.
            rows, scores, items = rows[few], scores[few], items[few]
        # Of items with equal scores, one that lies deeper in the tree leaves first.
        order = np.lexsort((-self._depth[rows], items, -self._depth[self._first_row[items]], scores))
        order = order[:count_max]
        return rows[order], scores[order]

    # Questions to the policy

    def reads(self, now_s: float, left: int = 0) -> list[Promotion] | None:
        """The most urgent reads that the policy wants and that have not begun. None if the `left` ones of the last
        answer, which the caller has not begun, are all or enough.

        A read stays wanted until it begins (`coming`), a guess also only until its deadline, and both until the item is
        used, leaves the queue, is evicted by a client, or is gone.
        """
        if now_s >= self.policy.look_at_s:
            late = [item for item, promotion in self._wanted.items() if promotion.deadline_s < now_s]
            for item in late:
                if self.items.queue_seq[item] == NOT_QUEUED:
                    self.unwant(item)  # The user was expected before now. The policy may want it again.
            for promotion in self.policy.promotions(self.items, self._queue, now_s):
                self._wanted[promotion.row] = promotion
                self._wants_changed = True
        needs_more = left < min(_GIVEN // 2, len(self._wanted))
        if not self._wants_changed and not needs_more:
            return None
        self._wants_changed = False
        return nsmallest(_GIVEN, self._wanted.values(), self._urgency)

    def _urgency(self, promotion: Promotion) -> tuple[bool, float]:
        return self.items.queue_seq.item(promotion.row) == NOT_QUEUED, promotion.deadline_s

    def unwant(self, item: int) -> None:
        """The caller of `reads` may not begin it any more."""
        if self._wanted.pop(item, None) is not None:
            self._wants_changed = True

    def _unwant_all(self, rows: Rows) -> None:
        if self._wanted:
            for item in np.unique(self._item_of[rows]).tolist():
                self.unwant(item)

    def wanted_on_ssd(self, rows: Rows, now_s: float) -> NDArray[np.bool_]:
        """Which of these blocks in DRAM are copied to SSD, for which other blocks are evicted there."""
        items = list(map(self.item_of, rows.tolist()))
        wanted = {item: item == NO_ITEM or item in self._unscored for item in items}
        for item, is_new in wanted.items():
            wanted[item] = is_new or self.policy.wants_on_ssd(self.items, item, now_s)
        return np.array([wanted[item] for item in items], np.bool_)

    # Events

    def looked_up(self, rows: Rows, now_s: float) -> None:
        """A request has found these blocks of a prefix, and is about to lease them."""
        self._now_s = now_s
        items, conditions = self.items, self.items.conditions
        self._flags[rows] &= ~EVICTED
        on_path = self._item_of[rows]
        firsts = np.flatnonzero(np.diff(on_path, prepend=NO_ITEM - 1))
        for item in reversed(on_path[firsts].tolist()):  # The front of a path counts as used last.
            if item == NO_ITEM or items.in_use[item]:
                continue  # A request that looks up twice, or in several processes, is one use.
            self._wake(item)
            self._wanted.pop(item, None)
            self._answers.pop(item, None)
            if items.queue_seq[item] == NOT_QUEUED:
                self._core.queued((item,), conditions.served, now_s)
            else:
                self._queue.remove(item)
            self._core.used((item,), items.queue_seq.item(item), now_s)
            items.answer_tokens[item] = 0
            self._stored[item] = None  # It may get no lease.
        conditions.served += 1
        self._measure_rate(now_s)

    def _measure_rate(self, now_s: float) -> None:
        """A request was served: how many a second leave a queue that is not empty."""
        conditions, since_s = self.items.conditions, self._served_at_s
        self._served_at_s = now_s if conditions.queued else math.nan
        if now_s > since_s:  # Requests waited since the last one was served.
            mean_s = 1 / conditions.turns_per_s or now_s - since_s
            conditions.turns_per_s = 1 / (mean_s + _RATE_WEIGHT * (now_s - since_s - mean_s))

    def leases_are(self, leases: NDArray[np.int32]) -> None:
        """The number of leases of each row at the beginning. Before all other events."""
        self._need_rows(len(leases))
        self._leases[: len(leases)] = leases

    def leased(self, rows: Rows) -> None:
        """A lease holds these blocks, once for each time that a row is named."""
        np.add.at(self._leases, rows, 1)

    def released(self, rows: Rows) -> None:
        """A lease of these blocks has ended, once for each time that a row is named."""
        np.subtract.at(self._leases, rows, 1)
        for item in np.unique(self._item_of[rows]).tolist():
            if item != NO_ITEM:
                self._stored[item] = None

    def settle(self, now_s: float) -> None:
        """Report to the policy the items whose requests have ended, or that have got blocks. Some at each call.

        An item that is still leased is reported once it is not.
        """
        self._now_s = now_s
        for item in list(islice(self._stored, _SETTLED)):
            del self._stored[item]
            if self._leases[self._first_row[item]]:
                continue  # `released` adds it again.
            if (answer_tokens := self._answers.pop(item, 0)) > 0:
                self.items.answer_tokens[item] = answer_tokens
            if self.items.in_use[item]:
                self._core.answered(item, self.items.answer_tokens.item(item), now_s)
            self.items.used_at_s[item] = now_s
            self._unscored.pop(item, None)
            self._core.stored((item,), now_s)
            if self._queue:
                self.ask_again(now_s)  # Its space may be for the next ones: an engine may wait for them to be read.
        if not self._stored:
            self._stored = {}  # A dict that was large stays so.
        if not self._unscored:
            self._unscored = {}

    def queued(self, requests: Sequence[Rows], waiting: int, now_s: float) -> None:
        """The blocks that the requests at the heads of the engines' queues will read, the next request first.

        It replaces those of the last call. `waiting` requests are queued in all.
        """
        self._now_s = now_s
        items, conditions = self.items, self.items.conditions
        before, queue = dict.fromkeys(self._queue), dict[int, int]()
        for number, rows in enumerate(requests):
            for item in dict.fromkeys(self._item_of[rows].tolist()):
                if item != NO_ITEM:
                    queue.setdefault(item, number)
        for item in before:
            if item not in queue:
                self.unwant(item)
                self._core.unqueued((item,), items.queue_seq.item(item), now_s)
                self._stored[item] = None  # It waits for its next request again.
        self._queue = list(queue)
        conditions.queued = waiting
        for item, number in queue.items():
            if item in before:
                items.queue_seq[item] = conditions.served + number
            else:
                self._core.queued((item,), conditions.served + number, now_s)

    def hinted(self, rows: Rows, hint: Hint, kind: int, now_s: float) -> None:
        """An application sent a hint about the session whose history ends with these blocks; see `hint_kind`."""
        self._now_s = now_s
        item = self.item_of(int(rows[-1])) if len(rows) else NO_ITEM
        if item != NO_ITEM:
            if hint is Hint.ENDED:
                self.unwant(item)
            self._core.hinted(item, hint, now_s, kind)

    def answered(self, rows: Rows, answer_tokens: int, now_s: float) -> None:
        """An engine has reported the length of an answer. The history ends with these blocks, or continues them."""
        item = self.item_of(int(rows[-1])) if len(rows) else NO_ITEM
        if item == NO_ITEM:
            return
        items = self.items
        ended_s = items.used_at_s.item(item)
        if item in self._stored or items.in_use[item]:
            self._answers[item] = answer_tokens
        elif items.queue_seq[item] == NOT_QUEUED and now_s - ended_s <= _REPORTED_WITHIN_S:
            items.answer_tokens[item] = answer_tokens
            self._core.stored((item,), ended_s)  # Its age stays.

    def evicted(self, rows: Rows) -> None:
        """A client has evicted these blocks from DRAM: they stay away until the next request for them."""
        self._unwant_all(rows)
        self._flags[rows] |= EVICTED

    def coming(self, rows: Rows, is_coming: bool) -> None:
        if is_coming and self._wanted:
            for item in np.unique(self._item_of[rows]).tolist():
                self._wanted.pop(item, None)
        super().coming(rows, is_coming)

    def ask_again(self, now_s: float) -> None:
        """The policy is asked for reads next time, whether it wants that or not."""
        self.policy.look_at_s = min(self.policy.look_at_s, now_s)
