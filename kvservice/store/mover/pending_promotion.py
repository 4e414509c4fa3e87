"""One block that is being copied to DRAM. Loads read its verified layers before the last one is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Extent, TierName
from kvservice.store import image_check
from kvservice.store.image_check import ImagePiece
from kvservice_api.errors import KVError
from kvservice_api.image import BlockGeometry, Trailer

if TYPE_CHECKING:
    from kvservice.store.mover.piece_reader import ReadBatch
    from kvservice.store.mover.read_order import ReadOrder


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """The copy that is read: an I/O thread may use it, unlike the block table."""

    tier: TierName
    extent: Extent
    key: bytes  # Of the block.
    trailer_checksum: int


class PendingPromotion:
    """A block that is being copied to DRAM. Its verified layers can be read before the last one has been read."""

    def __init__(
        self,
        row: int,
        generation: int,
        geometry: BlockGeometry,
        source: StoredCopy,
        extent: Extent,
        image: memoryview,
        *,
        due_s: float,
        pieces: Sequence[ImagePiece],
    ) -> None:
        self.row = row
        self.generation = generation
        self.geometry = geometry
        self.source = source
        self.pieces = pieces  # Small ones first.
        self.extent = extent
        self.image = image
        self.trailer: Trailer | None = None
        self.done = asyncio.Event()
        self.error: KVError | None = None
        self._readers = 0
        self._is_verified = [False] * geometry.slice_count
        self._more = asyncio.Event()
        # For its order, once its reads have begun:
        self.order: ReadOrder | None = None
        self.due_s = due_s  # Monotonic time by which a request needs it.
        self.next_piece = 0
        # For its reader:
        self.batch: ReadBatch | None = None
        self.pieces_left = len(pieces)  # Not read yet.

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """One checksum per layer. Valid once a layer is ready."""
        assert self.trailer is not None
        return self.trailer.checksums

    async def layer_ready(self, layer: int) -> None:
        """Wait until the layer is read and verified. Raises the error with which the promotion failed."""
        while not self.is_ready(layer):
            await self._more.wait()

    def is_ready(self, layer: int) -> bool:
        """Whether the layer is read and verified. Raises as `layer_ready`."""
        if not self._is_verified[layer] and self.error is not None:
            raise self.error
        return self._is_verified[layer]

    def ready_until(self, layer: int) -> int:
        """The end of the layers from `layer` on that are read and verified. Pieces may be read in another order."""
        while layer < len(self._is_verified) and self._is_verified[layer]:
            layer += 1
        return layer

    async def trailer_known(self) -> None:
        """Wait until the trailer is read, or the promotion has failed."""
        while self.trailer is None and self.error is None:
            await self._more.wait()

    def begin_reading(self) -> None:
        """Keep the image in place until `end_reading`, also if the promotion fails."""
        self._readers += 1

    def end_reading(self) -> None:
        self._readers -= 1
        self.wake()

    async def unread(self) -> None:
        """Wait until no load reads the image."""
        while self._readers:
            await self._more.wait()

    def read_trailer(self) -> None:
        """Take it from the image, whose end was read. It stays None if it is damaged. Any thread may call this."""
        end = self.image[image_check.trailer_start(self.geometry) :]
        self.trailer = image_check.read_trailer(end, self.geometry, self.source.key, self.source.trailer_checksum)

    def piece_verified(self, piece: ImagePiece) -> None:
        """Any thread may call it; `wake` has to follow on the event loop."""
        for layer in range(piece.layer_begin, piece.layer_end):
            self._is_verified[layer] = True

    def failed(self, error: KVError) -> None:
        if self.error is None:
            self.error = error
        self.wake()

    def wake(self) -> None:
        """Have those that wait look again."""
        self._more.set()
        self._more.clear()  # Those that waited return nevertheless.
