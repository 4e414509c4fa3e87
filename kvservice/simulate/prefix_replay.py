"""Replays turns that read a path of shared prefixes: items in order, each a run of blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from kvservice.policy.items import NOT_QUEUED
from kvservice.simulate.settings import Machine
from kvservice.simulate.turn_replay import TurnReplay
from kvservice.simulate.views import ints
from kvservice.simulate.workload import Workload


class PrefixReplay(TurnReplay):
    """`TurnReplay` of a workload of shared prefixes. A request's hit ends at the first block that no tier holds."""

    def _prepare(self, workload: Workload, machine: Machine) -> None:
        self._block_tokens = workload.block_tokens
        self._block_bytes = workload.block_tokens * machine.kv_bytes_per_token
        self._begins = ints(workload.path_begins)
        self._path = ints(workload.path_items)
        self._blocks = ints(workload.item_blocks)
        turns = np.repeat(np.arange(workload.turns, dtype=np.int32), np.diff(workload.path_begins))
        last = np.zeros(self._items.row_count, np.int32)
        np.maximum.at(last, workload.path_items, turns)
        self._last_turn = ints(last)
        self._later: dict[int, deque[int]] = {}  # By row: the queued requests for it after the first.
        self._numbers: dict[int, int] = {}  # By queued turn: its number.
        self._items.value[:] = workload.item_blocks

    def rows(self, turn: int) -> Sequence[int]:
        """The rows on the request's path, from the first block on."""
        return self._path[self._begins[turn] : self._begins[turn + 1]]

    def enqueue(self, turn: int, number: int, now_s: float) -> None:
        """The request joins the queue as the `number`th of all requests."""
        epoch, changed_epoch = self._store.row_epochs.epoch, self._store.changed_epoch
        self._numbers[turn] = number
        for row in self.rows(turn):
            if self._queue_seq[row] == NOT_QUEUED:
                self._queue_seq[row] = number
            else:
                self._later.setdefault(row, deque()).append(number)
            self._live[row] = True
            changed_epoch[row] = epoch
            if self._tells_queued:
                self._policy.queued(self._items, row, now_s)

    def dispatch(self, turn: int, now_s: float) -> int:
        """The request leaves the queue: count its hits per tier. Returns the bytes to read from SSD."""
        store, account, items = self._store, self._account, self._items
        path = self.rows(turn)
        queue_number = self._numbers.pop(turn)
        total = known = on_time = late = ssd = 0
        hits = True
        access = self._accesses + len(path)
        self._accesses = access
        epoch, changed_epoch = store.row_epochs.epoch, store.changed_epoch
        for row in path:
            asked_for = store.is_promoting(row)
            if asked_for:
                store.stop_promotion(row)
            changed_epoch[row] = epoch
            store.hold(row)
            blocks = self._blocks[row]
            uses = self._uses[row]
            total += blocks
            if uses:
                known += blocks
                if hits:
                    in_dram = self._dram[row] // self._block_bytes
                    on_ssd = max(0, self._ssd[row] // self._block_bytes - in_dram)
                    on_time += in_dram
                    if on_ssd:
                        if asked_for:
                            late += on_ssd
                        else:
                            ssd += on_ssd
                        if self._asks_dram:
                            self._bypass[row] = not self._policy.wants_in_dram(items, row, now_s)
                    hits = in_dram + on_ssd == blocks
            else:
                hits = False
            self._in_use[row] += 1
            self._uses[row] = uses + 1
            self._access_seq[row] = access
            access -= 1
            self._unwanted[row] = False
            store.mark_used(row)
            if self._tells_used:
                self._policy.used(items, row, now_s)
            self._unqueue(row, queue_number)
            self._hint[row] = 0
            self._ended[row] = False
        read = late + ssd
        number = account.dispatched
        account.history_tokens[number] = known * self._block_tokens
        account.missing_tokens[number] = (known - on_time - read) * self._block_tokens
        if number >= account.warmup_turns:
            account.units += total
            account.units_with_history += known
            account.turns_with_history += known > 0
            account.on_time += on_time
            account.late += late
            account.ssd += ssd
            account.miss += known - on_time - read
        return read * self._block_bytes

    def finish(self, turn: int, is_last: bool, now_s: float) -> None:
        """The answer has ended: store the path in DRAM, and evict to capacity."""
        store, items = self._store, self._items
        path = self.rows(turn)
        epoch, changed_epoch = store.row_epochs.epoch, store.changed_epoch
        for row in reversed(path):
            size = self._blocks[row] * self._block_bytes
            was = self._size[row]
            is_last = self._last_turn[row] == turn
            if is_last:
                if was:
                    self._account.live(-was, now_s)
            elif not was:
                self._account.live(size, now_s)
            others = self._in_use[row] = self._in_use[row] - 1
            changed_epoch[row] = epoch
            self._answer[row] = self._output[turn]
            self._used_at[row] = now_s
            if self._bypass[row]:
                self._bypass[row] = False
                store.store_on_ssd(row, size, now_s)
            elif not others or store.make_room(size - self._dram[row], now_s):
                store.grow(row, size, now_s)
        for row in path:
            store.release(row)
            if self._tells_stored:
                self._policy.stored(items, row, now_s)
        store.evict_to_capacity(now_s)
        for row in path:
            store.write_behind(row)

    def _unqueue(self, row: int, number: int) -> None:
        later = self._later.get(row)
        if later is None:
            self._queue_seq[row] = NOT_QUEUED
            return
        if number == self._queue_seq[row]:
            self._queue_seq[row] = later.popleft()
        else:
            later.remove(number)
        if not later:
            del self._later[row]
