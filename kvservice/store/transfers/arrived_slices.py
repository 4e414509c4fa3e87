"""The parts of a block's slices that have arrived from its client."""

from __future__ import annotations

from kvservice_api.byte_ranges import ByteRanges
from kvservice_api.errors import InvalidFrame
from kvservice_api.image import BlockGeometry

_RANGES_MIN = 16  # Apart from each other, of any slice; larger slices may have one more for each
_RANGE_BYTES = 4 << 10  # of their bytes. Each takes 140 bytes and some time.


class ArrivedSlices:
    """Which bytes of one block's slices have arrived. Frames may arrive in any order, none twice."""

    def __init__(self, geometry: BlockGeometry) -> None:
        self._geometry = geometry
        self._complete = bytearray(geometry.slice_count)
        # Of incomplete slices. Complete ones have no objects, whose release would take time.
        self._partial: dict[int, ByteRanges] = {}
        self.missing = geometry.slice_count

    def add(self, layer: int, start: int, end: int) -> bool:
        """Note a part of a slice. True when the slice is now complete.

        Raises InvalidFrame on overlap, or if there are too many gaps.
        """
        size_bytes = self._geometry.slice_bytes(layer)
        if self._complete[layer]:
            raise InvalidFrame(f"bytes {start}..{end} of layer {layer} arrived before", layer=layer)
        arrived = self._partial.get(layer)
        if arrived is not None or (start, end) != (0, size_bytes):
            if arrived is None:
                ranges_max = _RANGES_MIN + size_bytes // _RANGE_BYTES
                arrived = self._partial[layer] = ByteRanges(ranges_max, f"layer {layer}", layer=layer)
            arrived.add(start, end)
            if not arrived.is_all(size_bytes):
                return False
            del self._partial[layer]
        self._complete[layer] = True
        self.missing -= 1
        return True
