"""Pins: an operator's timed requests to keep blocks. They are in the index, so they outlive the daemon.

A pinned block keeps one copy: its copy on SSD is not evicted, nor the one in DRAM if it is the only one. A pin ends at
its time by the wall clock, by `unpin`, when the block is discarded, and when its bytes are found damaged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvservice.blocks import NO_ROW, BlockTable, Rows
from kvservice.clock import Clock
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.mover.write_behind import WriteBehind
from kvservice_api.errors import InvalidRequest, KVError, PinsFull

PIN_KEYS_MAX = 4096  # In one call.
_ROWS_A_TURN = 128  # They take a millisecond of the event loop.
_ROWS_BEFORE_A_THREAD = 20_000


class PinOutcome(NamedTuple):
    """Counts of objects (`pinned`) and of keys (`missing`); bytes of all pinned blocks, and their limit."""

    pinned: int
    missing: int
    until_ms: int
    pinned_bytes: int
    pinned_bytes_max: int


class UnpinOutcome(NamedTuple):
    """Counts of objects, and of keys (`missing`)."""

    unpinned: int
    not_pinned: int
    missing: int


class Pins:
    def __init__(
        self,
        lifecycle: BlockLifecycle,
        write_behind: WriteBehind | None,
        clock: Clock,
        *,
        ttl_max_s: float,
        fraction_max: float,
    ) -> None:
        self._lifecycle = lifecycle
        self._blocks: BlockTable = lifecycle.blocks
        self._write_behind = write_behind
        self._clock = clock
        self._ttl_max_ms = int(ttl_max_s * 1000)
        self._fraction_max = fraction_max
        self._pinning = asyncio.Lock()
        # Otherwise, after the clock was set back, pins of an earlier daemon could last for years.
        latest = np.uint64(clock.wall_ms() + self._ttl_max_ms)
        used = slice(self._blocks.row_end)
        self._blocks.pinned_until_ms[used] = np.minimum(self._blocks.pinned_until_ms[used], latest)

    async def pin(self, caller: Caller, keys: Sequence[bytes], ttl_ms: int) -> PinOutcome:
        """Pin these blocks for `ttl_ms` from now, instead of their earlier pins; all of them or none.

        Returns once the records are committed. Keys without a stored block are counted. Raises InvalidRequest,
        PinsFull, StorageFailed, IndexFull; then nothing has changed.
        """
        if not 0 < ttl_ms <= self._ttl_max_ms:
            raise InvalidRequest(
                f"a pin of {ttl_ms / 1000:.15g} s is not granted; it must last more than 0 s, "
                f"and at most {self._ttl_max_ms / 1000:.15g} s",
                field="ttl_ms",
            )
        async with self._pinning:  # Two pins at a time would each count the same free space.
            asked, _ = self._rows(keys)
            pinned_bytes, pinned_bytes_max = await self._bounded(asked)
            await asyncio.sleep(0)  # Thousands of keys take a millisecond each time.
            rows, missing = self._rows(keys)
            rows = rows[np.isin(rows, asked)]  # The blocks that are still stored.
            until_ms = self._clock.wall_ms() + ttl_ms
            await self._set(rows, until_ms)
        await self._write_soon(rows)
        return PinOutcome(len(rows), missing, until_ms, pinned_bytes, pinned_bytes_max)

    async def unpin(self, caller: Caller, keys: Sequence[bytes]) -> UnpinOutcome:
        """End pins before their time. Returns once the records are committed. Raises StorageFailed, IndexFull."""
        rows, missing = self._rows(keys)
        pinned = rows[self._blocks.pinned_until_ms[rows] > self._clock.wall_ms()]
        await self._set(rows, 0)  # Also for rows without a pin: their record may still have an old one.
        return UnpinOutcome(len(pinned), len(rows) - len(pinned), missing)

    def _rows(self, keys: Sequence[bytes]) -> tuple[Rows, int]:
        first = self._blocks.rows_of_keys(list(dict.fromkeys(keys)))
        shards, rows = [], first[first != NO_ROW]
        while len(rows):
            shards.append(rows)
            following = self._blocks.next_shard[rows]
            rows = following[following != NO_ROW]
        return np.concatenate([*shards, rows]), int((first == NO_ROW).sum())

    async def _bounded(self, rows: Rows) -> tuple[int, int]:
        """The bytes that all pinned blocks take with these, and their limit. Raises PinsFull."""
        blocks = self._blocks
        mask = blocks.pinned(self._clock.wall_ms())
        mask[rows] = True
        pinned = np.flatnonzero(mask)
        in_thread = len(pinned) > _ROWS_BEFORE_A_THREAD
        sizes = await asyncio.to_thread(_sizes, blocks, pinned) if in_thread else _sizes(blocks, pinned)
        taken = max_bytes = 0
        for tier, taken in zip(blocks.tiers, sizes, strict=True):
            max_bytes = int(self._fraction_max * self._lifecycle.tiers[tier].capacity_bytes)
            if taken > max_bytes:
                raise PinsFull(
                    f"pinned blocks would take {taken} bytes of the {tier} tier, and may take {max_bytes}", tier=tier
                )
        return taken, max_bytes

    async def _set(self, rows: Rows, until_ms: int) -> None:
        """Set pins in the block table and in the records. If the index refuses, the table is restored."""
        blocks = self._blocks
        before, generations = blocks.pinned_until_ms[rows], blocks.generation[rows]
        blocks.pinned_until_ms[rows] = until_ms
        try:
            for start in range(0, len(rows), _ROWS_A_TURN):
                await asyncio.sleep(0)  # What came before has taken a turn of its own.
                await self._lifecycle.write_records(rows[start : start + _ROWS_A_TURN].tolist())
        except BaseException as error:
            ours = (blocks.generation[rows] == generations) & (blocks.pinned_until_ms[rows] == until_ms)
            if isinstance(error, KVError):
                blocks.pinned_until_ms[rows[ours]] = before[ours]
            blocks.used_since_flush[rows[ours]] = True  # Some records may be on disk; the next flush corrects them.
            raise

    async def _write_soon(self, rows: Rows) -> None:
        """Request the SSD copy that a pinned block keeps, also if the policy had evicted it from there."""
        if self._write_behind is None:
            return
        blocks = self._blocks
        for start in range(0, len(rows), _ROWS_A_TURN):
            if start:
                await asyncio.sleep(0)
            part = rows[start : start + _ROWS_A_TURN]
            last_copies = part[blocks.live[part] & (blocks.tier_sets(part) == 1)]  # Only the first tier has them.
            blocks.unwanted_on_ssd[last_copies] = False
            self._write_behind.add(last_copies.tolist(), ask=False)


def _sizes(blocks: BlockTable, rows: Rows) -> list[int]:
    """Per tier, the bytes of those blocks that no slower tier has: their pins keep them there, or above.

    For any number of blocks.
    """
    rows = rows[blocks.live[rows]]
    sizes = blocks.size_bytes[rows]
    tiers = blocks.tier_sets(rows)
    return [int(sizes[tiers < 2 << position].sum()) for position in range(len(blocks.tiers))]
