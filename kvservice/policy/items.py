"""The table of items that policies with foresight score: sessions and shared prefixes, as rows of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOT_QUEUED = -1

_COLUMNS = {
    "size_bytes": np.int64,  # Of the whole item, as it was last saved.
    "dram_bytes": np.int64,  # Its prefix in DRAM. Bytes that are still on their way count in `coming_bytes`.
    "ssd_bytes": np.int64,  # Its prefix on SSD.
    "coming_bytes": np.int64,  # DRAM lent to a running promotion.
    "in_use": np.int32,  # Requests that run on it now: nothing of it leaves.
    "access_seq": np.int64,  # Greater is used later; of one request's items, the prefix is later than its suffix.
    "dram_seq": np.int64,  # When its first byte came into DRAM, in the order of all such arrivals.
    "ssd_seq": np.int64,
    "unwanted_on_ssd": np.bool_,  # Was evicted from SSD, and not used since.
    "used_at_s": np.float64,  # The end of its last use: from here its user thinks. NaN before the first.
    "uses": np.int64,  # Requests that used it, those that run now included.
    "answer_tokens": np.int64,  # Of its last request.
    "queue_seq": np.int64,  # Its request's number in the engine's queue (see Conditions), or NOT_QUEUED.
    "hint": np.int8,  # The last since its last use: 0 none, else `HINTS[hint]`.
    "hinted_at_s": np.float64,  # When it came.
    "ended": np.bool_,  # The application said that the session is over.
    "value": np.float64,  # What one use of the whole item saves, in whatever unit the owner counts (turns, seconds).
    "live": np.bool_,  # Has bytes in some tier, or a request that waits or runs.
}
HINTS = ("", "typing", "tool_call", "ended")


class ItemTable:
    """Items by number. `rows` never move; a row that is not `live` may be given to another item."""

    size_bytes: NDArray[np.int64]
    dram_bytes: NDArray[np.int64]
    ssd_bytes: NDArray[np.int64]
    coming_bytes: NDArray[np.int64]
    in_use: NDArray[np.int32]
    access_seq: NDArray[np.int64]
    dram_seq: NDArray[np.int64]
    ssd_seq: NDArray[np.int64]
    unwanted_on_ssd: NDArray[np.bool_]
    used_at_s: NDArray[np.float64]
    uses: NDArray[np.int64]
    answer_tokens: NDArray[np.int64]
    queue_seq: NDArray[np.int64]
    hint: NDArray[np.int8]
    hinted_at_s: NDArray[np.float64]
    ended: NDArray[np.bool_]
    value: NDArray[np.float64]
    live: NDArray[np.bool_]

    def __init__(self, row_count: int, conditions: Conditions) -> None:
        self.conditions = conditions
        self.row_count = row_count
        for name, dtype in _COLUMNS.items():
            setattr(self, name, np.zeros(row_count, dtype))
        self.queue_seq[:] = NOT_QUEUED
        self.used_at_s[:] = math.nan
        self.hinted_at_s[:] = math.nan
        self.value[:] = 1.0


@dataclass(slots=True)
class Conditions:
    """What a policy has to know of the machine, kept up to date by whoever moves the bytes."""

    dram_capacity_bytes: int
    ssd_capacity_bytes: int
    ssd_bytes_per_s: float  # Measured; shared by reads and writes.
    served: int = 0  # Requests whose turn has come. One with number `queue_seq` has `queue_seq - served` before it.
    queued: int = 0  # Requests that wait.
    turns_per_s: float = math.inf  # How fast the queue moves while there is one.
    read_backlog_s: float = 0.0  # How long the SSD will read what it was asked for.
    read_busy: float = 0.0  # The share of recent time in which the SSD read, 0 to 1.
    written_bytes: int = 0  # To SSD, since the start.
