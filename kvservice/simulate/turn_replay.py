"""What turns of both kinds of workload have in common: the items they read, hints about these, and expiry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from kvservice.policy.base import Hint
from kvservice.policy.items import HINTS, NOT_QUEUED, ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.account import Account
from kvservice.simulate.settings import Machine
from kvservice.simulate.store_model import StoreModel
from kvservice.simulate.tier_contents import overrides
from kvservice.simulate.views import bools, floats, ints
from kvservice.simulate.workload import Workload


class TurnReplay(ABC):
    """Keeps the item table as requests come, run and end, and tells the policy of it."""

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        policy: Placement,
        items: ItemTable,
        store: StoreModel,
        account: Account,
    ) -> None:
        self._items = items
        self._policy = policy
        self._store = store
        self._account = account
        self._output = ints(workload.output_tokens)
        self._bypass = bools(np.zeros(items.row_count, np.bool_))  # What was read gets no place in DRAM.
        self._size = ints(items.size_bytes)
        self._dram = ints(items.dram_bytes)
        self._ssd = ints(items.ssd_bytes)
        self._in_use = ints(items.in_use)
        self._access_seq = ints(items.access_seq)
        self._unwanted = bools(items.unwanted_on_ssd)
        self._used_at = floats(items.used_at_s)
        self._uses = ints(items.uses)
        self._answer = ints(items.answer_tokens)
        self._queue_seq = ints(items.queue_seq)
        self._hint = ints(items.hint)
        self._hinted_at = floats(items.hinted_at_s)
        self._ended = bools(items.ended)
        self._live = bools(items.live)
        self._accesses = 0
        self._asks_dram = overrides(policy, "wants_in_dram")
        self._tells_queued = overrides(policy, "queued")
        self._tells_used = overrides(policy, "used")
        self._tells_stored = overrides(policy, "stored")
        self._tells_hinted = overrides(policy, "hinted")

    @abstractmethod
    def rows(self, turn: int) -> Sequence[int]:
        """The rows by which the queue shows the request."""

    @abstractmethod
    def enqueue(self, turn: int, number: int, now_s: float) -> None:
        """The request waits now, as the `number`th of all that came."""

    @abstractmethod
    def dispatch(self, turn: int, now_s: float) -> int:
        """The request's turn has come: counts what is where. Returns the bytes to read from SSD."""

    @abstractmethod
    def finish(self, turn: int, is_last: bool, now_s: float) -> None:
        """The answer has ended: what was used is in DRAM, with what is new, and what is worth least leaves."""

    def hinted(self, turn: int, kind: int, now_s: float) -> None:
        """The session whose last request was `turn` sent a hint: it is about the last item, which is its own.

        One that comes after its next request says nothing.
        """
        row = self.rows(turn)[-1]
        if self._queue_seq[row] != NOT_QUEUED or self._in_use[row]:
            return
        self._hint[row] = kind
        self._hinted_at[row] = now_s
        self._ended[row] = HINTS[kind] == Hint.ENDED
        self._store.changed_epoch[row] = self._store.row_epochs.epoch
        if self._tells_hinted:
            self._policy.hinted(self._items, row, Hint(HINTS[kind]), now_s)

    def expire(self, turn: int, used_at_s: float, now_s: float) -> None:
        """Forget what nobody used since the answer of `turn`."""
        for row in reversed(self.rows(turn)):
            if self._used_at[row] <= used_at_s and self._queue_seq[row] == NOT_QUEUED and not self._in_use[row]:
                self._store.drop(row, now_s)
