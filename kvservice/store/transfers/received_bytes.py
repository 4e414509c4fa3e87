"""The bytes of an upload as threads receive them from sockets: where each goes, which are there, their checksums."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.store.transfers.filled_uploads import FilledUpload
from kvservice_api.byte_ranges import ByteRanges
from kvservice_api.copying import STREAMED_BYTES_MIN
from kvservice_api.errors import InvalidFrame
from kvservice_api.image import block_geometry, checksum, layer_starts

_RANGES_MIN = 16  # Apart from each other. There may be one more for each slice, and one for each
_RANGE_BYTES = 4 << 10  # of the upload's bytes. Each takes 140 bytes.


class ClaimedBytes(NamedTuple):
    """Bytes that one thread is about to receive, and where they go."""

    memory: list[memoryview]  # One piece per slice, in the order of the transfer.
    first_slice: int  # Of all slices of the upload, in that order.


class ReceivedBytes:
    """Of one upload, while its block is not left. Any thread may call it.

    The bytes of a transfer are in one order, [layer, place], and a message is a range of it. So a message costs about
    the same with many slices as with few: each slice needs only a view of its memory.
    """

    def __init__(self, upload: FilledUpload) -> None:
        request, places = upload.request, upload.places
        self._number_of = {place.position: number for number, place in enumerate(places)}
        self._memory = [upload.memory(place) for place in places]
        counts = [request.token_counts[place.position] for place in places]
        self._geometries = [block_geometry(request.layout, request.shard, count) for count in counts]
        self._starts = layer_starts(request.layout, request.shard, counts)
        self._layer_begins = list(accumulate((starts[-1] for starts in self._starts), initial=0))
        self.missing_bytes = self._layer_begins[-1]
        self.is_large = self.missing_bytes >= STREAMED_BYTES_MIN  # The caches do not hold it.
        self._sums = np.zeros((len(self._starts), len(places)), np.uint64)  # Of the slices that are there.
        self.slice_count = self._sums.size
        self._claimed = ByteRanges(_RANGES_MIN + self.slice_count + self.missing_bytes // _RANGE_BYTES)
        self._partial: dict[int, int] = {}  # How much of a slice is there, until all of it is.
        self._lock = threading.Lock()

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """[place, layer] flattened, once no bytes are missing."""
        return self._sums.T.reshape(-1)

    def claim(self, layer: int, first_block: int, offset_bytes: int, size_bytes: int) -> ClaimedBytes:
        """Where the bytes of a message go.

        Raises InvalidFrame if they are outside the save, begin in a block without a place, or were claimed before.
        """
        number = self._number_of.get(first_block)
        if layer >= len(self._starts) or number is None:
            raise InvalidFrame(f"layer {layer} of block {first_block} is not to be sent", layer=layer)
        starts = self._starts[layer]
        if offset_bytes >= starts[number + 1] - starts[number] or not size_bytes:
            raise InvalidFrame("the message is empty, or starts after its block's slice", layer=layer)
        begin = self._layer_begins[layer] + starts[number] + offset_bytes
        end = begin + size_bytes
        if end > self._layer_begins[-1]:
            raise InvalidFrame("the message reaches beyond the last block", layer=layer)
        with self._lock:
            self._claimed.add(begin, end)
        first_slice = layer * len(self._memory) + number
        memory: list[memoryview] = []
        while end > (layer_begin := self._layer_begins[layer]):
            behind = bisect_left(self._starts[layer], min(end, self._layer_begins[layer + 1]) - layer_begin)
            for each in range(number, behind):
                start, stop = self._geometries[each].slices[layer][:2]
                memory.append(self._memory[each][start:stop])
            layer, number, behind_bytes = layer + 1, 0, layer_begin + self._starts[layer][behind] - end
        memory[-1] = memory[-1][: len(memory[-1]) - behind_bytes]
        memory[0] = memory[0][offset_bytes:]
        return ClaimedBytes(memory, first_slice)

    def arrived(self, claimed: ClaimedBytes, sums: Sequence[int]) -> None:
        """All of these bytes are in memory, and these are the checksums of their pieces. A slice that came in several
        pieces is hashed here once it is complete.
        """
        first, count = claimed.first_slice, len(claimed.memory)
        self._sums.reshape(-1)[first : first + count] = sums
        for at in {0, count - 1}:
            self._note_part(first + at, len(claimed.memory[at]))
        with self._lock:
            self.missing_bytes -= sum(map(len, claimed.memory))

    def _note_part(self, number: int, size_bytes: int) -> None:
        """So many bytes of this slice are there, and its checksum if they are all."""
        layer, place = divmod(number, len(self._memory))
        start, stop = self._geometries[place].slice_range(layer)
        if size_bytes == stop - start:
            return
        with self._lock:
            size_bytes += self._partial.pop(number, 0)
            if size_bytes < stop - start:
                self._partial[number] = size_bytes
                return
        self._sums[layer, place] = checksum(self._memory[place][start:stop])
