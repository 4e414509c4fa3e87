"""Replays turns on the store's model: the part that both kinds of workload share, with hints and expiry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from kvservice.placement.views import bools, ints
from kvservice.policy.base import Hint
from kvservice.policy.items import HINTS
from kvservice.simulate.account import Account
from kvservice.simulate.settings import Machine
from kvservice.simulate.store_model import StoreModel
from kvservice.simulate.workload import Workload


class TurnReplay(ABC):
    """Tells the placement core when a request is queued, dispatched or finished, and counts the hits."""

    def __init__(self, workload: Workload, machine: Machine, store: StoreModel, account: Account) -> None:
        self._core = store.core
        self._items = items = store.core.items
        self._store = store
        self._account = account
        self._output = ints(workload.output_tokens)
        self._bypass = bools(np.zeros(items.row_count, np.bool_))  # The policy does not want the item in DRAM.
        self._size = ints(items.size_bytes)
        self._dram = ints(items.dram_bytes)
        self._ssd = ints(items.ssd_bytes)
        self._in_use = ints(items.in_use)
        self._uses = ints(items.uses)
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
        kind, detail = kind % len(HINTS), kind // len(HINTS)
        self._core.hinted(self.rows(turn)[-1], Hint(HINTS[kind]), now_s, detail)

    def expire(self, turn: int, used_at_s: float, now_s: float) -> None:
        """Drop the items of `turn` that were not used after `used_at_s`, when its answer ended."""
        for row in reversed(self.rows(turn)):
            if self._core.is_idle_since(row, used_at_s):
                self._store.drop(row, now_s)
