"""The places of leased blocks in the arena, for clients that read them in place.

As a load, it promotes blocks that only SSD has, and keeps all rows in their place while it is open. It reads no bytes
itself, unless the client requests that blocks are verified first that were not verified since the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.leases import Lease
from kvservice.store.mover.pending_promotion import PendingPromotion
from kvservice.store.mover.promoter import Promoter
from kvservice.store.transfers.load_times import InPlacePath, LoadTimes, bytes_per_token
from kvservice.store.transfers.verification import Verification
from kvservice.tiers.dram import DramTier
from kvservice_api.errors import KVError, LeaseExpired, NotShared

_ROWS_A_TURN = 256
_REPORT_S = 0.02  # While bytes arrive, clients get an answer this often: one without an answer assumes a hang.


@dataclass(frozen=True, slots=True)
class Located:
    """Blocks in the arena, or being promoted to it; one entry per block.

    `offsets` are those of the images, in bytes. `trailer_checksums` are u64, `token_counts` u32, `shards` the stored
    shards as the block table has them.
    """

    rows: Rows
    offsets: NDArray[np.int64]
    generations: list[int]
    trailer_checksums: NDArray[np.uint64]
    token_counts: NDArray[np.uint32]
    shards: NDArray[Any]


@dataclass(frozen=True, slots=True)
class NotInPlace:
    """The blocks must be loaded by stream."""

    why: str


class InPlaceReads:
    """Locates blocks in the arena, and holds them while a client reads there."""

    def __init__(
        self,
        lifecycle: BlockLifecycle,
        dram: DramTier,
        promoter: Promoter | None,
        clock: Clock,
        counters: Counters,
        verification: Verification,
    ) -> None:
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._dram = dram
        self._promoter = promoter
        self._clock = clock
        self._counters = counters
        self._verification = verification

    def at_hand(self, lease: Lease) -> Located | None:
        """The places of all blocks of a lease, which keeps them there. None if they cannot be read in place without a
        promotion. Takes 0.1 ms for 512 blocks.
        """
        rows = lease.rows
        if lease.parts or self._dram.arena.not_shared_because:
            return None
        offsets = self._blocks.offset[0][rows]
        if (offsets < 0).any():  # It has no copy there.
            return None
        return self._located(rows, offsets, in_place=True)

    def are_verified(self, rows: Rows) -> bool:
        """Whether all of these blocks, which are in DRAM, were verified since the start."""
        return bool(self._blocks.verified[rows].all())

    def note_load(self, lease: Lease, blocks: range, took_s: float) -> None:
        """Count a load that a client made from the places that `at_hand` returned. 0 seconds: it took a view."""
        self._count(lease, lease.rows[blocks.start : blocks.stop], "in_place")
        labels = "in_place", self._blocks.first_tier
        self._counters.first_layer_times[labels].observe(0.0)  # All layers were in memory when it began.
        if took_s:
            self._counters.load_times[labels].observe(took_s)

    def _located(self, rows: Rows, offsets: NDArray[np.int64], *, in_place: bool) -> Located:
        table = self._blocks
        return Located(
            rows,
            offsets,
            self._dram.generations(offsets) if in_place else [],
            table.trailer_checksum[rows],
            table.token_count[rows],
            table.shard[rows],
        )

    async def run(
        self, caller: Caller, lease: Lease, blocks: range, *, verify: bool, path: InPlacePath
    ) -> AsyncGenerator[Located | NotInPlace | int, None]:
        """First the places, then the number of layers that are ready: 0 if none is yet, until all are; also the same
        number again while bytes arrive. After that it yields nothing; the rows stay in their place until this is
        closed, or the client disconnects.

        Raises NotShared, LeaseExpired; ChecksumMismatch or StorageFailed, with the block's position in the lease as the
        detail `block`.
        """
        if path == "in_place" and (why := self._dram.arena.not_shared_because):
            raise NotShared(f"blocks cannot be read in place: {why}")
        if any(block in lease.parts for block in blocks):
            yield NotInPlace("several shards make up a block")
            return
        rows = lease.rows[blocks.start : blocks.stop]
        times = LoadTimes(self._blocks, lease, blocks, rows, self._clock, self._counters, path)
        is_located = False
        promotions: dict[int, PendingPromotion] = {}
        held = AsyncExitStack()
        left = asyncio.Event()
        lease.client.on_detach.add(left.set)
        self._lifecycle.hold(rows)
        try:
            try:
                missing = rows[~self._blocks.lie_in(rows, self._blocks.first_tier)].tolist()
                if missing and self._promoter is not None:
                    promotions = await held.enter_async_context(self._promoter.promoting(missing))
                if verify:
                    await self._verification.verify(rows)
                offsets = await self._offsets(rows, promotions)
                if isinstance(offsets, NotInPlace):
                    yield offsets
                    return
                yield self._located(rows, offsets, in_place=path == "in_place")
                async for ready in self._layers(lease, promotions):
                    if ready:
                        times.first_layer()
                        times.layers_ready(ready)
                    if ready == lease.shard.layers:  # Before the client reads them, after which it may end the call.
                        is_located = True
                        self._count(lease, rows, path)
                    yield ready
            except KVError as error:
                self._counters.loads_failed += 1
                raise lease.placed(error, self._blocks) from error
            await left.wait()  # Or until this is closed. The blocks stay in their place meanwhile.
            raise LeaseExpired("the client's Attach stream has ended, and its leases with it")
        finally:
            if is_located:
                times.ended()
            await held.aclose()
            lease.client.on_detach.discard(left.set)
            self._lifecycle.unhold(rows)

    def _count(self, lease: Lease, rows: Rows, path: InPlacePath) -> None:
        tokens = int(self._blocks.token_count[rows].sum())
        size_bytes = tokens * bytes_per_token(lease.layout, lease.shard)
        if path == "cuda_ipc":
            self._counters.device_blocks += len(rows)
            self._counters.device_tokens += tokens
            self._counters.device_bytes += size_bytes
            return
        self._counters.located_blocks += len(rows)
        self._counters.located_tokens += tokens
        self._counters.located_bytes += size_bytes

    async def _offsets(self, rows: Rows, promotions: dict[int, PendingPromotion]) -> NDArray[np.int64] | NotInPlace:
        offsets = np.empty(len(rows), np.int64)
        for count, row in enumerate(rows.tolist()):
            if count % _ROWS_A_TURN == _ROWS_A_TURN - 1:
                await asyncio.sleep(0)
            pending = promotions.get(row)
            extent = self._blocks.extent(row, self._blocks.first_tier) if pending is None else pending.extent
            if extent is None:
                if self._blocks.fastest(row) is None:
                    key = self._blocks.key_of(row).hex()
                    raise LeaseExpired("a block was removed before its load began: look the prefix up again", key=key)
                return NotInPlace("DRAM has no space for a block")
            offsets[count] = extent.offset_bytes
        return offsets

    async def _layers(self, lease: Lease, promotions: dict[int, PendingPromotion]) -> AsyncGenerator[int, None]:
        wanted = lease.shard
        if promotions:
            yield 0
        reported_s, ready = self._clock.monotonic_s(), 0
        begins = [wanted.layer_begin - int(self._blocks.layer_begin[row]) for row in promotions]
        parts = list(zip(promotions.values(), begins, strict=True))
        while promotions and ready < wanted.layers:
            for pending, begin in parts:
                # Also while the disk reads for other promotions that were begun before.
                while not pending.is_ready(begin + ready):
                    assert self._promoter is not None
                    await self._promoter.progress(pending)
                    if (now_s := self._clock.monotonic_s()) - reported_s >= _REPORT_S:
                        reported_s = now_s
                        yield ready
            # Layers that came together are reported together.
            ready = min(wanted.layers, *(pending.ready_until(begin + ready) - begin for pending, begin in parts))
            yield ready
        if not promotions:
            yield wanted.layers
