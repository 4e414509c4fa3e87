"""The save path: an upload reserves space, is written frame by frame, and is committed or abandoned.

Nothing of an upload is visible before its commit, and nothing is left of one that ends without.
The order of a commit: bytes complete and matching the client's checksums, trailer, index record,
visible. An object is uploaded once at a time: saves that want it queue up, and who comes to the front
finds it stored, or stores it.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, BlockTable, Extent, TierName, object_key
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.loop_budget import LoopBudget
from kvservice.store.miss_reasons import Reason
from kvservice.store.mover.evictor import Evictor
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.tasks import all_of
from kvservice.store.transfers.admission import Admission
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

_HASH_IN_THREAD_BYTES = 1 << 20  # Hashing less than this takes less than handing it to a thread.
_RESERVED_A_TURN = 64  # A millisecond of the event loop.


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What a save wants to store: consecutive blocks of one chain, all full but the last."""

    layout_id: int
    layout: Layout
    shard: Shard
    parent_key: bytes
    keys: Sequence[bytes]
    token_counts: Sequence[int]


@dataclass(slots=True)
class SaveOutcome:
    """How a save ended, by position in its keys."""

    stored: list[int] = field(default_factory=list)
    already_stored: list[int] = field(default_factory=list)
    refused: dict[int, KVError] = field(default_factory=dict)


class _Slices:
    """Which bytes of one block's slices have arrived. Frames may come in any order, none twice."""

    def __init__(self, geometry: BlockGeometry) -> None:
        self._geometry = geometry
        self._complete = bytearray(geometry.slice_count)
        # Of slices that came in part: sorted, never touching. A whole one costs no object that would have to be freed.
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


@dataclass(slots=True, eq=False)
class _Upload:
    """One block on its way in."""

    position: int
    name: bytes  # The object's key.
    geometry: BlockGeometry
    ended: asyncio.Future[None]  # Committed, abandoned, or not needed.
    slices: _Slices
    extent: Extent | None = None
    image: memoryview | None = None


class Ingests:
    """All uploads that run."""

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
        """`secret` is the store's, for the tags of descriptors."""
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
        self.uploads: dict[bytes, deque[_Upload]] = {}  # By object. The first one is under way, the others wait.

    def begin(self, caller: Caller, client: Client, request: SaveRequest) -> Ingest:
        """Use it as ``async with``: leaving without `commit` abandons the upload. Raises InvalidRequest."""
        self.check(request)
        return Ingest(self, caller, client, request)

    def check(self, request: SaveRequest) -> None:
        """Raises InvalidRequest where the request contradicts itself."""
        if len(set(request.keys)) != len(request.keys):
            raise InvalidRequest("a key appears twice in one save", field="keys")


class Ingest:
    """One save: ``async with`` reserves, `write` fills, `commit` makes it visible."""

    def __init__(self, ingests: Ingests, caller: Caller, client: Client, request: SaveRequest) -> None:
        self._all = ingests
        self._caller = caller
        self._client = client
        self._request = request
        self._open = ExitStack()
        self._gate = self._all.admission.saves
        self._outcome = SaveOutcome()
        self._uploads: dict[int, _Upload] = {}
        self._checksums = np.zeros((len(request.keys), request.shard.layers), np.uint64)  # Of what came.
        self._hashing: set[asyncio.Future[int]] = set()
        self._geometries = [block_geometry(request.layout, request.shard, count) for count in request.token_counts]
        self._layer_starts = layer_starts(request.layout, request.shard, request.token_counts)
        self._received_bytes = 0
        self._no_room: KVError | None = None
        self._over = False
        self._committing = False
        self._committed = False

    async def __aenter__(self) -> Ingest:
        self._open.enter_context(self._gate.entered())
        self._client.on_detach.add(self._abandon)
        try:
            await self._claim()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._close()

    # Reserving

    async def _claim(self) -> None:
        """Queue for all that is not stored, at once: who waits only for those before him waits in no circle."""
        for position, key in enumerate(self._request.keys):
            if self._stored_row(position) != NO_ROW:
                self._outcome.already_stored.append(position)
                continue
            geometry, ended = self._geometries[position], asyncio.get_running_loop().create_future()
            upload = _Upload(position, object_key(key, self._request.shard), geometry, ended, _Slices(geometry))
            self._uploads[position] = upload
            self._all.uploads.setdefault(upload.name, deque()).append(upload)
        first: list[_Upload] = []
        others: list[_Upload] = []
        for upload in self._uploads.values():
            (first if self._is_first(upload) else others).append(upload)
        for count, upload in enumerate(first):
            if count % _RESERVED_A_TURN == 0:
                await self._all.loop_budget.slot()  # Where there is room nothing below waits.
            await self._reserve(upload)
        deadline_s = asyncio.get_running_loop().time() + self._all.wait_s
        for upload in others:
            await self._after_others(upload, deadline_s)

    def _stored_row(self, position: int) -> int:
        """A row that has all of what this save would store of a block, or NO_ROW."""
        blocks, shard = self._all.blocks, self._request.shard
        first = int(blocks.rows_of_keys([self._request.keys[position]])[0])
        return next((row for row in blocks.shards_of(first) if blocks.shard_of(row).covers(shard)), NO_ROW)

    def _is_first(self, upload: _Upload) -> bool:
        return self._all.uploads[upload.name][0] is upload

    async def _after_others(self, upload: _Upload, deadline_s: float) -> None:
        """Other saves store this block: wait for them, and take over should none of them commit."""
        try:
            async with asyncio.timeout_at(deadline_s):
                while not self._over and not self._is_first(upload):
                    before = self._all.uploads[upload.name][0]
                    await asyncio.wait({before.ended, upload.ended}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            self._refuse(upload, Overloaded("another client is storing this block, and slowly"))
            return
        if not self._over and self._stored_row(upload.position) != NO_ROW:
            self._outcome.already_stored.append(upload.position)
            self._end(upload)
        else:
            await self._reserve(upload)

    async def _reserve(self, upload: _Upload) -> None:
        extent: Extent | None = None
        try:
            if self._no_room is not None:
                raise self._no_room  # A chain without this block is not worth another wait for room.
            if not self._over:
                await self._all.lifecycle.wait_record_deletes([upload.name])
                extent = await self._all.evictor.reserve(TierName.DRAM, upload.geometry.image_bytes)
        except KVError as error:
            if not self._over:
                self._no_room = error
                self._refuse(upload, error)
                return
        if self._over:  # The client went away while we waited.
            if extent is not None:
                self._all.dram.release(extent)
            raise IncompleteSave("the client has gone")
        assert extent is not None
        upload.extent = extent
        upload.image = self._all.dram.view(extent)[: upload.geometry.image_bytes]
        self._lent(extent)

    def _lent(self, extent: Extent) -> None:
        """Space is the upload's from now on."""

    def _give_back(self, extent: Extent) -> None:
        """Space that no record ever named is not needed any more."""
        self._all.dram.release(extent)

    def _refuse(self, upload: _Upload, error: KVError) -> None:
        self._outcome.refused[upload.position] = error
        self._end(upload)

    # Writing

    async def put(self, frame: Frame) -> None:
        """`write`, in turn with other saves: the event loop goes round between frames."""
        async with self._all.admission.save_slots:
            self._all.admission.check_frame(len(frame.payload))
            self.write(frame)
            await asyncio.sleep(0)  # With the slot in hand.

    def write(self, frame: Frame) -> None:
        """Put a frame's bytes in their place. Raises InvalidFrame; the caller then leaves the block."""
        request = self._request
        if frame.layer >= request.shard.layers or frame.first_block >= len(request.keys):
            raise InvalidFrame(
                f"layer {frame.layer} or block {frame.first_block} is outside the save", layer=frame.layer
            )
        starts = self._layer_starts[frame.layer]
        first_end = starts[frame.first_block + 1] - starts[frame.first_block]
        if frame.first_offset_bytes >= first_end or not len(frame.payload):
            raise InvalidFrame("the payload is empty, or starts behind its block's slice", layer=frame.layer)
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
        self._received_bytes += taken

    def _put(self, block: int, layer: int, offset: int, data: NDArray[np.uint8]) -> None:
        upload = self._uploads.get(block)
        if upload is None:
            return  # Stored already, or refused: its bytes are not looked at.
        assert upload.image is not None
        complete = upload.slices.add(layer, offset, offset + len(data))
        begin, end = upload.geometry.slice_range(layer)
        image = np.frombuffer(upload.image, np.uint8)
        np.copyto(image[begin + offset : begin + offset + len(data)], data)
        if complete:
            self._hash(upload, layer, upload.image[begin:end])

    def _hash(self, upload: _Upload, layer: int, data: memoryview) -> None:
        """Take the checksum of what lies in the arena now, while it is still in the processor's cache."""
        if len(data) <= _HASH_IN_THREAD_BYTES:
            self._checksums[upload.position, layer] = checksum(data)
            return

        def note(job: asyncio.Future[int]) -> None:
            self._checksums[upload.position, layer] = job.result()

        job = asyncio.get_running_loop().run_in_executor(None, checksum, data)
        job.add_done_callback(note)
        self._hashing.add(job)
        job.add_done_callback(self._hashing.discard)

    # Ending

    async def commit(self, checksums: NDArray[np.uint64], *, on_ssd: bool, then_write: bool = True) -> SaveOutcome:
        """Make complete, matching blocks visible. `checksums`: one a slice, ``[block, layer]`` flattened.

        `then_write` queues them for their SSD copy; `on_ssd` waits for it.
        Raises IncompleteSave where bytes are missing; then nothing is stored.
        """
        if self._over or self._committing:
            raise IncompleteSave("the save has ended: its client has gone, or it was committed before")
        layers = self._request.shard.layers
        if len(checksums) != layers * len(self._request.keys):
            raise InvalidRequest(
                f"{len(checksums)} checksums came for {len(self._request.keys)} blocks of {layers} layers",
                field="checksums",
            )
        if incomplete := [upload.position for upload in self._uploads.values() if upload.slices.missing]:
            raise IncompleteSave(f"bytes of block {incomplete[0]} are missing", block=incomplete[0])
        self._committing = True  # Whoever detaches the client now leaves the extents to this commit.
        if self._hashing:
            await asyncio.wait(self._hashing)
        good = self._matching(checksums)
        rows = await self._record(good)
        self._all.blocks.verified[rows] = True
        await self._finish(good, rows, on_ssd=on_ssd, then_write=then_write)
        return self._outcome

    async def _finish(self, good: list[_Upload], rows: list[int], *, on_ssd: bool, then_write: bool = True) -> None:
        """What follows the records."""
        self._count(good)
        if self._all.write_behind is not None and then_write:
            self._all.write_behind.add(rows)
        if on_ssd:
            await self._until_on_ssd(good, rows)

    def _matching(self, checksums: NDArray[np.uint64]) -> list[_Upload]:
        """The uploads whose bytes are those that the client's checksums were taken of. The others are refused."""
        wrong = checksums.reshape(self._checksums.shape) != self._checksums
        first_wrong = np.where(wrong.any(axis=1), wrong.argmax(axis=1), -1).tolist()
        good = []
        for position, upload in self._uploads.items():
            if (layer := first_wrong[position]) < 0:
                good.append(upload)
            else:
                self._outcome.refused[position] = UploadCorrupted(
                    f"layer {layer} of block {position} does not match its checksum", layer=layer
                )
        return good

    async def _record(self, uploads: list[_Upload]) -> list[int]:
        """Trailer, index record, visible. Blocks of one save share a commit."""
        blocks, request, now_ms = self._all.blocks, self._request, self._all.clock.wall_ms()
        rows, extents = [], []
        for upload in uploads:
            key = request.keys[upload.position]
            trailer = Trailer(key, request.shard, self._checksums[upload.position]).encode()
            assert upload.image is not None and upload.extent is not None
            upload.image[upload.geometry.trailer_offset :] = trailer
            parent_key = request.keys[upload.position - 1] if upload.position else request.parent_key
            if (offset := descriptor_offset(upload.geometry)) is not None:
                upload.image[offset : upload.geometry.trailer_offset] = Descriptor(
                    request.token_counts[upload.position],
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
                token_count=request.token_counts[upload.position],
                size_bytes=upload.geometry.image_bytes,
                trailer_checksum=checksum(trailer),
                now_ms=now_ms,
            )
            rows.append(row)
            extents.append(upload.extent)
        if not rows:
            return []
        self._touch(rows, now_ms)
        for upload in uploads:
            upload.extent = upload.image = None  # `admit` owns the space from here on.
        try:
            await self._all.lifecycle.admit(rows, extents)
        except KVError as error:
            self._outcome.refused.update((upload.position, error) for upload in uploads)
            return []
        self._outcome.stored.extend(upload.position for upload in uploads)
        return rows

    def _touch(self, rows: list[int], now_ms: int) -> None:
        """The whole chain was used now. What comes first in it is worth most."""
        blocks = self._all.blocks
        earlier = blocks.ancestors(rows[0])
        chain = [*reversed(earlier), *rows]
        blocks.touch(np.array(chain, np.int64), now_ms)

    async def _until_on_ssd(self, uploads: list[_Upload], rows: list[int]) -> None:
        """Wait for the SSD copies: of what was stored now, and of what others had stored before."""
        outcome, lifecycle = self._outcome, self._all.lifecycle
        row_of = {upload.position: row for upload, row in zip(uploads, rows, strict=False)}
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
        """Wait for the row's SSD copy; why there will be none."""
        try:
            if row == NO_ROW:
                raise BlockNotFound("the block was stored before, and left meanwhile")
            if self._all.write_behind is None:
                raise TierFull("this daemon has no SSD tier", tier="ssd")
            await self._all.write_behind.written(row)
        except KVError as error:
            return error
        return None

    def _count(self, good: list[_Upload]) -> None:
        counters, outcome = self._all.counters, self._outcome
        counters.save_blocks_stored += len(outcome.stored)
        counters.save_blocks_already_stored += len(outcome.already_stored)
        counters.save_blocks_refused += len(outcome.refused)
        counters.save_bytes += sum(u.geometry.payload_bytes for u in good if u.position in outcome.stored)
        self._committed = True
        self._note_refused()

    def _note_refused(self) -> None:
        refused = self._outcome.refused
        for reason in {error.reason for error in refused.values()}:
            keys = [self._request.keys[position] for position, error in refused.items() if error.reason == reason]
            self._all.lifecycle.history.note_keys(keys, Reason.REFUSED, reason)

    def _abandon(self) -> None:
        """The client has gone."""
        if not self._committing:
            self._close()

    def _close(self) -> None:
        """End what is still open: its space is free at once, as no record ever named it."""
        if not self._over:
            self._over = True
            self._client.on_detach.discard(self._abandon)
            if not self._committed:
                self._all.counters.saves_abandoned += 1
                self._note_refused()
                keys = [self._request.keys[position] for position in self._uploads]
                self._all.lifecycle.history.note_keys(keys, Reason.ABANDONED)
        for upload in list(self._uploads.values()):
            self._end(upload)
        self._open.close()

    def _end(self, upload: _Upload) -> None:
        if upload.extent is not None:
            self._give_back(upload.extent)  # A hash that still runs reads what nobody will ask for.
            upload.extent = upload.image = None
        del self._uploads[upload.position]
        queue = self._all.uploads[upload.name]
        queue.remove(upload)
        if not queue:
            del self._all.uploads[upload.name]
        upload.ended.set_result(None)
