"""Saves in place: a client reserves blocks, writes their slices into the arena itself, and commits.

A reservation is an ingest whose bytes do not pass through the daemon. What differs is the end: space
that a client may still be writing is lent again only after it has said that it writes no more, or
when the lock that says otherwise is gone (``tiers/writers.py``). Never by time: a stopped process
that goes on would write into somebody else's block.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.miss_reasons import Reason
from kvservice.store.tasks import Tasks
from kvservice.store.transfers.upload import Ingest, Ingests, SaveOutcome, SaveRequest
from kvservice.tiers.dram import DramTier
from kvservice.tiers.writers import Writer
from kvservice_api.arena import WRITERS_NAME
from kvservice_api.errors import InvalidRequest, NotShared, Overloaded, ReservationEnded, ReservationNotYours

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_PER_CLIENT_MAX = 64
_RELEASED_A_TURN = 64  # A millisecond of the event loop.


class Place(NamedTuple):
    """Where a block's image begins in the arena."""

    position: int  # In the save's keys.
    extent: Extent


class Reservation(Ingest):
    """Blocks of one save that the client writes in place."""

    def __init__(
        self, ingests: Ingests, caller: Caller, client: Client, request: SaveRequest, writer: Writer, *, on_ssd: bool
    ) -> None:
        super().__init__(ingests, caller, client, request)
        self.client = client
        self._writer = writer
        self._on_ssd = on_ssd
        self._may_be_written = False  # The client was told, and has not said yet that it has stopped.

    @property
    def places(self) -> list[Place]:
        """What the client is to write, by position."""
        lent = (Place(upload.position, upload.extent) for upload in self._uploads.values() if upload.extent is not None)
        return sorted(lent)

    @property
    def outcome(self) -> SaveOutcome:
        return self._outcome

    @property
    def is_handed_over(self) -> bool:
        return self._may_be_written

    def hand_over(self) -> list[Place]:
        """The places, for an answer to the client."""
        self._may_be_written = True
        return self.places

    def check(self, checksums: NDArray[np.uint64]) -> None:
        """Raises InvalidRequest where they are not one a slice of what was handed over."""
        layers = self._request.shard.layers
        if len(checksums) != layers * len(self._uploads):
            raise InvalidRequest(
                f"{len(checksums)} checksums came for {len(self._uploads)} reserved blocks of {layers} layers",
                field="checksums",
            )

    async def commit_in_place(self, checksums: NDArray[np.uint64]) -> SaveOutcome:
        """Make the blocks visible. `checksums`: one a slice of what was handed over, ``[block, layer]`` flattened."""
        uploads = sorted(self._uploads.values(), key=lambda upload: upload.position)
        self._committing = True  # Whoever detaches the client now leaves the extents to this commit.
        self._may_be_written = False
        for place in self.places:
            self._writer.forget(place.extent)  # Before the record: nobody writes there any more, whatever comes next.
        positions = [upload.position for upload in uploads]
        self._checksums[positions] = checksums.reshape(len(uploads), self._request.shard.layers)
        try:
            rows = await self._record(uploads)
            await self._finish(uploads, rows, on_ssd=self._on_ssd)
        finally:
            self._close()
        return self._outcome

    def abandon(self) -> None:
        """The client writes no more, and wants nothing of it stored."""
        self._may_be_written = False
        self._close()

    def _lent(self, extent: Extent) -> None:
        self._writer.note(extent)

    def _give_back(self, extent: Extent) -> None:
        if self._may_be_written:
            return  # The client is gone, or seems so. The space comes back with its lock.
        self._writer.forget(extent)
        super()._give_back(extent)


class Reservations:
    """All reservations, and the clients that may be writing."""

    def __init__(self, ingests: Ingests, dram: DramTier, tasks: Tasks, *, offered: bool) -> None:
        """Sets aside, first of all, what clients of an earlier daemon may still be writing."""
        self._ingests = ingests
        self._dram = dram
        self._tasks = tasks
        self._offered = offered
        self._directory = dram.arena_directory / WRITERS_NAME
        self._writers: dict[Client, Writer] = {}
        self._open: dict[int, Reservation] = {}
        self._leaving = set(Writer.left_behind(self._directory, dram.arena_id))  # Until their locks are released.
        for writer in self._leaving:
            for extent in writer.extents:
                if dram.set_aside(extent.offset_bytes, extent.size_bytes) is None:
                    writer.forget(extent)  # It was committed: the record wins.

    def start(self) -> None:
        """Take space back from writers that are gone. Needs a running event loop."""
        for writer in self._leaving:
            self._tasks.start(self._until_gone(writer), "a writer of before")

    @property
    def set_aside(self) -> list[Extent]:
        """What clients may be writing whose attachment has ended, here or at an earlier daemon."""
        return [extent for writer in self._leaving for extent in writer.extents]

    @property
    def refused_because(self) -> str:
        """Why clients cannot write in place; empty where they can."""
        return self._dram.not_shared_because or ("" if self._offered else "dram.share is not writable")

    def writer(self, client: Client) -> Writer:
        """The client's, whose lock it holds. Raises NotShared or NoWriterLock."""
        if why := self.refused_because:
            raise NotShared(f"blocks cannot be written in place: {why}")
        writer = self._writers.get(client)
        if writer is not None:
            writer.check_locked()
            return writer
        writer = self._writers[client] = Writer.open(self._directory, client.client_id, self._dram.arena_id)
        client.on_detach.add(lambda: self._detached(client))
        return writer

    async def reserve(
        self, caller: Caller, reservation_id: int, client: Client, request: SaveRequest, *, on_ssd: bool
    ) -> tuple[Reservation, list[Place]]:
        """Waits, as a save does, for others that store the same blocks, and for room."""
        if not reservation_id or reservation_id in self._open:
            raise InvalidRequest("reservation_id is 0 or in use: draw another", field="reservation_id")
        if sum(each.client is client for each in self._open.values()) >= _PER_CLIENT_MAX:
            error = Overloaded(f"the client holds {_PER_CLIENT_MAX} reservations, the most it may")
            self._ingests.lifecycle.history.note_keys(request.keys, Reason.REFUSED, error.reason)
            raise error
        self._ingests.check(request)
        reservation = Reservation(self._ingests, caller, client, request, self.writer(client), on_ssd=on_ssd)
        self._open[reservation_id] = reservation
        try:
            await reservation.__aenter__()
        except BaseException:
            self._open.pop(reservation_id, None)
            raise
        return reservation, reservation.hand_over()

    async def commit(
        self, caller: Caller, reservation_id: int, client: Client, checksums: NDArray[np.uint64]
    ) -> SaveOutcome:
        """Raises ReservationEnded, ReservationNotYours; InvalidRequest, after which the reservation goes on."""
        reservation = self._get(reservation_id, client)
        if reservation is None or not reservation.is_handed_over:
            raise ReservationEnded("there is no such reservation: reserve again", reservation_id=reservation_id)
        reservation.check(checksums)
        del self._open[reservation_id]
        return await reservation.commit_in_place(checksums)

    def abandon(self, caller: Caller, reservation_id: int, client: Client) -> None:
        """Raises ReservationNotYours."""
        reservation = self._get(reservation_id, client)
        if reservation is not None:
            del self._open[reservation_id]
            reservation.abandon()

    def _get(self, reservation_id: int, client: Client) -> Reservation | None:
        reservation = self._open.get(reservation_id)
        if reservation is not None and reservation.client is not client:
            raise ReservationNotYours("the reservation belongs to another client", reservation_id=reservation_id)
        return reservation

    def _detached(self, client: Client) -> None:
        self._open = {number: each for number, each in self._open.items() if each.client is not client}
        writer = self._writers.pop(client)
        self._leaving.add(writer)
        # As a task: whatever else hangs on the client ends first.
        self._tasks.start(self._until_gone(writer), "a writer that has gone")

    async def _until_gone(self, writer: Writer) -> None:
        """Look for the end of the process that may be writing; its space is free then."""
        try:
            while not writer.remove_if_unlocked():  # noqa: ASYNC110  (another process ends it)
                await asyncio.sleep(_LOOK_EVERY_S)
        except asyncio.CancelledError:
            writer.close()  # The daemon ends: the next one finds the file.
            raise
        self._leaving.discard(writer)
        extents = writer.extents
        for count, extent in enumerate(extents):
            if count % _RELEASED_A_TURN == _RELEASED_A_TURN - 1:
                await asyncio.sleep(0)
            self._dram.release(extent)
        if extents:
            log.info("a client ended while it wrote in place; its %d extents are free again", len(extents))
