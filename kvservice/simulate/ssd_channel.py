"""The SSD's bandwidth: a fixed number of bytes per second for reads and writes together, and their priorities."""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import Protocol

NO_ROW = -1
#: Limit on deferred writes, in seconds of the channel's time. A write beyond it is refused, and its bytes are lost.
DEFERRED_LIMIT_S = 10.0
#: While more of them wait, they have this share of the channel beside reads.
PRESSING_S = DEFERRED_LIMIT_S / 2
_WRITES_SHARE = 0.2


class Transfers(Protocol):
    """Callbacks at the start and the end of a transfer.

    `now_s` is when the transfer starts or ends. It may be earlier than the time that `SsdChannel.advance` was
    called with.
    """

    def begin_read(self, row: int, now_s: float) -> int:
        """The channel starts a promotion. Returns the bytes to read; 0 drops it. May call `SsdChannel.defer_write`."""

    def end_read(self, row: int, size_bytes: int, now_s: float) -> None: ...

    def begin_write(self, row: int, now_s: float) -> int:
        """The channel starts a background copy. Returns the bytes to write; 0 drops it."""

    def end_write(self, row: int, size_bytes: int, now_s: float) -> None: ...


class SsdChannel:
    """A lazy model of one shared channel: `advance` computes every transfer up to a moment.

    Four classes of transfers, highest priority first:

    1. reads that a running request waits for (`read_now`);
    2. promotions, by deadline (`promote`);
    3. deferred writes, whose space in DRAM is free already (`defer_write`; limited by `DEFERRED_LIMIT_S`);
    4. write-behind, in the order of the calls (`write`).

    A higher class preempts a lower one. A preempted transfer keeps its progress. But reads do not starve writes: while
    the buffer of deferred writes is half full, it has a fifth of the channel.
    """

    def __init__(self, bytes_per_s: float, transfers: Transfers, start_s: float = 0.0) -> None:
        self._rate = bytes_per_s
        self._transfers = transfers
        self.now_s = start_s
        self._read_now_until_s = start_s
        self._deferred_s = 0.0
        self._promotions: list[tuple[float, int]] = []  # (deadline, row), sorted.
        self.deadlines: dict[int, float] = {}  # By row: every promotion that has not ended.
        self._left: dict[int, float] = {}  # By row: bytes left of each promotion that has started.
        self._sizes: dict[int, int] = {}  # By row: bytes of every promotion.
        self._asked_bytes = 0  # The sum of `_sizes`.
        self._writes: deque[int] = deque()
        self.write_row = NO_ROW
        self._write_size = 0
        self._write_left = 0.0
        self.read_bytes = 0
        self.written_bytes = 0
        self.read_s = 0.0  # Seconds that were spent on reads.

    def advance(self, now_s: float) -> None:
        """Compute all transfers up to `now_s`. A time that is not after the last call changes nothing."""
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
                if self._deferred_s > PRESSING_S:
                    read_rate = rate * (1 - _WRITES_SHARE)
                    shared_s = (self._deferred_s - PRESSING_S) / _WRITES_SHARE
                    step = min(shared_s, left / read_rate, now_s - at)
                    self._deferred_s = PRESSING_S if step == shared_s else self._deferred_s - step * _WRITES_SHARE
                    self.read_s += step * (1 - _WRITES_SHARE)
                    if step < left / read_rate:
                        self._left[row] = left - step * read_rate
                        at += step
                        continue
                    end = at + step
                else:
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
        """Read bytes that a running request waits for, ahead of all else. Returns when the read ends, in seconds."""
        start = max(self.now_s, self._read_now_until_s)
        if self._deferred_s > PRESSING_S:
            write_s = min(size_bytes / self._rate * (_WRITES_SHARE / (1 - _WRITES_SHARE)), self._deferred_s)
            self._deferred_s -= write_s
            start += write_s
        self._read_now_until_s = start + size_bytes / self._rate
        self.read_bytes += size_bytes
        self.read_s += size_bytes / self._rate
        return self._read_now_until_s

    def read_now_backlog_s(self) -> float:
        """Seconds until a read that a request waits for would begin."""
        return max(0.0, self._read_now_until_s - self.now_s)

    def can_defer_write(self, size_bytes: int) -> bool:
        """Whether `size_bytes` more fit into the buffer of deferred writes."""
        return self._deferred_s + size_bytes / self._rate <= DEFERRED_LIMIT_S

    def defer_write(self, size_bytes: int) -> None:
        """Write bytes later whose space in DRAM is free from now on."""
        self._deferred_s += size_bytes / self._rate
        self.written_bytes += size_bytes

    def write(self, row: int) -> None:
        """Queue a background copy of the row."""
        self._writes.append(row)

    def finish_write(self) -> None:
        """End the running copy at once, and defer the write of its remaining bytes."""
        self._deferred_s += self._write_left / self._rate
        self._end_write(self.now_s)

    def abort_write(self) -> int:
        """Drop the running copy. Returns its size in bytes."""
        self.written_bytes += int(self._write_size - self._write_left)
        self.write_row = NO_ROW
        return self._write_size

    def can_defer_running_write(self) -> bool:
        """Whether the remaining bytes of the running copy fit into the buffer of deferred writes."""
        return self.can_defer_write(math.ceil(self._write_left))

    def _end_write(self, now_s: float) -> None:
        row, size = self.write_row, self._write_size
        self.write_row = NO_ROW
        self.written_bytes += size
        self._transfers.end_write(row, size, now_s)

    def promote(self, row: int, deadline_s: float, size_bytes: int) -> None:
        """Queue a read of `size_bytes` with a deadline, or change the deadline of the row's queued promotion."""
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
        """Stop a promotion. Returns (bytes that were read, bytes to read); (0, 0) if it had not started."""
        size, left = self._sizes[row], self._left.get(row)
        self._forget(row)
        if left is None:
            return 0, 0
        done = max(0, size - math.ceil(left))
        self.read_bytes += done
        return done, size

    def read_backlog_s(self) -> float:
        """Seconds that the channel needs for all reads that are queued or running."""
        done = sum(self._sizes[row] - left for row, left in self._left.items())
        return self.read_now_backlog_s() + (self._asked_bytes - done) / self._rate

    def _forget(self, row: int) -> None:
        self._drop(row, self.deadlines.pop(row))
        self._asked_bytes -= self._sizes.pop(row)
        self._left.pop(row, None)

    def _drop(self, row: int, deadline_s: float) -> None:
        del self._promotions[bisect.bisect_left(self._promotions, (deadline_s, row))]
