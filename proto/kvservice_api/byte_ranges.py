"""Which bytes of a transfer, or of a slice, were claimed or have arrived: ranges, each byte once."""

from __future__ import annotations

import math
from bisect import bisect_left

from kvservice_api.errors import InvalidFrame


class ByteRanges:
    """Ranges of bytes, ascending and with a gap between any two. For one thread at a time."""

    def __init__(self, ranges_max: float = math.inf, of: str = "the transfer", **details: object) -> None:
        """`of` and `details` are for errors: what the bytes are of."""
        self._ranges: list[tuple[int, int]] = []
        self._ranges_max, self._of, self._details = ranges_max, of, details

    def is_all(self, size_bytes: int) -> bool:
        """Whether it has the first `size_bytes` bytes, and no others."""
        return self._ranges == [(0, size_bytes)]

    def add(self, begin: int, end: int) -> None:
        """Claim these bytes, at least one. Raises InvalidFrame if any was claimed before, or for too many gaps."""
        ranges = self._ranges
        at = bisect_left(ranges, (begin, end))
        if (at and ranges[at - 1][1] > begin) or (at < len(ranges) and ranges[at][0] < end):
            raise InvalidFrame(f"bytes {begin}..{end} of {self._of} arrived before", **self._details)
        joins_before = at > 0 and ranges[at - 1][1] == begin
        joins_after = at < len(ranges) and ranges[at][0] == end
        if not joins_before and not joins_after and len(ranges) >= self._ranges_max:
            raise InvalidFrame(f"the bytes of {self._of} arrive with over {len(ranges)} gaps", **self._details)
        first = ranges[at - 1][0] if joins_before else begin
        ranges[at - joins_before : at + joins_after] = [(first, ranges[at][1] if joins_after else end)]
