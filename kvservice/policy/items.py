"""The table of items that placement policies score: sessions and shared prefixes, as rows of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NOT_QUEUED = -1

_COLUMNS = {
    "size_bytes": np.int64,  # Size of the whole item at its last save.
    "dram_bytes": np.int64,  # Length of its prefix in DRAM, without `coming_bytes`.
    "ssd_bytes": np.int64,  # Length of its prefix on SSD.
    "coming_bytes": np.int64,  # Space in DRAM that a running promotion has reserved.
    "in_use": np.int32,  # Requests that run on it now. While it is above 0, the item is not evicted.
    "access_seq": np.int64,  # Order of last uses. For the items of one request, a prefix is later than its suffix.
    "unwanted_on_ssd": np.bool_,  # Evicted from SSD, and not used since.
    "used_at_s": np.float64,  # End of its last use, when the think time starts. NaN before the first.
    "uses": np.int64,  # Requests that used it, with those that run now.
    "answer_tokens": np.int64,  # Tokens of the last answer; 0 if that is not known.
    "queue_seq": np.int64,  # Its request's number in the engine's queue (see Conditions), or NOT_QUEUED.
    "hint": np.int8,  # The last hint since its last use: 0 for none, else an index into HINTS.
    "hinted_at_s": np.float64,  # When the hint was sent.
    "ended": np.bool_,  # The application reported the end of the session.
    "value": np.float32,  # What a use counts where no rates are known (`saved_time`): turns, blocks.
    #: The same when the item comes back in another row, after it was forgotten; 0: it comes back in its row.
    "key": np.int64,
    "live": np.bool_,  # Has bytes in a tier, or a request that waits or runs.
}
#: Columns that only few policies need: they are made at the first use.
_RARE_COLUMNS = ("dram_seq", "ssd_seq")
_BEGIN = {"queue_seq": NOT_QUEUED, "used_at_s": math.nan, "hinted_at_s": math.nan, "value": 1.0}  # Others: 0.
HINTS = ("", "typing", "tool_call", "ended")


class ItemViews(NamedTuple):
    """The columns of an `ItemTable` as memory views: access to an element takes a third of the time of NumPy's."""

    size_bytes: memoryview[int]
    dram_bytes: memoryview[int]
    ssd_bytes: memoryview[int]
    coming_bytes: memoryview[int]
    in_use: memoryview[int]
    access_seq: memoryview[int]
    unwanted_on_ssd: memoryview[bool]
    used_at_s: memoryview[float]
    uses: memoryview[int]
    answer_tokens: memoryview[int]
    queue_seq: memoryview[int]
    hint: memoryview[int]
    hinted_at_s: memoryview[float]
    ended: memoryview[bool]
    value: memoryview[float]
    key: memoryview[int]
    live: memoryview[bool]


class ItemTable:
    """Items as rows of arrays, shape [row_count]. A row keeps its number; a row that is not `live` may be reused."""

    size_bytes: NDArray[np.int64]
    dram_bytes: NDArray[np.int64]
    ssd_bytes: NDArray[np.int64]
    coming_bytes: NDArray[np.int64]
    in_use: NDArray[np.int32]
    access_seq: NDArray[np.int64]
    unwanted_on_ssd: NDArray[np.bool_]
    used_at_s: NDArray[np.float64]
    uses: NDArray[np.int64]
    answer_tokens: NDArray[np.int64]
    queue_seq: NDArray[np.int64]
    hint: NDArray[np.int8]
    hinted_at_s: NDArray[np.float64]
    ended: NDArray[np.bool_]
    value: NDArray[np.float32]
    key: NDArray[np.int64]
    live: NDArray[np.bool_]

    def __init__(self, row_count: int, conditions: Conditions) -> None:
        self.conditions = conditions
        self.row_count = row_count
        for name, dtype in _COLUMNS.items():
            setattr(self, name, np.full(row_count, _BEGIN.get(name, 0), dtype))
        self._view()

    @cached_property
    def dram_seq(self) -> NDArray[np.int64]:
        """Order of arrivals in DRAM, by the item's first byte. Kept if the policy `ranks_by_arrival`."""
        return np.zeros(self.row_count, np.int64)

    @cached_property
    def ssd_seq(self) -> NDArray[np.int64]:
        """Order of arrivals on SSD, as `dram_seq`."""
        return np.zeros(self.row_count, np.int64)

    def _view(self) -> None:
        self.at = ItemViews(**{name: getattr(self, name).data for name in _COLUMNS})

    def _columns(self) -> list[str]:
        return [*_COLUMNS, *(name for name in _RARE_COLUMNS if name in vars(self))]

    def grow(self, row_count: int) -> None:
        """Make space for so many rows. The arrays are replaced. Call the policy's `grow` next."""
        self.row_count = row_count
        for name in self._columns():
            setattr(self, name, grown(getattr(self, name), row_count, _BEGIN.get(name, 0)))
        self._view()

    def reset(self, row: int) -> None:
        """Make the row ready for another item."""
        for name in self._columns():
            getattr(self, name)[row] = _BEGIN.get(name, 0)

    def copy(self, row: int, to_row: int) -> None:
        """Let another row begin as this one is."""
        for name in self._columns():
            column = getattr(self, name)
            column[to_row] = column[row]


def grown(array: NDArray[Any], row_count: int, begin: float) -> NDArray[Any]:
    """An array with the same rows, and further ones that have the value `begin`."""
    more = np.full((row_count - len(array), *array.shape[1:]), begin, array.dtype)
    return np.concatenate([array, more])


@dataclass(slots=True)
class Conditions:
    """What a policy knows of the machine. The store keeps it up to date."""

    dram_capacity_bytes: int
    ssd_capacity_bytes: int
    ssd_bytes_per_s: float  # Measured; reads and writes share it.
    served: int = 0  # Requests dispatched so far. A queued request has `queue_seq - served` requests before it.
    queued: int = 0  # Requests that wait.
    turns_per_s: float = math.inf  # The rate at which requests leave a queue that is not empty.
    read_backlog_s: float = 0.0  # Seconds that the SSD needs for the reads that are queued or running.
    read_busy: float = 0.0  # The share of recent time in which the SSD read, 0 to 1.
    written_bytes: int = 0  # Bytes written to SSD since the start.
    read_bytes: int = 0  # Bytes read from SSD since the start.
    demand_read_bytes: int = 0  # Of those: for requests that waited for them.
    demand_wait_s: float = 0.0  # How long such reads waited for the SSD before they began: recent mean, seconds.
    #: KV that the engine computes per second, in bytes. 0: not known, and then every use is worth the item's `value`.
    recompute_bytes_per_s: float = 0.0
    link_bytes_per_s: float = math.inf  # From DRAM to the engine.
