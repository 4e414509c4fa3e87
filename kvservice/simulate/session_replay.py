"""Replays turns of sessions: each turn reads its session's item, which grows by the request and the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvservice.placement.views import ints
from kvservice.simulate.settings import Machine
from kvservice.simulate.turn_replay import TurnReplay
from kvservice.simulate.workload import Workload


class SessionReplay(TurnReplay):
    """`TurnReplay` of a workload of sessions."""

    def _prepare(self, workload: Workload, machine: Machine) -> None:
        self._kv_bytes = machine.kv_bytes_per_token
        self._context = workload.context_tokens
        self._overflow_keeps = machine.overflow_keeps
        self._reports_answers = machine.reports_answers
        self._session = ints(workload.session)
        self._new = ints(workload.new_tokens)
        self._queue_seq = ints(self._items.queue_seq)
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
        self._core.queued((row,), number, now_s)

    def dispatch(self, turn: int, now_s: float) -> int:
        """The request leaves the queue: count its hits per tier. Returns the bytes to read from SSD."""
        core, account = self._core, self._account
        row = self._session[turn]
        asked_for = row in core.reading
        if asked_for:
            self._store.stop_read(row)
        core.hold(row)
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
        if ssd:
            self._bypass[row] = not core.wants_in_dram(row, now_s)
        core.used((row,), self._queue_seq[row], now_s)
        return ssd

    def finish(self, turn: int, is_last: bool, now_s: float) -> None:
        """The answer has ended: store the item with its new tokens in DRAM, and evict to capacity."""
        core, store = self._core, self._store
        row = self._session[turn]
        output = self._output[turn]
        old = self._tokens[row] * self._kv_bytes
        tokens = self._tokens[row] + self._new[turn] + output
        size = tokens * self._kv_bytes
        self._tokens[row] = tokens
        self._account.live(-old if is_last else size - old, now_s)
        if self._reports_answers:
            core.answered(row, output, now_s)
        else:  # The daemon counts what the request adds to a history that it has; of a first request it knows nothing.
            core.answered(row, self._new[turn] + output if old else 0, now_s)
        if self._bypass[row]:
            self._bypass[row] = False
            store.store_on_ssd(row, size, now_s)
        else:
            core.saved(row, size, now_s)
        core.release(row)
        core.stored((row,), now_s)
        store.evict_to_capacity(now_s)
        store.write_behind(row)

    def _overflow(self, row: int, history: int, new: int, now_s: float) -> None:
        """Cut half windows off the front until the request fits. Stops a running read or write of the item first."""
        core = self._core
        if row in core.reading:
            self._store.stop_read(row)
        half = max(1, self._context // 2)
        cut = min(history, -(-(history + new - self._context) // half) * half)
        cut_bytes = cut * self._kv_bytes if self._overflow_keeps else self._size[row]
        left = history - cut
        self._account.live(-cut * self._kv_bytes, now_s)
        core.hold(row)
        self._store.cut_front(row, cut_bytes)
        core.resized(row, left * self._kv_bytes)
        core.release(row)
        self._tokens[row] = left
