"""Replays turns that read a path of shared prefixes: items in order, each a run of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvservice.placement.views import ints
from kvservice.simulate.settings import Machine
from kvservice.simulate.turn_replay import TurnReplay
from kvservice.simulate.workload import Workload


class PrefixReplay(TurnReplay):
    """`TurnReplay` of a workload of shared prefixes. A request's hit ends at the first block that no tier holds."""

    def _prepare(self, workload: Workload, machine: Machine) -> None:
        self._reports_answers = machine.reports_answers
        self._block_tokens = workload.block_tokens
        self._block_bytes = workload.block_tokens * machine.kv_bytes_per_token
        self._begins = ints(workload.path_begins)
        self._path = ints(workload.path_items)
        self._blocks = ints(workload.item_blocks)
        turns = np.repeat(np.arange(workload.turns, dtype=np.int32), np.diff(workload.path_begins))
        last = np.zeros(self._items.row_count, np.int32)
        np.maximum.at(last, workload.path_items, turns)
        self._last_turn = ints(last)
        self._numbers: dict[int, int] = {}  # By queued turn: its number.
        self._paths: dict[int, Sequence[int]] = {}  # By turn that waits or runs: its `rows`.
        self._items.value[:] = workload.item_blocks

    def rows(self, turn: int) -> Sequence[int]:
        """The rows on the request's path, from the first block on."""
        known = self._paths.get(turn)
        return self._path[self._begins[turn] : self._begins[turn + 1]].tolist() if known is None else known

    def enqueue(self, turn: int, number: int, now_s: float) -> None:
        """The request joins the queue as the `number`th of all requests."""
        self._numbers[turn] = number
        self._paths[turn] = path = self.rows(turn)
        self._core.queued(path, number, now_s)

    def dispatch(self, turn: int, now_s: float) -> int:
        """The request leaves the queue: count its hits per tier. Returns the bytes to read from SSD."""
        core, account, reading = self._core, self._account, self._core.reading
        path = self._paths[turn]
        all_blocks, uses, block_bytes = self._blocks, self._uses, self._block_bytes
        dram_bytes, ssd_bytes = self._dram, self._ssd
        total = known = on_time = late = ssd = 0
        hits = True
        core.hold(*path)
        for row in path:
            asked_for = row in reading
            if asked_for:
                self._store.stop_read(row)
            blocks = all_blocks[row]
            total += blocks
            if uses[row]:
                known += blocks
                if hits:
                    in_dram = dram_bytes[row] // block_bytes
                    on_ssd = ssd_bytes[row] // block_bytes - in_dram
                    on_time += in_dram
                    if on_ssd <= 0:
                        on_ssd = 0
                    else:
                        if asked_for:
                            late += on_ssd
                        else:
                            ssd += on_ssd
                        self._bypass[row] = not core.wants_in_dram(row, now_s)
                    hits = in_dram + on_ssd == blocks
            else:
                hits = False
        core.used(path, self._numbers.pop(turn), now_s)
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
        core, store = self._core, self._store
        path = self._paths.pop(turn)
        answer = self._output[turn] if self._reports_answers else 0  # New blocks are items of their own.
        blocks, block_bytes, sizes, last_turn = self._blocks, self._block_bytes, self._size, self._last_turn
        bypass, in_use, dram_bytes = self._bypass, self._in_use, self._dram
        for row in reversed(path):
            size = blocks[row] * block_bytes
            was = sizes[row]
            if last_turn[row] == turn:
                if was:
                    self._account.live(-was, now_s)
            elif not was:
                self._account.live(size, now_s)
            core.answered(row, answer, now_s)
            if bypass[row]:
                bypass[row] = False
                store.store_on_ssd(row, size, now_s)
            elif not in_use[row] or store.make_room(size - dram_bytes[row], now_s):
                core.saved(row, size, now_s)
        core.release(*path)
        core.stored(path, now_s)
        store.evict_to_capacity(now_s)
        if store.has_ssd:
            for row in path:
                store.write_behind(row)
