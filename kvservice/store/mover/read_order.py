"""The order in which the pieces of promotions are read: the most urgent blocks first, and of these the first layers."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable
from heapq import heappop, heappush

from kvservice.store.image_check import ImagePiece
from kvservice.store.mover.pending_promotion import PendingPromotion

# A job of small pieces has so many bytes nevertheless: its thread waits for the interpreter's lock before and after it,
# which takes as long as a drive needs for half of them.
_JOB_BYTES_MIN = 1 << 20
_JOB_PIECES_MAX = 16  # Before and after its read, each piece of a job takes some 50 us of the interpreter's time.
_LAYER_S = 1e-6  # By so much a layer is less urgent than the one before it.


class ReadOrder:
    """The order for all promotions that read from one drive. Any thread may call it."""

    def __init__(self, *, job_bytes: int, jobs_at_once: int) -> None:
        """A job of several pieces has at most `job_bytes`. Above 1 MiB, it has at most 1 / `jobs_at_once` of the pieces
        that are left of a layer: so the last jobs of a layer are small, and end together.
        """
        self._job_bytes = job_bytes
        self._jobs_at_once = jobs_at_once
        self._lock = threading.Lock()
        # (due_s, number of the piece, number of the entry): the next piece of each promotion. An entry is out of date
        # if the promotion is due at another time now; then the promotion has a second entry.
        self._heap: list[tuple[float, int, int, PendingPromotion]] = []
        self._numbers = itertools.count()
        self._left = Counter[tuple[float, int]]()  # (due_s, number of the piece) -> promotions that are there.

    def add(self, promotions: Iterable[PendingPromotion]) -> None:
        with self._lock:
            for pending in promotions:
                pending.order = self
                self._push(pending)

    def hurry(self, promotions: Iterable[PendingPromotion], due_s: float) -> None:
        """Make promotions of this order due at an earlier time."""
        with self._lock:
            for pending in promotions:
                if pending.next_piece < len(pending.pieces):
                    self._forget(pending)
                    pending.due_s = due_s
                    self._push(pending)

    @property
    def priority(self) -> float | None:
        """The next job's priority; lower ones are more urgent. None if all pieces are given out."""
        with self._lock:
            if (first := self._first()) is None:
                return None
            due_s, count, _, pending = first
            return due_s + pending.pieces[count].layer_begin * _LAYER_S

    def next(self) -> list[tuple[PendingPromotion, ImagePiece]]:
        """The pieces of the next job; none if all are given out."""
        job: list[tuple[PendingPromotion, ImagePiece]] = []
        with self._lock:
            if (first := self._first()) is None:
                return job
            few, few_bytes = self._left[first[:2]] // self._jobs_at_once, min(_JOB_BYTES_MIN, self._job_bytes)
            size_bytes = 0
            found: tuple[float, int, int, PendingPromotion] | None = first
            while found is not None and found[:2] == first[:2] and len(job) < _JOB_PIECES_MAX:
                pending = found[3]
                piece = pending.pieces[pending.next_piece]
                size_bytes += piece.end - piece.start
                if job and size_bytes > (few_bytes if len(job) >= few else self._job_bytes):
                    break
                heappop(self._heap)
                job.append((pending, piece))
                self._forget(pending)
                pending.next_piece += 1
                if pending.next_piece < len(pending.pieces):
                    self._push(pending)
                found = self._first()
        return job

    def _push(self, pending: PendingPromotion) -> None:
        self._left[pending.due_s, pending.next_piece] += 1
        heappush(self._heap, (pending.due_s, pending.next_piece, next(self._numbers), pending))

    def _forget(self, pending: PendingPromotion) -> None:
        of = pending.due_s, pending.next_piece
        self._left[of] -= 1
        if not self._left[of]:
            del self._left[of]

    def _first(self) -> tuple[float, int, int, PendingPromotion] | None:
        """The first entry that is not out of date."""
        while self._heap:
            due_s, count, _, pending = self._heap[0]
            if (due_s, count) == (pending.due_s, pending.next_piece):
                return self._heap[0]
            heappop(self._heap)
        return None
