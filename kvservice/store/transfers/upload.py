"""The save path: claim the blocks, reserve destinations for their bytes, write them, commit or abandon.

No byte of an upload is visible before its commit, and an upload that ends without a commit leaves nothing. The order of
a commit: bytes are complete and match the client's checksums, the trailer, the index record; then the blocks are
visible.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

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
from kvservice.store.transfers.arrived_slices import ArrivedSlices
from kvservice.store.transfers.upload_space import OwnSpace, Space
from kvservice.tiers.dram import DramTier
from kvservice_api.copying import copy_slices
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

SavePath = Literal["stream", "in_place", "cuda_ipc", "bulk"]  # How the bytes come to their places.


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


class Place(NamedTuple):
    """The offset of a block's image in the arena."""

    position: int  # Its position in the save's keys.
    extent: Extent


@dataclass(slots=True, eq=False)
class _Destination:
    """The destination of one block's bytes, once it has space."""

    position: int
    claim: Claim
    geometry: BlockGeometry
    slices: ArrivedSlices
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

    def begin(
        self,
        caller: Caller,
        client: Client,
        request: SaveRequest,
        space: Space | None = None,
        path: SavePath = "stream",
    ) -> Upload:
        """Use it as ``async with``: leaving without a commit abandons it. With `space`, other threads or processes
        write to the places.
        """
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
            self._destinations[position] = _Destination(position, claim, geometry, ArrivedSlices(geometry))
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
        whole: list[tuple[_Destination, int, int]] = []  # Slices that this frame has all of: begin in it, size.
        block, taken = frame.first_block, 0
        while taken < len(payload):
            offset = start + taken - starts[block]
            size = min(len(payload) - taken, starts[block + 1] - starts[block] - offset)
            destination = self._destinations.get(block)
            if destination is not None:  # Else the block is stored already, or refused, so its bytes are not read.
                if size == starts[block + 1] - starts[block]:
                    destination.slices.add(frame.layer, 0, size)
                    whole.append((destination, taken, size))
                else:
                    self._put(destination, frame.layer, offset, payload[taken : taken + size])
            taken += size
            block += 1
        if whole:
            self._put_whole(whole, frame.layer, payload)

    def _put(self, destination: _Destination, layer: int, offset: int, data: NDArray[np.uint8]) -> None:
        assert destination.image is not None
        complete = destination.slices.add(layer, offset, offset + len(data))
        begin, end = destination.geometry.slice_range(layer)
        image = np.frombuffer(destination.image, np.uint8)
        np.copyto(image[begin + offset : begin + offset + len(data)], data)
        if complete:
            self._hash(destination, layer, destination.image[begin:end])

    def _put_whole(
        self, whole: Sequence[tuple[_Destination, int, int]], layer: int, payload: NDArray[np.uint8]
    ) -> None:
        """Copy whole slices of one layer, and compute their checksums in the same pass."""
        images, slices, runs = [], [], []
        for number, (destination, begin, size) in enumerate(whole):
            assert destination.image is not None
            images.append(np.frombuffer(destination.image, np.uint8))
            slices.append((0, begin, size, 1))
            runs.append((number, destination.geometry.slice_range(layer)[0], 0, 1, size, 0))
        sums = copy_slices([payload], images, np.array(slices, np.int64), np.array(runs, np.int64))
        self._checksums[[each.position for each, _, _ in whole], layer] = sums

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
        self.check_open()
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
        await self._store(good, are_verified=True, on_ssd=on_ssd, then_write=then_write)
        return self.outcome

    def check_open(self) -> None:
        """Raises IncompleteSave once the upload has ended, or was committed."""
        if self._is_ended or self._committing:
            raise IncompleteSave("the save has ended: its client has disconnected, or it was committed before")

    def check_written(self, checksums: NDArray[np.uint64]) -> None:
        """Raises InvalidRequest unless there is one per slice of `places`."""
        layers = self._request.shard.layers
        if len(checksums) != layers * len(self._destinations):
            raise InvalidRequest(
                f"{len(checksums)} checksums were received for {len(self._destinations)} reserved blocks of {layers} "
                "layers",
                field="checksums",
            )

    async def commit_written(
        self,
        checksums: NDArray[np.uint64],
        *,
        on_ssd: bool,
        are_verified: bool = False,
        expected: NDArray[np.uint64] | None = None,
    ) -> SaveOutcome:
        """Make blocks visible that were written to `places`. `checksums`: one per slice of these, flattened.

        They are stored and not compared now: a view or a load of the blocks compares them. `are_verified` says that
        this daemon has computed them from the bytes in the places; blocks that are not as `expected` are refused.
        Raises IncompleteSave.
        """
        self.check_open()
        written = sorted(self._destinations.values(), key=lambda each: each.position)
        self._committing = True  # If the client detaches from now on, this commit owns the extents.
        positions = [each.position for each in written]
        self._checksums[positions] = checksums.reshape(len(written), self._request.shard.layers)
        if expected is not None:
            sent = self._checksums.copy()
            sent[positions] = expected.reshape(len(written), self._request.shard.layers)
            written = sorted(self._matching(sent), key=lambda each: each.position)
        try:
            await self._store(written, are_verified=are_verified, on_ssd=on_ssd)
        finally:
            self.close()
        return self.outcome

    async def _store(
        self, written: list[_Destination], *, are_verified: bool, on_ssd: bool, then_write: bool = True
    ) -> None:
        """Records, and the steps after them."""
        rows = self._new_rows(written)
        # Until the end: a row that is discarded meanwhile may be another block's as soon as nothing holds it.
        self._all.lifecycle.hold(rows)
        try:
            try:
                stored = await self._record(written, rows)
            except asyncio.CancelledError:
                if self._all.blocks.live[rows].any():  # The records were written before.
                    self._note_stored(written, rows, are_verified=are_verified, then_write=then_write)
                raise
            self._note_stored(written, stored, are_verified=are_verified, then_write=then_write)
            await self._touch_ancestors(written)
            if on_ssd:
                await self._until_on_ssd(written, stored)
        finally:
            self._all.lifecycle.unhold(rows)
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

    def _new_rows(self, written: list[_Destination]) -> list[int]:
        """Rows of the blocks, whose trailers are written."""
        blocks, request, now_ms = self._all.blocks, self._request, self._all.clock.wall_ms()
        rows: list[int] = []
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
        blocks.touch(np.array(rows, np.int64), now_ms)
        blocks.note_user(np.array(rows, np.int64), self._client.number)
        return rows

    async def _record(self, written: list[_Destination], rows: list[int]) -> list[int]:
        """Index records, then visible. Blocks of one save share a commit. Returns the rows, or none if it failed."""
        if not rows:
            return []
        extents: list[Extent] = []
        for destination in written:
            assert destination.extent is not None
            extents.append(destination.extent)
            self._space.recorded(destination.extent)
            destination.extent = destination.image = None  # From here on `admit` owns the space.
        try:
            await self._all.lifecycle.admit(rows, extents)
        except KVError as error:
            self.outcome.refused.update((destination.position, error) for destination in written)
            return []
        return rows

    def _note_stored(
        self, written: list[_Destination], rows: list[int], *, are_verified: bool, then_write: bool
    ) -> None:
        """The rows of these blocks are visible; no rows: the blocks were refused."""
        if rows:
            self.outcome.stored.extend(destination.position for destination in written)
        if are_verified:
            self._all.blocks.verified[rows] = True
        self._count(written)
        if self._all.write_behind is not None and then_write:
            self._all.write_behind.add(rows)

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
        stored_now = set(outcome.stored)
        geometries = {id(each.geometry): each.geometry for each in good}  # Blocks of as many tokens share one.
        counts = Counter(id(each.geometry) for each in good if each.position in stored_now)
        counters.save_bytes += sum(count * geometries[which].payload_bytes for which, count in counts.items())
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
