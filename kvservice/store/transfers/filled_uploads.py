"""Uploads whose bytes the daemon's own threads write to their places: out of an engine's GPU memory, or from sockets.

The event loop may end such an upload while a copy runs, because its client has disconnected. The places stay reserved
until the caller says that nothing writes there any more: it leaves the upload's block.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.transfers.save_request import Place, SaveOutcome, SavePath, SaveRequest
from kvservice.store.transfers.upload import Uploads
from kvservice.tiers.dram import DramTier
from kvservice_api.errors import KVError


class _SpaceInUse:
    """Space that is free only once `release` is called."""

    def __init__(self, dram: DramTier) -> None:
        self._dram = dram
        self._returned: list[Extent] = []

    def reserved(self, extent: Extent) -> None:
        pass

    def returned(self, extent: Extent) -> None:
        self._returned.append(extent)

    def release(self) -> None:
        returned, self._returned = self._returned, []
        for extent in returned:
            self._dram.release(extent)


class FilledUpload:
    """Use it as ``async with``: leaving it without a commit abandons the blocks. No thread may write any more then."""

    def __init__(self, uploads: Uploads, caller: Caller, client: Client, request: SaveRequest, path: SavePath) -> None:
        """Use `Saves.fill`."""
        self.request = request
        self._dram = uploads.dram
        self._space = _SpaceInUse(uploads.dram)
        self._upload = uploads.begin(caller, client, request, self._space, path)

    @property
    def places(self) -> list[Place]:
        """Where the blocks are to be written, by position; the others are stored already, or refused."""
        return self._upload.places

    @property
    def refused(self) -> dict[int, KVError]:
        """Why blocks that are not stored have no place, by position."""
        return self._upload.outcome.refused

    def memory(self, place: Place) -> memoryview:
        """The place's bytes, writable. They are another's once this upload's block is left."""
        return self._dram.view(place.extent)

    async def commit(
        self, checksums: NDArray[np.uint64], *, on_ssd: bool, expected: NDArray[np.uint64] | None = None
    ) -> SaveOutcome:
        """Make the blocks of `places` visible. `checksums`: u64 of the bytes there, ``[place, layer]`` flattened.

        With the checksums that the client `expected`, in the same order, blocks with others are refused with
        UploadCorrupted. Raises IncompleteSave if the client has disconnected, InvalidRequest for another number of
        checksums.
        """
        self._upload.check_open()  # First: an upload that has ended has no slices, so any checksums are too many.
        for each in (checksums, expected):
            if each is not None:
                self._upload.check_written(each)
        return await self._upload.commit_written(checksums, on_ssd=on_ssd, are_verified=True, expected=expected)

    async def __aenter__(self) -> Self:
        """Claims the blocks, and waits for space. Raises Overloaded, IncompleteSave."""
        try:
            await self._upload.__aenter__()
        except BaseException:
            self._space.release()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._upload.close()
        self._space.release()
