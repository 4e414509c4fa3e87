"""Replays turns on the store's model: the part that both kinds of workload share, with hints and expiry."""

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
    """Updates the item table when a request is queued, dispatched or finished, and calls the policy."""

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
        self._bypass = bools(np.zeros(items.row_count, np.bool_))  # The policy does not want the item in DRAM.
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
        self._prepare(workload, machine)

    @abstractmethod
    def _prepare(self, workload: Workload, machine: Machine) -> None:
        """Make the further state of this kind of workload."""

    @abstractmethod
    def rows(self, turn: int) -> Sequence[int]:
        """The rows that the request reads, in the order of its tokens."""

    @abstractmethod
    def enqueue(self, turn: int, number: int, now_s: float) -> None:
        """The request joins the queue as the `number`th of all requests."""

    @abstractmethod
    def dispatch(self, turn: int, now_s: float) -> int:
        """The request leaves the queue: count its hits per tier. Returns the bytes to read from SSD."""

    @abstractmethod
    def finish(self, turn: int, is_last: bool, now_s: float) -> None:
        """The answer has ended: store the items, old and new tokens, in DRAM, and evict to capacity."""

    def hint(self, turn: int, kind: int, now_s: float) -> None:
        """The session whose last request was `turn` sends a hint about its last item, which no other session has.

        `kind` is as in `Hints`. A hint after the session's next request is ignored.
        """
        row = self.rows(turn)[-1]
        if self._queue_seq[row] != NOT_QUEUED or self._in_use[row]:
            return
        kind, detail = kind % len(HINTS), kind // len(HINTS)
        self._hint[row] = kind
        self._hinted_at[row] = now_s
        self._ended[row] = HINTS[kind] == Hint.ENDED
        self._store.changed_epoch[row] = self._store.row_epochs.epoch
        if self._tells_hinted:
            self._policy.hinted(self._items, row, Hint(HINTS[kind]), now_s, detail)

    def expire(self, turn: int, used_at_s: float, now_s: float) -> None:
        """Drop the items of `turn` that were not used after `used_at_s`, when its answer ended."""
        for row in reversed(self.rows(turn)):
            if self._used_at[row] <= used_at_s and self._queue_seq[row] == NOT_QUEUED and not self._in_use[row]:
                self._store.drop(row, now_s)
