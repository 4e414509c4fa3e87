"""The bytes of an upload as threads receive them from sockets: where each goes, which are there, their checksums."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvservice.store.transfers.arrived_slices import ArrivedSlices
from kvservice.store.transfers.filled_uploads import FilledUpload
from kvservice_api.copying import STREAMED_BYTES_MIN
from kvservice_api.errors import InvalidFrame
from kvservice_api.image import block_geometry, checksum, layer_starts


class ReceivedPiece(NamedTuple):
    """Bytes of one slice, and where they go."""

    memory: memoryview
    place: int  # Its number among the upload's places.
    layer: int


class ReceivedBytes:
    """Of one upload, while its block is not left. Any thread may call it."""

    def __init__(self, upload: FilledUpload) -> None:
        request = upload.request
        self.positions = [place.position for place in upload.places]
        self._number_of = {position: number for number, position in enumerate(self.positions)}
        self._memory = [upload.memory(place) for place in upload.places]
        counts = request.token_counts
        self._geometries = [
            block_geometry(request.layout, request.shard, counts[position]) for position in self.positions
        ]
        self.is_large = sum(map(len, self._memory)) >= STREAMED_BYTES_MIN  # The caches do not hold it.
        self._claimed = [ArrivedSlices(geometry) for geometry in self._geometries]
        self._starts = layer_starts(request.layout, request.shard, counts)
        self._partial: dict[tuple[int, int], int] = {}  # How much of a slice is there, until all of it is.
        self._lock = threading.Lock()
        self.checksums = np.zeros((len(self.positions), request.shard.layers), np.uint64)  # Of the complete slices.
        self.missing_slices = self.checksums.size

    def claim(self, layer: int, first_block: int, offset_bytes: int, size_bytes: int) -> list[ReceivedPiece]:
        """Where bytes of one layer go that one thread is about to receive.

        Raises InvalidFrame if they are outside the save, of a block without a place, or were claimed before.
        """
        if layer >= len(self._starts) or first_block + 1 >= len(self._starts[layer]):
            raise InvalidFrame(f"layer {layer} or block {first_block} is outside the save", layer=layer)
        starts = self._starts[layer]
        start = starts[first_block] + offset_bytes
        if start >= starts[first_block + 1] or not size_bytes:
            raise InvalidFrame("the message is empty, or starts after its block's slice", layer=layer)
        end = start + size_bytes
        if end > starts[-1]:
            raise InvalidFrame("the message reaches beyond the last block", layer=layer)
        pieces: list[ReceivedPiece] = []
        block = first_block
        with self._lock:
            while start < end:
                begin, stop = start - starts[block], min(end, starts[block + 1]) - starts[block]
                if (number := self._number_of.get(block)) is None:
                    raise InvalidFrame(f"block {block} is not to be sent", block=block)
                self._claimed[number].add(layer, begin, stop)
                at = self._geometries[number].slice_range(layer)[0]
                pieces.append(ReceivedPiece(self._memory[number][at + begin : at + stop], number, layer))
                start += stop - begin
                block += 1
        return pieces

    def arrived(self, pieces: Sequence[ReceivedPiece], sums: Sequence[int]) -> None:
        """All bytes of these claimed pieces are in memory, whose checksums are these. A slice that came in several
        pieces is hashed here once it is complete.
        """
        complete = 0
        for piece, found in zip(pieces, sums, strict=True):
            where = (piece.place, piece.layer)
            begin, end = self._geometries[piece.place].slice_range(piece.layer)
            if (size := len(piece.memory)) < end - begin:
                with self._lock:
                    size += self._partial.pop(where, 0)
                    if size < end - begin:
                        self._partial[where] = size
                        continue
                found = checksum(self._memory[piece.place][begin:end])
            self.checksums[where] = found
            complete += 1
        with self._lock:
            self.missing_slices -= complete
