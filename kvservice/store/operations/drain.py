"""Drain: refuses new saves, lets running ones end, and writes the blocks that are only in DRAM to SSD.

Loads continue: an operator drains a daemon before its host is switched off, and clients read until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from kvservice.blocks import BlockTable
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
    """Counts of blocks, except `only_in_dram_bytes`. `waiting_because` is why they cannot be written now."""

    uploads: int
    loads: int
    only_in_dram: int
    only_in_dram_bytes: int
    unwritten: int  # The part of those that is still to be written. The policy wants no copy of the others.
    waiting_because: str
    done: bool


class Drain:
    """While `is_draining`, no save may begin."""

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
        """Refuse saves permanently. Blocks that are only in DRAM stay there, unless `written` is called next."""
        self.is_draining = self._stopping = True

    @property
    def state_name(self) -> str:
        """The daemon's state: serving, draining or stopping."""
        if self._stopping:
            return "stopping"
        return "draining" if self.is_draining else "serving"

    async def quiet(self) -> None:
        """Wait until no load and no save runs."""
        while self._admission.loads_open or self._claims.object_count:
            await self._clock.sleep(_LOOK_EVERY_S)

    async def written(self) -> int:
        """Write the blocks that are only in DRAM, and wait for that. A failing SSD makes it wait until that ends.

        Returns how many could not be written, because there is no SSD tier or it has no space for them.
        """
        await self._write_all()
        return len(self._blocks.only_in(self._blocks.first_tier))

    # When an operator asks

    def begin(self, caller: Caller) -> None:
        """Refuse saves, and after the end of running ones write the blocks that are only in DRAM. Idempotent."""
        self.is_draining = True
        if self._writing is None or self._writing.done():
            self._writing = self._tasks.start(self._write_all(), "drain")

    def undo(self, caller: Caller) -> DrainProgress:
        """Accept saves again. Returns the progress. Raises Draining if the daemon itself is stopping."""
        if self._stopping:
            raise Draining("the daemon is stopping: that cannot be undone")
        self.is_draining = False
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None  # A drain that begins before this task has ended starts another task.
        return self._progress(True)

    async def progress(self, caller: Caller) -> AsyncGenerator[DrainProgress, None]:
        """The progress, about twice per second; the last one has `done`, unless the drain was undone. The drain
        continues if this is closed early.
        """
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
        await self._write_behind.add_all(ask=False)
        await self._write_behind.idle()

    def _progress(self, done: bool) -> DrainProgress:
        rows = self._blocks.only_in(self._blocks.first_tier)
        return DrainProgress(
            uploads=self._claims.object_count,
            loads=self._admission.loads_open,
            only_in_dram=len(rows),
            only_in_dram_bytes=int(self._blocks.size_bytes[rows].sum()),
            unwritten=0 if done or self._write_behind is None else self._write_behind.pending,
            waiting_because=self._write_behind.failing_because if self._write_behind is not None else "",
            done=done,
        )
