"""Drain: no new saves, what runs may end, and what only DRAM holds gets its copy on SSD.

Reads go on: an operator drains a daemon before its host is switched off, and its clients read until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from kvservice.blocks import BlockTable, Rows
from kvservice.clock import Clock
from kvservice.store.caller import Caller
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.tasks import Tasks
from kvservice.store.transfers.admission import Admission, Claims
from kvservice_api.errors import Draining

_LOOK_EVERY_S = 0.02
_REPORT_EVERY_S = 0.5
_ROWS_A_TURN = 1024


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """Counts of blocks, but for `only_in_dram_bytes`. `waiting_because` is why they are not written just now."""

    uploads: int
    loads: int
    only_in_dram: int
    only_in_dram_bytes: int
    unwritten: int  # Of those only in DRAM: still to be written. The policy wants no copy of the others.
    waiting_because: str
    done: bool


class Drain:
    """`is_draining` says that no save may begin."""

    def __init__(
        self,
        blocks: BlockTable,
        claims: Claims,
        admission: Admission,
        write_behind: WriteBehind | None,
        tasks: Tasks,
        clock: Clock,
    ) -> None:
        self._blocks = blocks
        self._claims = claims
        self._admission = admission
        self._write_behind = write_behind
        self._tasks = tasks
        self._clock = clock
        self._writing: asyncio.Task[None] | None = None
        self._stopping = False
        self.is_draining = False

    # When the daemon stops

    def begin_stop(self) -> None:
        """Refuse saves for good. What only DRAM holds stays there: it is found at the next start."""
        self.is_draining = self._stopping = True

    @property
    def word(self) -> str:
        """What the daemon is doing, while it drains."""
        return "stopping" if self._stopping else "draining"

    async def quiet(self) -> None:
        """Wait until no load and no save runs."""
        while self._admission.loads_open or self._claims.object_count:
            await self._clock.sleep(_LOOK_EVERY_S)

    # When an operator asks

    def begin(self, caller: Caller) -> None:
        """Refuse saves, and write what only DRAM holds once those that run have ended. Once more does no harm."""
        self.is_draining = True
        if self._writing is None or self._writing.done():
            self._writing = self._tasks.start(self._write_all(), "drain")

    def undo(self, caller: Caller) -> DrainProgress:
        """Take saves again; how far it had come. Raises Draining where the daemon itself is stopping."""
        if self._stopping:
            raise Draining("the daemon is stopping: that cannot be undone")
        self.is_draining = False
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None  # A drain that begins before it has ended starts another one.
        return self._progress(True)

    async def progress(self, caller: Caller) -> AsyncGenerator[DrainProgress, None]:
        """How far it is, about twice a second, and a last one with `done`; without, where it was undone."""
        while True:
            writing = self._writing
            if not self.is_draining or writing is None:
                yield self._progress(False)
                return
            done = writing.done()
            yield self._progress(done)
            if done:
                return
            with suppress(TimeoutError):
                async with self._clock.timeout(_REPORT_EVERY_S):
                    await asyncio.wait({writing})

    async def _write_all(self) -> None:
        while self._claims.object_count:
            await self._clock.sleep(_LOOK_EVERY_S)
        if self._write_behind is None:
            return
        rows = self._only_in_dram()
        for start in range(0, len(rows), _ROWS_A_TURN):  # Also those that failed before: they are tried at once.
            self._write_behind.add(rows[start : start + _ROWS_A_TURN].tolist())
            await asyncio.sleep(0)
        await self._write_behind.idle()

    def _only_in_dram(self) -> Rows:
        blocks = self._blocks
        first = blocks.first_tier
        return np.flatnonzero(blocks.resident(first) & ~blocks.resident_slower(first) & blocks.live[: blocks.row_end])

    def _progress(self, done: bool) -> DrainProgress:
        rows = self._only_in_dram()
        return DrainProgress(
            uploads=self._claims.object_count,
            loads=self._admission.loads_open,
            only_in_dram=len(rows),
            only_in_dram_bytes=int(self._blocks.size_bytes[rows].sum()),
            unwritten=0 if done or self._write_behind is None else self._write_behind.pending,
            waiting_because=self._write_behind.failing_because if self._write_behind is not None else "",
            done=done,
        )
