"""The parts of a block's slices that have arrived from its client."""

from __future__ import annotations

from bisect import bisect_left

from kvservice_api.errors import InvalidFrame
from kvservice_api.image import BlockGeometry

_RUNS_MIN = 16  # Apart from each other, of any slice; larger slices may have one more for each
_RUN_BYTES = 4 << 10  # of their bytes. Each takes 140 bytes and some time.


class ArrivedSlices:
    """Which bytes of one block's slices have arrived. Frames may arrive in any order, none twice."""

    def __init__(self, geometry: BlockGeometry) -> None:
        self._geometry = geometry
        self._complete = bytearray(geometry.slice_count)
        # Per incomplete slice: sorted, never adjacent. Complete slices have no objects, whose release would take time.
        self._runs: dict[int, list[tuple[int, int]]] = {}
        self.missing = geometry.slice_count

    def add(self, layer: int, start: int, end: int) -> bool:
        """Note a part of a slice. True when the slice is now complete.

        Raises InvalidFrame on overlap, or if there are too many gaps.
        """
        if self._complete[layer]:
            raise InvalidFrame(f"bytes {start}..{end} of layer {layer} arrived before", layer=layer)
        whole = (0, self._geometry.slice_bytes(layer))
        runs = self._runs.setdefault(layer, []) if (start, end) != whole else self._runs.get(layer, [])
        at = bisect_left(runs, (start, end))
        if (at and runs[at - 1][1] > start) or (at < len(runs) and runs[at][0] < end):
            raise InvalidFrame(f"bytes {start}..{end} of layer {layer} arrived before", layer=layer)
        joins_before = at > 0 and runs[at - 1][1] == start
        joins_after = at < len(runs) and runs[at][0] == end
        if not joins_before and not joins_after and len(runs) >= _RUNS_MIN + whole[1] // _RUN_BYTES:
            raise InvalidFrame(f"the bytes of layer {layer} arrive with over {len(runs)} gaps", layer=layer)
        run = (runs[at - 1][0] if joins_before else start, runs[at][1] if joins_after else end)
        if run != whole:
            runs[at - joins_before : at + joins_after] = [run]
            return False
        self._runs.pop(layer, None)
        self._complete[layer] = True
        self.missing -= 1
        return True
