"""The bytes of an upload that arrive in frames: copied to their destinations, and hashed there.

Called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvservice.store.transfers.upload_state import Destination, UploadState
from kvservice_api.copying import STREAMED_BYTES_MIN, copy_slices
from kvservice_api.errors import InvalidFrame
from kvservice_api.frames import Frame
from kvservice_api.image import checksum, layer_starts

_HASH_IN_THREAD_BYTES = 1 << 20  # Below this size, hashing is faster than the hand-over to a thread.


class FrameWriter:
    """Writes the frames of one upload. Its state has the checksums of complete slices once `hashed` has returned."""

    def __init__(self, state: UploadState) -> None:
        self._state = state
        request = state.request
        self._layer_starts = layer_starts(request.layout, request.shard, request.token_counts)
        self._is_large = sum(starts[-1] for starts in self._layer_starts) >= STREAMED_BYTES_MIN
        self._hashing: set[asyncio.Future[int]] = set()

    def write(self, frame: Frame) -> None:
        """Copy a frame's bytes to their place. Raises InvalidFrame; the caller then ends the save."""
        request = self._state.request
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
        whole: list[tuple[Destination, int, int]] = []  # Slices that this frame has all of: begin in it, size.
        block, taken = frame.first_block, 0
        while taken < len(payload):
            offset = start + taken - starts[block]
            size = min(len(payload) - taken, starts[block + 1] - starts[block] - offset)
            destination = self._state.destinations.get(block)
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

    def _put(self, destination: Destination, layer: int, offset: int, data: NDArray[np.uint8]) -> None:
        assert destination.image is not None
        complete = destination.slices.add(layer, offset, offset + len(data))
        begin, end = destination.geometry.slice_range(layer)
        image = np.frombuffer(destination.image, np.uint8)
        np.copyto(image[begin + offset : begin + offset + len(data)], data)
        if complete:
            self._hash(destination, layer, destination.image[begin:end])

    def _put_whole(self, whole: Sequence[tuple[Destination, int, int]], layer: int, payload: NDArray[np.uint8]) -> None:
        """Copy whole slices of one layer, and compute their checksums in the same pass."""
        images, slices, runs = [], [], []
        for number, (destination, begin, size) in enumerate(whole):
            assert destination.image is not None
            images.append(np.frombuffer(destination.image, np.uint8))
            slices.append((0, begin, size, 1))
            runs.append((number, destination.geometry.slice_range(layer)[0], 0, 1, size, 0))
        tables = np.array(slices, np.int64), np.array(runs, np.int64)
        # In the caches, a large save's blocks would replace the frames that gRPC has received and copies next.
        sums = copy_slices([payload], images, *tables, streamed=self._is_large)
        self._state.checksums[[each.position for each, _, _ in whole], layer] = sums

    def _hash(self, destination: Destination, layer: int, data: memoryview) -> None:
        """Compute the checksum of the bytes in the arena now, while they are still in the processor's cache."""
        if len(data) <= _HASH_IN_THREAD_BYTES:
            self._state.checksums[destination.position, layer] = checksum(data)
            return

        def note(job: asyncio.Future[int]) -> None:
            self._state.checksums[destination.position, layer] = job.result()

        job = asyncio.get_running_loop().run_in_executor(None, checksum, data)
        job.add_done_callback(note)
        self._hashing.add(job)
        job.add_done_callback(self._hashing.discard)

    async def hashed(self) -> None:
        """Wait until all complete slices have their checksum."""
        if self._hashing:
            await asyncio.wait(self._hashing)
