"""Uploads in place: a client reserves blocks, writes their slices into the arena itself, and commits.

Such an upload's bytes do not pass through the daemon. Its end differs from that of a streamed upload: the daemon reuses
the space only after the client has committed or abandoned it, or when the kernel has dropped the lock of the client's
process (``tiers/writers.py``). A timeout is never enough: a stopped process that continues would write into another
block.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.tasks import Tasks
from kvservice.store.transfers.admission import IN_PLACE_UPLOADS_PER_CLIENT_MAX
from kvservice.store.transfers.save_request import Place, SaveOutcome, SaveRequest
from kvservice.store.transfers.upload import Upload, Uploads
from kvservice.tiers.dram import DramTier
from kvservice.tiers.writers import Writer
from kvservice_api.arena import WRITERS_NAME
from kvservice_api.errors import InvalidRequest, KVError, NotShared, Overloaded, ReservationEnded, ReservationNotYours

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_RELEASED_A_TURN = 64  # They take a millisecond of the event loop.


class _WrittenInPlace:
    """Space that a client may be writing. It is not free before the writer's lock is released."""

    def __init__(self, dram: DramTier, writer: Writer) -> None:
        self._dram = dram
        self._writer = writer
        self.may_be_written = False  # The client knows the places, and has not committed or abandoned yet.

    def reserved(self, extent: Extent) -> None:
        self._writer.note(extent)

    def returned(self, extent: Extent) -> None:
        if not self.may_be_written:  # Otherwise the space is free once the client's lock is released.
            self._writer.forget(extent)
            self._dram.release(extent)

    def written(self, places: Sequence[Place]) -> None:
        """The client has committed. If its process ends during the commit, these places are not free by that."""
        self.may_be_written = False
        for place in places:
            self._writer.forget(place.extent)


class _InPlaceUpload(NamedTuple):
    """Blocks of one save that the client writes in place."""

    client: Client
    upload: Upload
    space: _WrittenInPlace
    on_ssd: bool


class InPlaceUploads:
    """All uploads in place, by the client's random number, and the clients that may be writing."""

    def __init__(self, uploads: Uploads, dram: DramTier, tasks: Tasks, *, offered: bool) -> None:
        """First sets the space aside that clients of an earlier daemon may still be writing."""
        self._uploads = uploads
        self._dram = dram
        self._tasks = tasks
        self._offered = offered
        self._directory = dram.arena.directory / WRITERS_NAME
        self._writers: dict[Client, Writer] = {}
        self._open: dict[int, _InPlaceUpload] = {}
        self._leaving = set(Writer.left_behind(self._directory, dram.arena.arena_id))  # Until their locks are released.
        for writer in self._leaving:
            for extent in writer.extents:
                if dram.set_aside(extent.offset_bytes, extent.size_bytes) is None:
                    writer.forget(extent)  # It was committed, so the record is right.

    def start(self) -> None:
        """Free the space of writers that have released their lock. Call it on a running event loop."""
        for writer in self._leaving:
            self._tasks.start(self._until_gone(writer), "a writer of an earlier daemon")

    @property
    def set_aside(self) -> list[Extent]:
        """The space of clients that may be writing and whose attachment has ended, at this or an earlier daemon."""
        return [extent for writer in list(self._leaving) for extent in list(writer.extents)]

    @property
    def refused_because(self) -> str:
        """Why clients cannot write in place; empty if they can."""
        return self._dram.arena.not_shared_because or ("" if self._offered else "dram.share is not writable")

    def writer(self, client: Client) -> Writer:
        """The client's writer, whose lock it holds. Raises NotShared or NoWriterLock."""
        if why := self.refused_because:
            raise NotShared(f"blocks cannot be written in place: {why}")
        writer = self._writers.get(client)
        if writer is not None:
            writer.check_locked()
            return writer
        writer = self._writers[client] = Writer.open(self._directory, client.client_id, self._dram.arena.arena_id)
        client.on_detach.add(lambda: self._detached(client))
        return writer

    async def reserve(
        self, caller: Caller, number: int, client: Client, request: SaveRequest, *, on_ssd: bool
    ) -> tuple[list[Place], dict[int, KVError]]:
        """The places to write, and why blocks were refused, by position. Waits, as a save does, for other saves of the
        same blocks, and for space.

        Raises InvalidRequest, Overloaded, NotShared, NoWriterLock, IncompleteSave.
        """
        if not number or number in self._open:
            raise InvalidRequest("reservation_id is 0 or in use: choose another", field="reservation_id")
        if sum(each.client is client for each in self._open.values()) >= IN_PLACE_UPLOADS_PER_CLIENT_MAX:
            error = Overloaded(f"the client holds {IN_PLACE_UPLOADS_PER_CLIENT_MAX} reservations, the most it may")
            self._uploads.note_refused(request.keys, error.reason)
            raise error
        space = _WrittenInPlace(self._dram, self.writer(client))
        upload = self._uploads.begin(caller, client, request, space, "in_place")
        self._open[number] = _InPlaceUpload(client, upload, space, on_ssd)
        try:
            await upload.claim()
        except BaseException:
            self._open.pop(number, None)
            raise
        space.may_be_written = True
        return upload.places, upload.outcome.refused

    async def commit(self, caller: Caller, number: int, client: Client, checksums: NDArray[np.uint64]) -> SaveOutcome:
        """Raises ReservationEnded, ReservationNotYours; InvalidRequest, after which the upload continues."""
        found = self._get(number, client)
        if found is None or not found.space.may_be_written:
            raise ReservationEnded("there is no such reservation: reserve again", reservation_id=number)
        found.upload.check_written(checksums)
        del self._open[number]
        found.space.written(found.upload.places)
        return await found.upload.commit_written(checksums, on_ssd=found.on_ssd)

    def abandon(self, caller: Caller, number: int, client: Client) -> None:
        """The client writes no more, and abandons the blocks. Raises ReservationNotYours."""
        found = self._get(number, client)
        if found is not None:
            del self._open[number]
            found.space.may_be_written = False
            found.upload.close()

    def _get(self, number: int, client: Client) -> _InPlaceUpload | None:
        found = self._open.get(number)
        if found is not None and found.client is not client:
            raise ReservationNotYours("the reservation belongs to another client", reservation_id=number)
        return found

    def _detached(self, client: Client) -> None:
        self._open = {number: each for number, each in self._open.items() if each.client is not client}
        writer = self._writers.pop(client)
        self._leaving.add(writer)
        # As a task, so that the client's other resources end first.
        self._tasks.start(self._until_gone(writer), "a writer whose client has disconnected")

    async def _until_gone(self, writer: Writer) -> None:
        """Wait for the end of the process that may be writing; then free its space."""
        try:
            while not writer.remove_if_unlocked():  # Another process unlocks it.
                await self._uploads.clock.sleep(_LOOK_EVERY_S)
        except asyncio.CancelledError:
            writer.close()  # The daemon ends, and the next one finds the file.
            raise
        self._leaving.discard(writer)
        extents = writer.extents
        for count, extent in enumerate(extents):
            if count % _RELEASED_A_TURN == _RELEASED_A_TURN - 1:
                await asyncio.sleep(0)
            self._dram.release(extent)
        if extents:
            log.info("a client ended while it wrote in place; its %d extents are free again", len(extents))
