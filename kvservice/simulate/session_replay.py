"""Replays turns of sessions: each turn reads its session's item, which grows by the request and the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvservice.policy.items import NOT_QUEUED
from kvservice.simulate.settings import Machine
from kvservice.simulate.turn_replay import TurnReplay
from kvservice.simulate.views import ints
from kvservice.simulate.workload import Workload


class SessionReplay(TurnReplay):
    """`TurnReplay` of a workload of sessions."""

    def _prepare(self, workload: Workload, machine: Machine) -> None:
        self._kv_bytes = machine.kv_bytes_per_token
        self._context = workload.context_tokens
        self._overflow_keeps = machine.overflow_keeps
        self._session = ints(workload.session)
        self._new = ints(workload.new_tokens)
        self._tokens = ints(np.zeros(self._items.row_count, np.int64))

    def rows(self, turn: int) -> Sequence[int]:
        """The row of the request's session."""
        return (self._session[turn],)

    def enqueue(self, turn: int, number: int, now_s: float) -> None:
        """The request joins the queue as the `number`th of all. A history that exceeds the window is truncated."""
        row = self._session[turn]
        history = self._tokens[row]
        if history and self._context and history + self._new[turn] > self._context:
            self._overflow(row, history, self._new[turn], now_s)
        self._queue_seq[row] = number
        self._live[row] = True
        self._store.changed_epoch[row] = self._store.row_epochs.epoch
        if self._tells_queued:
            self._policy.queued(self._items, row, now_s)

    def dispatch(self, turn: int, now_s: float) -> int:
        """The request leaves the queue: count its hits per tier. Returns the bytes to read from SSD."""
        store, account = self._store, self._account
        row = self._session[turn]
        uses = self._uses[row]
        asked_for = store.is_promoting(row)
        if asked_for:
            store.stop_promotion(row)
        store.changed_epoch[row] = store.row_epochs.epoch
        store.hold(row)
        history = self._tokens[row]
        size = history * self._kv_bytes
        dram = self._dram[row]
        ssd = self._ssd[row] - dram
        if ssd < 0:
            ssd = 0
        miss = size - dram - ssd
        number = account.dispatched
        account.history_tokens[number] = history
        account.missing_tokens[number] = miss // self._kv_bytes
        if number >= account.warmup_turns:
            account.units += 1
            if size:
                account.turns_with_history += 1
                account.units_with_history += 1
                if dram == size:
                    account.on_time += 1.0
                elif miss == size:
                    account.miss += 1.0
                else:
                    account.on_time += dram / size
                    account.miss += miss / size
                    if asked_for:
                        account.late += ssd / size
                    else:
                        account.ssd += ssd / size
        if ssd and self._asks_dram:
            self._bypass[row] = not self._policy.wants_in_dram(self._items, row, now_s)
        self._in_use[row] = 1
        self._uses[row] = uses + 1
        self._accesses += 1
        self._access_seq[row] = self._accesses
        self._unwanted[row] = False
        store.mark_used(row)
        if self._tells_used:
            self._policy.used(self._items, row, now_s)
        self._queue_seq[row] = NOT_QUEUED
        self._hint[row] = 0
        self._ended[row] = False
        return ssd

    def finish(self, turn: int, is_last: bool, now_s: float) -> None:
        """The answer has ended: store the item with its new tokens in DRAM, and evict to capacity."""
        store = self._store
        row = self._session[turn]
        output = self._output[turn]
        old = self._tokens[row] * self._kv_bytes
        tokens = self._tokens[row] + self._new[turn] + output
        size = tokens * self._kv_bytes
        self._tokens[row] = tokens
        self._answer[row] = output
        self._used_at[row] = now_s
        store.changed_epoch[row] = store.row_epochs.epoch
        self._account.live(-old if is_last else size - old, now_s)
        self._in_use[row] = 0
        if self._bypass[row]:
            self._bypass[row] = False
            store.store_on_ssd(row, size, now_s)
        else:
            store.grow(row, size, now_s)
        store.release(row)
        if self._tells_stored:
            self._policy.stored(self._items, row, now_s)
        store.evict_to_capacity(now_s)
        store.write_behind(row)

    def _overflow(self, row: int, history: int, new: int, now_s: float) -> None:
        """Cut half windows off the front until the request fits. Stops a running read or write of the item first."""
        store = self._store
        if store.is_promoting(row):
            store.stop_promotion(row)
        half = max(1, self._context // 2)
        cut = min(history, -(-(history + new - self._context) // half) * half)
        cut_bytes = cut * self._kv_bytes if self._overflow_keeps else self._size[row]
        left = history - cut
        self._account.live(-cut * self._kv_bytes, now_s)
        store.hold(row)
        store.cut_front(row, cut_bytes, now_s)
        self._size[row] = left * self._kv_bytes
        store.release(row)
        self._tokens[row] = left
