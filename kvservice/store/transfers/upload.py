"""The save path: claim the blocks, reserve destinations for their bytes, write them, commit or abandon.

No byte of an upload is visible before its commit, and an upload that ends without a commit leaves nothing. The order of
a commit: bytes are complete and match the client's checksums, the trailer, the index record; then the blocks are
visible.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, BlockTable, Extent, object_key
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.miss_reasons import Reason, SpaceFor
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.tasks import LoopBudget, all_of
from kvservice.store.transfers.admission import Admission, Claim, Claims
from kvservice.tiers.dram import DramTier
from kvservice_api.errors import (
    BlockNotFound,
    IncompleteSave,
    InvalidFrame,
    InvalidRequest,
    KVError,
    Overloaded,
    TierFull,
    UploadCorrupted,
)
from kvservice_api.frames import Frame
from kvservice_api.image import (
    BlockGeometry,
    Descriptor,
    Trailer,
    block_geometry,
    checksum,
    descriptor_offset,
    layer_starts,
    tenant_tag,
)
from kvservice_api.layout import Layout, Shard

_HASH_IN_THREAD_BYTES = 1 << 20  # Below this size, hashing is faster than the hand-over to a thread.
_RESERVED_A_TURN = 64  # They take a millisecond of the event loop.


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """The blocks of a save, of one or more chains. A block that several of these have appears once for each."""

    layout_id: int
    layout: Layout
    shard: Shard
    parent_keys: Sequence[bytes]  # Of each block.
    keys: Sequence[bytes]
    token_counts: Sequence[int]


@dataclass(slots=True)
class SaveOutcome:
    """How a save ended, by position in its keys."""

    stored: list[int] = field(default_factory=list)
    already_stored: list[int] = field(default_factory=list)
    refused: dict[int, KVError] = field(default_factory=dict)


class _Slices:
    """Which bytes of one block's slices have arrived. Frames may arrive in any order, none twice."""

    def __init__(self, geometry: BlockGeometry) -> None:
        self._geometry = geometry
        self._complete = bytearray(geometry.slice_count)
        # Per incomplete slice: sorted, never adjacent. Complete slices have no objects, whose release would take time.
        self._runs: dict[int, list[tuple[int, int]]] = {}
        self.missing = geometry.slice_count

    def add(self, layer: int, start: int, end: int) -> bool:
        """Note a part of a slice. True when the slice is now complete. Raises InvalidFrame on overlap."""
        if self._complete[layer]:
            raise InvalidFrame(f"bytes {start}..{end} of layer {layer} arrived before", layer=layer)
        whole = (0, self._geometry.slice_bytes(layer))
        runs = self._runs.setdefault(layer, []) if (start, end) != whole else self._runs.get(layer, [])
        at = bisect_left(runs, (start, end))
        if (at and runs[at - 1][1] > start) or (at < len(runs) and runs[at][0] < end):
            raise InvalidFrame(f"bytes {start}..{end} of layer {layer} arrived before", layer=layer)
        joins_before = at > 0 and runs[at - 1][1] == start
        joins_after = at < len(runs) and runs[at][0] == end
        run = (runs[at - 1][0] if joins_before else start, runs[at][1] if joins_after else end)
        if run != whole:
            runs[at - joins_before : at + joins_after] = [run]
            return False
        self._runs.pop(layer, None)
        self._complete[layer] = True
        self.missing -= 1
        return True


class Place(NamedTuple):
    """The offset of a block's image in the arena."""

    position: int  # Its position in the save's keys.
    extent: Extent


class Space(Protocol):
    """The handling of an upload's space: a client that writes in place may still be writing there."""

    def reserved(self, extent: Extent) -> None:
        """The upload owns it from now on."""

    def returned(self, extent: Extent) -> None:
        """The upload does not need it any more, and no record has ever named it."""

    def recorded(self, extent: Extent) -> None:
        """A record is about to name it."""


class OwnSpace:
    """Space that only the daemon writes: it is free at once."""

    def __init__(self, dram: DramTier) -> None:
        self._dram = dram

    def reserved(self, extent: Extent) -> None:
        pass

    def returned(self, extent: Extent) -> None:
        self._dram.release(extent)

    def recorded(self, extent: Extent) -> None:
        pass


@dataclass(slots=True, eq=False)
class _Destination:
    """The destination of one block's bytes, once it has space."""

    position: int
    claim: Claim
    geometry: BlockGeometry
    slices: _Slices
    extent: Extent | None = None
    image: memoryview | None = None


class Uploads:
    """All running saves, and their shared state."""

    def __init__(
        self,
        lifecycle: BlockLifecycle,
        evictor: Evictor,
        dram: DramTier,
        write_behind: WriteBehind | None,
        clock: Clock,
        counters: Counters,
        loop_budget: LoopBudget,
        admission: Admission,
        *,
        wait_s: float,
        secret: bytes,
    ) -> None:
        """`wait_s` is how long a save waits for other saves of a block; `secret` is for the tags of descriptors."""
        self.lifecycle = lifecycle
        self.blocks: BlockTable = lifecycle.blocks
        self.evictor = evictor
        self.dram = dram
        self.write_behind = write_behind
        self.clock = clock
        self.counters = counters
        self.loop_budget = loop_budget
        self.admission = admission
        self.wait_s = wait_s
        self.secret = secret
        self.claims = Claims()
        self.open: set[Upload] = set()

    def begin(self, caller: Caller, client: Client, request: SaveRequest, space: Space | None = None) -> Upload:
        """Use it as ``async with``: leaving without a commit abandons it. With `space`, the client writes in place."""
        path = "stream" if space is None else "in_place"
        return Upload(self, caller, client, request, space or OwnSpace(self.dram), path)

    def note_refused(self, keys: Sequence[bytes], reason: str) -> None:
        self.lifecycle.history.note_keys(keys, Reason.REFUSED, reason)


class Upload:
    """One save: claim, destinations, bytes, commit. `write` stores the bytes, or the client writes them in place."""

    def __init__(
        self, uploads: Uploads, caller: Caller, client: Client, request: SaveRequest, space: Space, path: str
    ) -> None:
        """Use `Uploads.begin`."""
        self._began_s = uploads.clock.monotonic_s()
        self._path = path
        self._all = uploads
        self._caller = caller
        self._client = client
        self._request = request
        self._space = space
        self._admitted = ExitStack()
        self.outcome = SaveOutcome()
        self._destinations: dict[int, _Destination] = {}
        self._first_of: dict[int, int] = {}  # Positions of blocks that an earlier chain has too, and their first one.
        self._checksums = np.zeros((len(request.keys), request.shard.layers), np.uint64)  # Of received slices.
        self._hashing: set[asyncio.Future[int]] = set()
        self._geometries = [block_geometry(request.layout, request.shard, count) for count in request.token_counts]
        self._layer_starts = layer_starts(request.layout, request.shard, request.token_counts)
        self._no_room: KVError | None = None
        self._is_ended = False
        self._committing = False
        self._committed = False

    @property
    def places(self) -> list[Place]:
        """The destinations of the blocks that this save stores, by position."""
        return [
            Place(position, each.extent)
            for position, each in sorted(self._destinations.items())
            if each.extent is not None
        ]

    async def __aenter__(self) -> Self:
        """Raises Overloaded, and the errors of `claim`."""
        self._admitted.enter_context(self._all.admission.saves.entered())
        await self.claim()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # Claim and destinations

    async def claim(self) -> None:
        """Wait for other saves of the same blocks, and for space. Raises IncompleteSave if the client disconnects."""
        self._client.on_detach.add(self._abandon)
        self._all.open.add(self)
        try:
            await self._claim()
        except BaseException:
            self.close()
            raise

    async def _claim(self) -> None:
        """Queue for every missing object in one step: a save waits only for earlier ones, so there is no deadlock."""
        first_positions: dict[bytes, int] = {}
        for position, key in enumerate(self._request.keys):
            if (earlier := first_positions.setdefault(key, position)) != position:
                self._first_of[position] = earlier
                continue
            if self._stored_row(position) != NO_ROW:
                self.outcome.already_stored.append(position)
                continue
            geometry = self._geometries[position]
            claim = self._all.claims.enqueue(object_key(key, self._request.shard))
            self._destinations[position] = _Destination(position, claim, geometry, _Slices(geometry))
        first: list[_Destination] = []
        others: list[_Destination] = []
        for each in self._destinations.values():
            (first if self._all.claims.is_first(each.claim) else others).append(each)
        for count, each in enumerate(first):
            if count % _RESERVED_A_TURN == 0:
                await self._all.loop_budget.slot()  # If there is space, nothing below waits.
            await self._reserve(each)
        deadline_s = self._all.clock.monotonic_s() + self._all.wait_s
        for each in others:
            await self._after_others(each, deadline_s)

    def _stored_row(self, position: int) -> int:
        """A row with everything that this save would store of a block, in its layout, or NO_ROW."""
        blocks, request = self._all.blocks, self._request
        for row in blocks.shards_of(int(blocks.rows_of_keys([request.keys[position]])[0])):
            if blocks.layout_id[row] == request.layout_id and blocks.shard_of(row).covers(request.shard):
                return row
        return NO_ROW

    async def _after_others(self, destination: _Destination, deadline_s: float) -> None:
        """Other saves store this block: wait for them, and store it if none of them commits."""
        try:
            async with self._all.clock.timeout(max(0.0, deadline_s - self._all.clock.monotonic_s())):
                await self._all.claims.until_first(destination.claim)
        except TimeoutError:
            self._refuse(destination, Overloaded("another client is storing this block, and slowly"))
            return
        if not self._is_ended and self._stored_row(destination.position) != NO_ROW:
            self.outcome.already_stored.append(destination.position)
            self._end(destination)
        else:
            await self._reserve(destination)

    async def _reserve(self, destination: _Destination) -> None:
        if self._all.blocks.row_of(self._request.keys[destination.position], self._request.shard) != NO_ROW:
            why = "a block of another layout is stored under this key: make the root key of a chain from its layout"
            self._refuse(destination, InvalidRequest(why, field="keys"))
            return
        extent: Extent | None = None
        try:
            if self._no_room is not None:
                raise self._no_room  # Later blocks are useless without this one: do not wait for them.
            if not self._is_ended:
                await self._all.lifecycle.wait_record_deletes([destination.claim.name])
                extent = await self._all.evictor.reserve(
                    self._all.blocks.first_tier, destination.geometry.image_bytes, SpaceFor.SAVE
                )
        except KVError as error:
            if not self._is_ended:
                self._no_room = error
                self._refuse(destination, error)
                return
        if self._is_ended:  # The client has disconnected during the wait.
            if extent is not None:
                self._all.dram.release(extent)
            raise IncompleteSave("the client has disconnected")
        assert extent is not None
        destination.extent = extent
        destination.image = self._all.dram.view(extent)[: destination.geometry.image_bytes]
        self._space.reserved(extent)

    def _refuse(self, destination: _Destination, error: KVError) -> None:
        self.outcome.refused[destination.position] = error
        self._end(destination)

    # Writing

    async def put(self, frame: Frame) -> None:
        """`write`, in turn with other saves, one frame per iteration of the event loop."""
        async with self._all.admission.save_slots:
            self._all.admission.check_frame(len(frame.payload))
            self.write(frame)
            await asyncio.sleep(0)  # The slot is held.

    def write(self, frame: Frame) -> None:
        """Copy a frame's bytes to their place. Raises InvalidFrame; the caller then ends the save."""
        request = self._request
        if frame.layer >= request.shard.layers or frame.first_block >= len(request.keys):
            raise InvalidFrame(
                f"layer {frame.layer} or block {frame.first_block} is outside the save", layer=frame.layer
            )
        starts = self._layer_starts[frame.layer]
        first_end = starts[frame.first_block + 1] - starts[frame.first_block]
        if frame.first_offset_bytes >= first_end or not len(frame.payload):
            raise InvalidFrame("the payload is empty, or starts after its block's slice", layer=frame.layer)
        start = starts[frame.first_block] + frame.first_offset_bytes
        if start + len(frame.payload) > starts[-1]:
            raise InvalidFrame("the payload reaches beyond the last block", layer=frame.layer)
        payload = np.frombuffer(frame.payload, np.uint8)
        block, taken = frame.first_block, 0
        while taken < len(payload):
            offset = start + taken - starts[block]
            size = min(len(payload) - taken, starts[block + 1] - starts[block] - offset)
            self._put(block, frame.layer, offset, payload[taken : taken + size])
            taken += size
            block += 1

    def _put(self, block: int, layer: int, offset: int, data: NDArray[np.uint8]) -> None:
        destination = self._destinations.get(block)
        if destination is None:
            return  # The block is stored already, or refused, so its bytes are not read.
        assert destination.image is not None
        complete = destination.slices.add(layer, offset, offset + len(data))
        begin, end = destination.geometry.slice_range(layer)
        image = np.frombuffer(destination.image, np.uint8)
        np.copyto(image[begin + offset : begin + offset + len(data)], data)
        if complete:
            self._hash(destination, layer, destination.image[begin:end])

    def _hash(self, destination: _Destination, layer: int, data: memoryview) -> None:
        """Compute the checksum of the bytes in the arena now, while they are still in the processor's cache."""
        if len(data) <= _HASH_IN_THREAD_BYTES:
            self._checksums[destination.position, layer] = checksum(data)
            return

        def note(job: asyncio.Future[int]) -> None:
            self._checksums[destination.position, layer] = job.result()

        job = asyncio.get_running_loop().run_in_executor(None, checksum, data)
        job.add_done_callback(note)
        self._hashing.add(job)
        job.add_done_callback(self._hashing.discard)

    # Commit

    async def commit(self, checksums: NDArray[np.uint64], *, on_ssd: bool, then_write: bool = True) -> SaveOutcome:
        """Make complete, matching blocks visible. `checksums`: one per slice, ``[block, layer]`` flattened.

        `then_write` queues them for their SSD copy; `on_ssd` waits for it.
        Raises IncompleteSave if bytes are missing; then nothing is stored.
        """
        if self._is_ended or self._committing:
            raise IncompleteSave("the save has ended: its client has disconnected, or it was committed before")
        layers = self._request.shard.layers
        if len(checksums) != layers * len(self._request.keys):
            raise InvalidRequest(
                f"{len(checksums)} checksums were sent for {len(self._request.keys)} blocks of {layers} layers",
                field="checksums",
            )
        if incomplete := [each.position for each in self._destinations.values() if each.slices.missing]:
            raise IncompleteSave(f"bytes of block {incomplete[0]} are missing", block=incomplete[0])
        self._committing = True  # If the client detaches from now on, this commit owns the extents.
        if self._hashing:
            await asyncio.wait(self._hashing)
        good = self._matching(checksums)
        rows = await self._record(good)
        self._all.blocks.verified[rows] = True
        await self._finish(good, rows, on_ssd=on_ssd, then_write=then_write)
        return self.outcome

    def check_written(self, checksums: NDArray[np.uint64]) -> None:
        """Raises InvalidRequest unless there is one per slice of `places`."""
        layers = self._request.shard.layers
        if len(checksums) != layers * len(self._destinations):
            raise InvalidRequest(
                f"{len(checksums)} checksums were received for {len(self._destinations)} reserved blocks of {layers} "
                "layers",
                field="checksums",
            )

    async def commit_written(self, checksums: NDArray[np.uint64], *, on_ssd: bool) -> SaveOutcome:
        """Make blocks visible that the client wrote to `places` itself. `checksums`: one per slice of these, flattened.

        They are stored and not compared now: a view or a load of the blocks compares them.
        """
        written = sorted(self._destinations.values(), key=lambda each: each.position)
        self._committing = True  # If the client detaches from now on, this commit owns the extents.
        positions = [each.position for each in written]
        self._checksums[positions] = checksums.reshape(len(written), self._request.shard.layers)
        try:
            rows = await self._record(written)
            await self._finish(written, rows, on_ssd=on_ssd)
        finally:
            self.close()
        return self.outcome

    async def _finish(
        self, good: list[_Destination], rows: list[int], *, on_ssd: bool, then_write: bool = True
    ) -> None:
        """The steps after the records."""
        await self._touch_ancestors(good)
        self._count(good)
        if self._all.write_behind is not None and then_write:
            self._all.write_behind.add(rows)
        if on_ssd:
            await self._until_on_ssd(good, rows)
        outcome = self.outcome
        for position, first in self._first_of.items():
            if first in outcome.refused:
                outcome.refused[position] = outcome.refused[first]
            else:
                outcome.already_stored.append(position)
        times = self._all.counters.save_times[self._path, "ssd" if on_ssd else "dram"]
        times.observe(self._all.clock.monotonic_s() - self._began_s)

    def _matching(self, checksums: NDArray[np.uint64]) -> list[_Destination]:
        """The blocks whose bytes match the client's checksums. The others are refused."""
        wrong = checksums.reshape(self._checksums.shape) != self._checksums
        first_wrong = np.where(wrong.any(axis=1), wrong.argmax(axis=1), -1).tolist()
        good = []
        for position, destination in self._destinations.items():
            if (layer := first_wrong[position]) < 0:
                good.append(destination)
            else:
                self.outcome.refused[position] = UploadCorrupted(
                    f"layer {layer} of block {position} does not match its checksum", layer=layer
                )
        return good

    async def _record(self, written: list[_Destination]) -> list[int]:
        """Trailer, index record, visible. Blocks of one save share a commit."""
        blocks, request, now_ms = self._all.blocks, self._request, self._all.clock.wall_ms()
        rows, extents = [], []
        for destination in written:
            key = request.keys[destination.position]
            trailer = Trailer(key, request.shard, self._checksums[destination.position]).encode()
            assert destination.image is not None and destination.extent is not None
            destination.image[destination.geometry.trailer_offset :] = trailer
            parent_key = request.parent_keys[destination.position]
            if (offset := descriptor_offset(destination.geometry)) is not None:
                destination.image[offset : destination.geometry.trailer_offset] = Descriptor(
                    request.token_counts[destination.position],
                    parent_key,
                    request.layout.fingerprint,
                    tenant_tag(self._caller.tenant.name),
                    now_ms,
                    checksum(trailer),
                ).encode(trailer, self._all.secret)
            row = blocks.add(
                key,
                request.shard,
                parent_key=parent_key,
                layout_id=request.layout_id,
                tenant=self._caller.tenant.number,
                token_count=request.token_counts[destination.position],
                size_bytes=destination.geometry.image_bytes,
                trailer_checksum=checksum(trailer),
                now_ms=now_ms,
            )
            rows.append(row)
            extents.append(destination.extent)
        if not rows:
            return []
        blocks.touch(np.array(rows, np.int64), now_ms)
        blocks.note_user(np.array(rows, np.int64), self._client.number)
        for destination, extent in zip(written, extents, strict=True):
            self._space.recorded(extent)
            destination.extent = destination.image = None  # From here on `admit` owns the space.
        try:
            await self._all.lifecycle.admit(rows, extents)
        except KVError as error:
            self.outcome.refused.update((destination.position, error) for destination in written)
            return []
        self.outcome.stored.extend(destination.position for destination in written)
        return rows

    async def _touch_ancestors(self, written: list[_Destination]) -> None:
        """Mark the earlier blocks of each chain as used now, after its new ones: the first have the highest value."""
        blocks, request = self._all.blocks, self._request
        new_keys = {request.keys[each.position] for each in written}
        heads = [each.position for each in written if request.parent_keys[each.position] not in new_keys]
        for count, position in enumerate(heads):
            if count:  # A long chain takes a millisecond of the event loop.
                await self._all.loop_budget.slot()
            row = blocks.row_of(request.keys[position], request.shard)
            if row != NO_ROW:
                ancestors = np.array(blocks.ancestors(row)[::-1], np.int64)
                blocks.touch(ancestors, self._all.clock.wall_ms())
                blocks.note_user(ancestors, self._client.number)

    async def _until_on_ssd(self, written: list[_Destination], rows: list[int]) -> None:
        """Wait for the SSD copies of the blocks that were stored now, and of those that other saves had stored."""
        outcome, lifecycle = self.outcome, self._all.lifecycle
        row_of = {destination.position: row for destination, row in zip(written, rows, strict=False)}
        row_of |= {position: self._stored_row(position) for position in outcome.already_stored}
        held = [row for row in row_of.values() if row != NO_ROW]
        lifecycle.hold(held)
        try:
            errors = await all_of(self._written(row) for row in row_of.values())
        finally:
            lifecycle.unhold(held)
        outcome.refused |= {position: error for position, error in zip(row_of, errors, strict=True) if error}
        for done in (outcome.stored, outcome.already_stored):
            done[:] = [position for position in done if position not in outcome.refused]

    async def _written(self, row: int) -> KVError | None:
        """Wait for the row's SSD copy. Returns the reason if there will be none."""
        try:
            if row == NO_ROW:
                raise BlockNotFound("the block was stored before, and was dropped meanwhile")
            if self._all.write_behind is None:
                raise TierFull("this daemon has no SSD tier", tier="ssd")
            await self._all.write_behind.written(row)
        except KVError as error:
            return error
        return None

    def _count(self, good: list[_Destination]) -> None:
        counters, outcome = self._all.counters, self.outcome
        stored = np.array([self._stored_row(position) for position in outcome.already_stored], np.int64)
        self._all.blocks.note_user(stored[stored != NO_ROW], self._client.number)
        counters.save_blocks_stored += len(outcome.stored)
        counters.save_blocks_already_stored += len(outcome.already_stored)
        counters.save_blocks_refused += len(outcome.refused)
        counters.save_bytes += sum(u.geometry.payload_bytes for u in good if u.position in outcome.stored)
        self._committed = True
        self._note_refused()

    def _note_refused(self) -> None:
        refused = self.outcome.refused
        for reason in {error.reason for error in refused.values()}:
            keys = [self._request.keys[position] for position, error in refused.items() if error.reason == reason]
            self._all.note_refused(keys, reason)

    def _abandon(self) -> None:
        """The client has disconnected."""
        if not self._committing:
            self.close()

    def close(self) -> None:
        """End the open destinations. Their space is free at once, because no record has ever named it."""
        if not self._is_ended:
            self._is_ended = True
            self._all.open.discard(self)
            self._client.on_detach.discard(self._abandon)
            if not self._committed:
                self._all.counters.saves_abandoned += 1
                self._note_refused()
                keys = [self._request.keys[position] for position in self._destinations]
                self._all.lifecycle.history.note_keys(keys, Reason.ABANDONED)
        for destination in list(self._destinations.values()):
            self._end(destination)
        self._admitted.close()

    def _end(self, destination: _Destination) -> None:
        if destination.extent is not None:
            self._space.returned(destination.extent)  # The result of a running hash is not used.
            destination.extent = destination.image = None
        del self._destinations[destination.position]
        self._all.claims.end(destination.claim)
