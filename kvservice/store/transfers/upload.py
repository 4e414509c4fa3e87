"""The save path: claim the blocks, reserve destinations for their bytes, write them, commit or abandon.

`Upload` is one save. `frame_writer.py` writes the bytes that arrive in frames, and `commits.py` makes blocks visible;
both work on the upload's `UploadState`.

No byte of an upload is visible before its commit, and an upload that ends without a commit leaves nothing. The order of
a commit: bytes are complete and match the client's checksums, the trailer, the index record; then the blocks are
visible.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

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
from kvservice.store.tasks import LoopBudget
from kvservice.store.transfers.admission import Admission, Claims
from kvservice.store.transfers.arrived_slices import ArrivedSlices
from kvservice.store.transfers.commits import Commits
from kvservice.store.transfers.frame_writer import FrameWriter
from kvservice.store.transfers.save_request import Place, SaveOutcome, SavePath, SaveRequest
from kvservice.store.transfers.upload_space import OwnSpace, Space
from kvservice.store.transfers.upload_state import Destination, UploadState, stored_rows
from kvservice.store.transfers.verification import Verification
from kvservice.tiers.dram import DramTier
from kvservice_api.errors import IncompleteSave, InvalidRequest, KVError, Overloaded, UploadCorrupted
from kvservice_api.frames import Frame
from kvservice_api.image import block_geometry

_RESERVED_A_TURN = 32  # They take a millisecond of the event loop.


class Uploads:
    """All running saves, and their shared state."""

    def __init__(
        self,
        lifecycle: BlockLifecycle,
        evictor: Evictor,
        dram: DramTier,
        write_behind: WriteBehind | None,
        verification: Verification,
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
        self.clock = clock
        self.counters = counters
        self.loop_budget = loop_budget
        self.admission = admission
        self.wait_s = wait_s
        self.claims = Claims()
        self.commits = Commits(
            lifecycle, evictor, write_behind, verification, clock, counters, loop_budget, secret=secret
        )
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
        self, uploads: Uploads, caller: Caller, client: Client, request: SaveRequest, space: Space, path: SavePath
    ) -> None:
        """Use `Uploads.begin`."""
        self._all = uploads
        checksums = np.zeros((len(request.keys), request.shard.layers), np.uint64)
        began_s = uploads.clock.monotonic_s()
        self._state = UploadState(caller, client, request, path, began_s, checksums)
        self._client = client
        self._request = request
        self._space = space
        self._destinations = self._state.destinations
        self.outcome = self._state.outcome
        self._frames = FrameWriter(self._state)
        self._admitted = ExitStack()
        self._geometries = [block_geometry(request.layout, request.shard, count) for count in request.token_counts]
        self._no_room: KVError | None = None
        self._is_ended = False
        self._committing = False

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
        is_stored = self._are_stored(range(len(self._request.keys)))
        for position, key in enumerate(self._request.keys):
            if (earlier := first_positions.setdefault(key, position)) != position:
                self._state.first_of[position] = earlier
                continue
            if is_stored[position]:
                self.outcome.already_stored.append(position)
                continue
            geometry = self._geometries[position]
            claim = self._all.claims.enqueue(object_key(key, self._request.shard))
            self._destinations[position] = Destination(position, claim, geometry, ArrivedSlices(geometry))
        first: list[Destination] = []
        others: list[Destination] = []
        for each in self._destinations.values():
            (first if self._all.claims.is_first(each.claim) else others).append(each)
        for count, each in enumerate(first):
            if count % _RESERVED_A_TURN == 0:
                await self._all.loop_budget.slot()  # If there is space, nothing below waits.
            await self._reserve(each)
        deadline_s = self._all.clock.monotonic_s() + self._all.wait_s
        for each in others:
            await self._after_others(each, deadline_s)

    def _are_stored(self, positions: Sequence[int]) -> list[bool]:
        """Whether everything that this save would store of each of these blocks is stored, in its layout."""
        stored: list[bool] = (stored_rows(self._all.blocks, self._request, positions) != NO_ROW).tolist()
        return stored

    async def _after_others(self, destination: Destination, deadline_s: float) -> None:
        """Other saves store this block: wait for them, and store it if none of them commits."""
        try:
            async with self._all.clock.timeout(max(0.0, deadline_s - self._all.clock.monotonic_s())):
                await self._all.claims.until_first(destination.claim)
        except TimeoutError:
            self._refuse(destination, Overloaded("another client is storing this block, and slowly"))
            return
        if not self._is_ended and self._are_stored([destination.position])[0]:
            self.outcome.already_stored.append(destination.position)
            self._end(destination)
        else:
            await self._reserve(destination)

    async def _reserve(self, destination: Destination) -> None:
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

    def _refuse(self, destination: Destination, error: KVError) -> None:
        if self._is_ended:  # The client has disconnected during a wait, and another client may have the block now.
            raise IncompleteSave("the client has disconnected")
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
        self._frames.write(frame)

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
        await self._frames.hashed()
        good = self._matching(checksums)
        await self._all.commits.store(self._state, good, are_verified=True, on_ssd=on_ssd, then_write=then_write)
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
        self._state.checksums[positions] = checksums.reshape(len(written), self._request.shard.layers)
        if expected is not None:
            sent = self._state.checksums.copy()
            sent[positions] = expected.reshape(len(written), self._request.shard.layers)
            written = sorted(self._matching(sent), key=lambda each: each.position)
        try:
            await self._all.commits.store(self._state, written, are_verified=are_verified, on_ssd=on_ssd)
        finally:
            self.close()
        return self.outcome

    def _matching(self, checksums: NDArray[np.uint64]) -> list[Destination]:
        """The blocks whose bytes match the client's checksums. The others are refused."""
        wrong = checksums.reshape(self._state.checksums.shape) != self._state.checksums
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
            if not self._state.is_counted:
                self._all.counters.saves_abandoned += 1
                self._all.commits.note_refused(self._state)
                keys = [self._request.keys[position] for position in self._destinations]
                self._all.lifecycle.history.note_keys(keys, Reason.ABANDONED)
        for destination in list(self._destinations.values()):
            self._end(destination)
        self._admitted.close()

    def _end(self, destination: Destination) -> None:
        if destination.extent is not None:
            self._space.returned(destination.extent)  # The result of a running hash is not used.
            destination.extent = destination.image = None
        del self._destinations[destination.position]
        self._all.claims.end(destination.claim)
