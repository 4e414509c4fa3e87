"""The end of a save: trailers, index records, then the blocks are visible; after that their copies on SSD.

Called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import numpy as np

from kvservice.blocks import NO_ROW, Extent, Rows
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.miss_reasons import Reason
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.tasks import LoopBudget, all_of
from kvservice.store.transfers.upload_state import Destination, UploadState, stored_rows
from kvservice.store.transfers.verification import Verification
from kvservice_api.errors import BlockNotFound, KVError, TierFull
from kvservice_api.image import Descriptor, Trailer, checksum, descriptor_offset, tenant_tag

_ROWS_A_TURN = 16  # With trailers of 128 layers they take half a millisecond of the event loop.


class Commits:
    """Ends the saves of all uploads."""

    def __init__(
        self,
        lifecycle: BlockLifecycle,
        evictor: Evictor,
        write_behind: WriteBehind | None,
        verification: Verification,
        clock: Clock,
        counters: Counters,
        loop_budget: LoopBudget,
        *,
        secret: bytes,
    ) -> None:
        """`secret` is for the tags of descriptors."""
        self._lifecycle = lifecycle
        self._blocks = lifecycle.blocks
        self._evictor = evictor
        self._write_behind = write_behind
        self._verification = verification
        self._clock = clock
        self._counters = counters
        self._loop_budget = loop_budget
        self._secret = secret

    async def store(
        self,
        state: UploadState,
        written: Sequence[Destination],
        *,
        are_verified: bool,
        on_ssd: bool,
        then_write: bool = True,
    ) -> None:
        """Make these destinations' blocks visible, and complete the upload's outcome.

        `are_verified` says that this daemon has computed the checksums from the bytes; `then_write` queues the blocks
        for their SSD copy, and `on_ssd` waits for it.
        """
        rows: list[int] = []
        try:
            for start in range(0, len(written), _ROWS_A_TURN):
                if start:
                    await self._loop_budget.slot()
                new = self._new_rows(state, written[start : start + _ROWS_A_TURN])
                # Until the end: a row that is discarded meanwhile may be another block's as soon as nothing holds it.
                self._lifecycle.hold(new)
                rows += new
            self._blocks.touch(np.array(rows, np.int64), self._clock.wall_ms())
            self._blocks.note_user(np.array(rows, np.int64), state.client.number)
            try:
                stored = await self._record(state, written, rows)
            except asyncio.CancelledError:
                if self._blocks.live[rows].any():  # The records were written before.
                    self._note_stored(state, written, rows, are_verified=are_verified, then_write=then_write)
                raise
            self._note_stored(state, written, stored, are_verified=are_verified, then_write=then_write)
            await self._touch_ancestors(state, written)
            if on_ssd:
                await self._until_on_ssd(state, written, stored)
        finally:
            self._lifecycle.unhold(rows)
        outcome = state.outcome
        for position, first in state.first_of.items():
            if first in outcome.refused:
                outcome.refused[position] = outcome.refused[first]
            else:
                outcome.already_stored.append(position)
        times = self._counters.save_times[state.path, "ssd" if on_ssd else "dram"]
        times.observe(self._clock.monotonic_s() - state.began_s)

    def note_refused(self, state: UploadState) -> None:
        """The history notes the refused blocks of an upload that has ended."""
        refused = state.outcome.refused
        for reason in {error.reason for error in refused.values()}:
            keys = [state.request.keys[position] for position, error in refused.items() if error.reason == reason]
            self._lifecycle.history.note_keys(keys, Reason.REFUSED, reason)

    def _new_rows(self, state: UploadState, written: Sequence[Destination]) -> list[int]:
        """Rows of the blocks, whose trailers are written."""
        blocks, request, now_ms = self._blocks, state.request, self._clock.wall_ms()
        rows: list[int] = []
        for destination in written:
            key = request.keys[destination.position]
            trailer = Trailer(key, request.shard, state.checksums[destination.position]).encode()
            assert destination.image is not None and destination.extent is not None
            destination.image[destination.geometry.trailer_offset :] = trailer
            parent_key = request.parent_keys[destination.position]
            if (offset := descriptor_offset(destination.geometry)) is not None:
                destination.image[offset : destination.geometry.trailer_offset] = Descriptor(
                    request.token_counts[destination.position],
                    parent_key,
                    request.layout.fingerprint,
                    tenant_tag(state.caller.tenant.name),
                    now_ms,
                    checksum(trailer),
                ).encode(trailer, self._secret)
            row = blocks.add(
                key,
                request.shard,
                parent_key=parent_key,
                layout_id=request.layout_id,
                tenant=state.caller.tenant.number,
                token_count=request.token_counts[destination.position],
                size_bytes=destination.geometry.image_bytes,
                trailer_checksum=checksum(trailer),
                now_ms=now_ms,
            )
            rows.append(row)
        return rows

    async def _record(self, state: UploadState, written: Sequence[Destination], rows: list[int]) -> list[int]:
        """Index records, then visible. Blocks of one save share a commit. Returns the rows, or none if it failed."""
        if not rows:
            return []
        extents: list[Extent] = []
        for destination in written:
            assert destination.extent is not None
            extents.append(destination.extent)
            destination.extent = destination.image = None  # From here on `admit` owns the space.
        try:
            await self._lifecycle.admit(rows, extents, self._evictor.make_room_in_index)
        except KVError as error:
            state.outcome.refused.update((destination.position, error) for destination in written)
            return []
        return rows

    def _note_stored(
        self,
        state: UploadState,
        written: Sequence[Destination],
        rows: list[int],
        *,
        are_verified: bool,
        then_write: bool,
    ) -> None:
        """The rows of these blocks are visible; no rows: the blocks were refused."""
        if rows:
            state.outcome.stored.extend(destination.position for destination in written)
        if are_verified:
            self._blocks.verified[rows] = True
        self._count(state, written)
        if self._write_behind is None:
            if not are_verified:
                self._verification.add(rows)
        elif then_write:
            self._write_behind.add(rows)  # It verifies them.

    async def _touch_ancestors(self, state: UploadState, written: Sequence[Destination]) -> None:
        """Mark the earlier blocks of each chain as used now, after its new ones: the first have the highest value."""
        blocks, request = self._blocks, state.request
        new_keys = {request.keys[each.position] for each in written}
        heads = [each.position for each in written if request.parent_keys[each.position] not in new_keys]
        for count, position in enumerate(heads):
            if count:  # A long chain takes a millisecond of the event loop.
                await self._loop_budget.slot()
            row = blocks.row_of(request.keys[position], request.shard)
            if row != NO_ROW:
                ancestors = np.array(blocks.ancestors(row)[::-1], np.int64)
                blocks.touch(ancestors, self._clock.wall_ms())
                blocks.note_user(ancestors, state.client.number)

    async def _until_on_ssd(self, state: UploadState, written: Sequence[Destination], rows: list[int]) -> None:
        """Wait for the SSD copies of the blocks that were stored now, and of those that other saves had stored."""
        outcome, lifecycle = state.outcome, self._lifecycle
        row_of = {destination.position: row for destination, row in zip(written, rows, strict=False)}
        row_of |= zip(outcome.already_stored, self._stored(state).tolist(), strict=True)
        held = [row for row in row_of.values() if row != NO_ROW]
        lifecycle.hold(held)
        try:
            errors = await all_of(self._written(row) for row in row_of.values())
        finally:
            lifecycle.unhold(held)
        outcome.refused |= {position: error for position, error in zip(row_of, errors, strict=True) if error}
        for done in (outcome.stored, outcome.already_stored):
            done[:] = [position for position in done if position not in outcome.refused]

    def _stored(self, state: UploadState) -> Rows:
        """The rows of the blocks that other saves had stored."""
        return stored_rows(self._blocks, state.request, state.outcome.already_stored)

    async def _written(self, row: int) -> KVError | None:
        """Wait for the row's SSD copy. Returns the reason if there will be none."""
        try:
            if row == NO_ROW:
                raise BlockNotFound("the block was stored before, and was dropped meanwhile")
            if self._write_behind is None:
                raise TierFull("this daemon has no SSD tier", tier="ssd")
            await self._write_behind.written(row)
        except KVError as error:
            return error
        return None

    def _count(self, state: UploadState, good: Sequence[Destination]) -> None:
        counters, outcome = self._counters, state.outcome
        stored = self._stored(state)
        self._blocks.note_user(stored[stored != NO_ROW], state.client.number)
        counters.save_blocks_stored += len(outcome.stored)
        counters.save_blocks_already_stored += len(outcome.already_stored)
        counters.save_blocks_refused += len(outcome.refused)
        stored_now = set(outcome.stored)
        geometries = {id(each.geometry): each.geometry for each in good}  # Blocks of as many tokens share one.
        counts = Counter(id(each.geometry) for each in good if each.position in stored_now)
        counters.save_bytes += sum(count * geometries[which].payload_bytes for which, count in counts.items())
        state.is_counted = True
        self.note_refused(state)
