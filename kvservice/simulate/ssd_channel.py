"""The SSD's channel: so many bytes a second for reads and writes together, and who gets them first."""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import Protocol

NO_ROW = -1
#: Writes that a demotion waits for may be this far behind, in seconds of the channel. What would come on top is lost.
DEFERRED_LIMIT_S = 10.0


class Transfers(Protocol):
    """Who is told when bytes move. `now_s` is the moment itself, which may lie before the caller's."""

    def begin_read(self, row: int, now_s: float) -> int:
        """A promotion's turn has come: returns the bytes to read, 0 to drop it. May call `SsdChannel.defer_write`."""

    def end_read(self, row: int, size_bytes: int, now_s: float) -> None: ...

    def begin_write(self, row: int, now_s: float) -> int:
        """A copy's turn has come: returns the bytes to write, 0 to drop it."""

    def end_write(self, row: int, size_bytes: int, now_s: float) -> None: ...


class SsdChannel:
    """Evaluated when somebody asks: `advance` does all that happened since it was last called.

    First come the reads that a running request waits for, then promotions by deadline, then writes that are owed
    for a place in DRAM that was given away (from a buffer: so much may wait as is written in `DEFERRED_LIMIT_S`), then
    write-behind in the order in which it was asked for. What comes first interrupts what comes later, which keeps
    what it has done.
    """

    __slots__ = (
        "_asked_bytes",
        "_deferred_s",
        "_left",
        "_promotions",
        "_rate",
        "_read_now_until_s",
        "_sizes",
        "_transfers",
        "_write_left",
        "_write_size",
        "_writes",
        "deadlines",
        "now_s",
        "read_bytes",
        "read_s",
        "write_row",
        "written_bytes",
    )  # fmt: skip

    def __init__(self, bytes_per_s: float, transfers: Transfers, start_s: float = 0.0) -> None:
        self._rate = bytes_per_s
        self._transfers = transfers
        self.now_s = start_s
        self._read_now_until_s = start_s
        self._deferred_s = 0.0
        self._promotions: list[tuple[float, int]] = []  # Sorted.
        self.deadlines: dict[int, float] = {}  # Of every promotion that has not ended, by row.
        self._left: dict[int, float] = {}  # Bytes, of those that have begun.
        self._sizes: dict[int, int] = {}  # Bytes, of all promotions.
        self._asked_bytes = 0  # The sum of them.
        self._writes: deque[int] = deque()
        self.write_row = NO_ROW
        self._write_size = 0
        self._write_left = 0.0
        self.read_bytes = 0
        self.written_bytes = 0
        self.read_s = 0.0  # How long it has read.

    def advance(self, now_s: float) -> None:
        """Do what happens until `now_s`."""
        at = self.now_s
        if now_s <= at:
            return
        if self._read_now_until_s > at:
            at = min(self._read_now_until_s, now_s)
        rate = self._rate
        while at < now_s:
            self.now_s = at
            if self._promotions:
                row = self._promotions[0][1]
                if row not in self._left:
                    size = self._transfers.begin_read(row, at)
                    if size <= 0:
                        self._forget(row)
                        continue
                    self._left[row] = size
                    self._asked_bytes += size - self._sizes[row]
                    self._sizes[row] = size
                left = self._left[row]
                end = at + left / rate
                if end > now_s:
                    self._left[row] = left - (now_s - at) * rate
                    self.read_s += now_s - at
                    break
                self.read_s += end - at
                at = self.now_s = end
                size = self._sizes[row]
                self._forget(row)
                self.read_bytes += size
                self._transfers.end_read(row, size, at)
            elif self._deferred_s > 0.0:
                step = min(self._deferred_s, now_s - at)
                self._deferred_s = 0.0 if step == self._deferred_s else self._deferred_s - step
                at += step
            elif self.write_row >= 0:
                end = at + self._write_left / rate
                if end > now_s:
                    self._write_left -= (now_s - at) * rate
                    break
                at = self.now_s = end
                self._end_write(at)
            elif self._writes:
                row = self._writes.popleft()
                size = self._transfers.begin_write(row, at)
                if size > 0:
                    self.write_row = row
                    self._write_size = size
                    self._write_left = size
            else:
                break
        self.now_s = now_s

    def read_now(self, size_bytes: int) -> float:
        """A running request waits for these bytes. Returns when they are there."""
        start = max(self.now_s, self._read_now_until_s)
        self._read_now_until_s = start + size_bytes / self._rate
        self.read_bytes += size_bytes
        self.read_s += size_bytes / self._rate
        return self._read_now_until_s

    def can_defer_write(self, size_bytes: int) -> bool:
        """Whether so much more may wait to be written without a place in DRAM."""
        return self._deferred_s + size_bytes / self._rate <= DEFERRED_LIMIT_S

    def defer_write(self, size_bytes: int) -> None:
        """Write bytes whose place in DRAM is given away at once."""
        self._deferred_s += size_bytes / self._rate
        self.written_bytes += size_bytes

    def write(self, row: int) -> None:
        """Copy the row's bytes when there is nothing better to do."""
        self._writes.append(row)

    def finish_write(self) -> None:
        """End the running copy at once: what is left of it is owed."""
        self._deferred_s += self._write_left / self._rate
        self._end_write(self.now_s)

    def abort_write(self) -> int:
        """Drop the running copy. Returns its bytes."""
        self.written_bytes += int(self._write_size - self._write_left)
        self.write_row = NO_ROW
        return self._write_size

    def can_defer_running_write(self) -> bool:
        """Whether what is left of the running copy may wait without a place in DRAM."""
        return self.can_defer_write(math.ceil(self._write_left))

    def _end_write(self, now_s: float) -> None:
        row, size = self.write_row, self._write_size
        self.write_row = NO_ROW
        self.written_bytes += size
        self._transfers.end_write(row, size, now_s)

    def promote(self, row: int, deadline_s: float, size_bytes: int) -> None:
        """Read the row's bytes by the deadline, or change the deadline of what was asked for before."""
        old = self.deadlines.get(row)
        if old is None:
            self._sizes[row] = size_bytes
            self._asked_bytes += size_bytes
        elif old == deadline_s:
            return
        else:
            self._drop(row, old)
        self.deadlines[row] = deadline_s
        bisect.insort(self._promotions, (deadline_s, row))

    def cancel(self, row: int) -> tuple[int, int]:
        """Stop a promotion. Returns the bytes that have come, and those it was to read: 0 where it had not begun."""
        size, left = self._sizes[row], self._left.get(row)
        self._forget(row)
        if left is None:
            return 0, 0
        done = max(0, size - math.ceil(left))
        self.read_bytes += done
        return done, size

    def latest_reading(self) -> int:
        """The row of the promotion that has begun and has the latest deadline, or NO_ROW."""
        return max(self._left, key=lambda row: (self.deadlines[row], row), default=NO_ROW)

    def read_backlog_s(self) -> float:
        """How long it will read what it was asked for."""
        done = sum(self._sizes[row] - left for row, left in self._left.items())
        return max(0.0, self._read_now_until_s - self.now_s) + (self._asked_bytes - done) / self._rate

    def _forget(self, row: int) -> None:
        self._drop(row, self.deadlines.pop(row))
        self._asked_bytes -= self._sizes.pop(row)
        self._left.pop(row, None)

    def _drop(self, row: int, deadline_s: float) -> None:
        del self._promotions[bisect.bisect_left(self._promotions, (deadline_s, row))]
