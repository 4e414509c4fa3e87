"""What the daemon does because of hints: the paper's look-ahead window, in its simplest form.

Blocks that the requests at the heads of the queues will read are promoted in the order of these requests, and the
evictor takes other blocks before them. A policy over items decides itself: see `mover/active_policy.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.policy.base import Hint
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.promoter import Promoter
from kvservice.store.tasks import Tasks

_RATE_AT_START = float(1 << 30)  # Bytes per second, until a promotion was measured.
_RATE_WEIGHT = 0.3  # Of the newest measurement.
_AFTER_LOADS_S = 0.1  # Reads of loads that begin within this time are done before, also if a request is overdue.
_BURST_S = 1.0  # By how much the allowed rate may be exceeded, in bytes of so much time.
_NOTHING = np.empty(0, np.int64)
_PAUSE_S = 1.0  # After a promotion that DRAM had no space for.


class ExpectedRead(NamedTuple):
    """Rows that a request will read, the first block first, and when, by the daemon's monotonic clock."""

    rows: Rows
    due_s: float
    hint: Hint | None = None  # Why the request is expected, if it is in no queue yet,
    kind: int = 0  # and the tool's kind, see `hint_kind`.


class HintPlacement(Protocol):
    """Acts on hints. Everything that decides about placement because of hints is behind these five methods.

    Call them on the event loop's thread. None of them waits.
    """

    def want(self, wanted: Sequence[ExpectedRead], waiting: int) -> None:
        """The reads that are expected next, the most urgent first. Replaces those of the last call. All of them
        together fit into the share of DRAM that hints may use. In all, `waiting` requests are queued.
        """

    def coming_s(self, rows: Rows) -> float | None:
        """Seconds until rows that are not in DRAM will be there; None if some of them are not being promoted."""

    def not_needed(self, rows: Rows, *, write: bool) -> None:
        """No request is expected to read these rows again. Without `write`, those that are not on SSD need not be
        written there.
        """

    def answered(self, rows: Rows, answer_tokens: int) -> None:
        """A request has ended, with an answer of so many tokens. Its history ends with these rows, or continues."""

    def pause_over(self) -> bool:
        """Whether `want` may have an effect that it did not have at its last call, though nothing else changed."""


class WindowPromotion:
    """A HintPlacement over the promoter, for a policy that knows no queue."""

    def __init__(
        self,
        blocks: BlockTable,
        promoter: Promoter | None,
        evictor: Evictor,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        *,
        bytes_per_s_max: int,
    ) -> None:
        """`promoter` is None in a store with one tier. `bytes_per_s_max` 0: nothing is promoted."""
        self._blocks = blocks
        self._promoter = promoter
        self._evictor = evictor
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self._bytes_per_s_max = bytes_per_s_max
        self._awaited: Rows = _NOTHING
        self._plan: deque[tuple[Rows, NDArray[np.uint32], float]] = deque()  # Rows, their generations, when due.
        self._ahead_bytes: dict[int, int] = {}  # Row -> bytes of the plan up to its end.
        self._rate = min(_RATE_AT_START, float(bytes_per_s_max))
        self._is_running = False
        self._spent_until_s = 0.0  # What was promoted so far is allowed at this time.
        self._resumes_at_s = 0.0
        self._was_paused = False

    def want(self, wanted: Sequence[ExpectedRead], waiting: int) -> None:
        blocks = self._blocks
        self._plan.clear()
        self._ahead_bytes.clear()
        blocks.awaited[self._awaited] = False
        self._awaited = np.concatenate([_NOTHING, *(each.rows for each in wanted)])
        self._awaited = self._awaited[blocks.live[self._awaited]]
        blocks.awaited[self._awaited] = True
        blocks.rank_newest(self._awaited)  # The evictor drops them from its present list of victims.
        if not wanted:
            return
        self._was_paused = self._clock.monotonic_s() < self._resumes_at_s
        if self._promoter is None or not self._bytes_per_s_max or self._was_paused:
            return
        total = 0
        for rows, due_s, *_ in wanted:
            missing = rows[~blocks.lie_in(rows, blocks.first_tier)]
            if not len(missing):
                continue
            self._plan.append((missing, blocks.generation[missing], due_s))
            for row, size in zip(missing.tolist(), blocks.size_bytes[missing].tolist(), strict=True):
                if row not in self._ahead_bytes:
                    total += size
                    self._ahead_bytes[row] = total
        if self._plan and not self._is_running:
            self._is_running = True
            self._tasks.start(self._promote(self._promoter), "promotions for hints")

    def coming_s(self, rows: Rows) -> float | None:
        if self._promoter is None:
            return None
        ahead_bytes = 0
        for row in rows.tolist():
            ahead = self._ahead_bytes.get(row)
            if ahead is None:
                if not self._promoter.is_promoting(row):
                    return None
                ahead = int(self._blocks.size_bytes[row])
            ahead_bytes = max(ahead_bytes, ahead)
        return ahead_bytes / self._rate

    def not_needed(self, rows: Rows, *, write: bool) -> None:
        self._evictor.evict_first(rows)
        if not write:
            self._blocks.unwanted[1:, rows] = True

    def answered(self, rows: Rows, answer_tokens: int) -> None:
        pass  # It does not predict when users return.

    def pause_over(self) -> bool:
        return self._was_paused and self._clock.monotonic_s() >= self._resumes_at_s

    async def _promote(self, promoter: Promoter) -> None:
        """Promote the reads of the plan one after another, as it is when each begins."""
        try:
            while self._plan:
                missing, generations, due_s = self._plan.popleft()
                blocks = self._blocks
                same = blocks.live[missing] & (blocks.generation[missing] == generations)
                rows = missing[same & ~blocks.lie_in(missing, blocks.first_tier)]
                if len(rows) and not await self._promote_one(promoter, rows, due_s):
                    return
        finally:
            self._is_running = False

    async def _promote_one(self, promoter: Promoter, rows: Rows, due_s: float) -> bool:
        """Whether all of them are in DRAM now. If not, and if the rate is exceeded, the plan ends with a pause."""
        blocks, began_s = self._blocks, self._clock.monotonic_s()
        sizes = blocks.size_bytes[rows].copy()
        await promoter.promote(rows.tolist(), within_s=max(_AFTER_LOADS_S, due_s - began_s), wait=True)
        arrived = blocks.lie_in(rows, blocks.first_tier)
        blocks.hinted[rows[arrived]] = True
        promoted_bytes, now_s = int(sizes[arrived].sum()), self._clock.monotonic_s()
        self._counters.hint_promoted_blocks += int(arrived.sum())
        self._counters.hint_promoted_bytes += promoted_bytes
        if promoted_bytes and now_s > began_s:
            measured = promoted_bytes / (now_s - began_s)
            self._rate = min((1 - _RATE_WEIGHT) * self._rate + _RATE_WEIGHT * measured, self._bytes_per_s_max)
        self._spent_until_s = max(self._spent_until_s, began_s) + promoted_bytes / self._bytes_per_s_max
        if not arrived.all():
            self._pause(now_s + _PAUSE_S)
        elif self._spent_until_s > now_s + _BURST_S:
            self._pause(self._spent_until_s)
        return not self._was_paused

    def _pause(self, until_s: float) -> None:
        self._resumes_at_s, self._was_paused = until_s, True
        self._plan.clear()
        self._ahead_bytes.clear()
