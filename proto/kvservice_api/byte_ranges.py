"""Which bytes of a transfer are claimed: ranges of their order, each byte once."""

from __future__ import annotations

import math
from bisect import bisect_left

from kvservice_api.errors import InvalidFrame


class ByteRanges:
    """Ranges of bytes, ascending and with a gap between any two. For one thread at a time."""

    def __init__(self, ranges_max: float = math.inf) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._ranges_max = ranges_max

    def add(self, begin: int, end: int) -> None:
        """Claim these bytes, at least one. Raises InvalidFrame if any was claimed before, or for too many gaps."""
        ranges = self._ranges
        at = bisect_left(ranges, (begin, end))
        if (at and ranges[at - 1][1] > begin) or (at < len(ranges) and ranges[at][0] < end):
            raise InvalidFrame(f"bytes {begin}..{end} of the transfer arrived before")
        joins_before = at > 0 and ranges[at - 1][1] == begin
        joins_after = at < len(ranges) and ranges[at][0] == end
        if not joins_before and not joins_after and len(ranges) >= self._ranges_max:
            raise InvalidFrame(f"the bytes of the transfer arrive with over {len(ranges)} gaps")
        first = ranges[at - 1][0] if joins_before else begin
        ranges[at - joins_before : at + joins_after] = [(first, ranges[at][1] if joins_after else end)]
