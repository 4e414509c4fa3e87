"""The order in which the pieces of promotions are read: the most urgent blocks first, and of these the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from kvservice.store.image_check import ImagePiece

if TYPE_CHECKING:
    from kvservice.store.mover.promoter import PendingPromotion

_JOB_PIECES_MAX = 16  # Before and after its read, each piece of a job takes some 50 us of the event loop's turn.


class ReadOrder:
    """Of the promotions that began together. For the event loop's thread."""

    def __init__(self, promotions: Sequence[PendingPromotion], *, job_bytes: int, jobs_at_once: int) -> None:
        """A job is of at most `job_bytes`, if it has several pieces. `jobs_at_once` share the pieces of a layer."""
        self._promotions = promotions
        self._job_bytes = job_bytes
        self._job_pieces = min(max(1, len(promotions) // jobs_at_once), _JOB_PIECES_MAX)
        # (due_s, number of the piece, number of the promotion)
        self._heap = [(each.due_s, 0, number) for number, each in enumerate(promotions)]
        heapify(self._heap)

    def next(self) -> list[tuple[PendingPromotion, ImagePiece]]:
        """The pieces of the next job, all of one tier; empty once all are given out."""
        job: list[tuple[PendingPromotion, ImagePiece]] = []
        first: tuple[float, int] | None = None
        size_bytes = 0
        while self._heap and len(job) < self._job_pieces:
            due_s, count, number = self._heap[0]
            pending = self._promotions[number]
            piece = pending.pieces[count]
            size_bytes += piece.end - piece.start
            if first is None:
                first = due_s, count
            elif first != (due_s, count) or pending.tier != job[0][0].tier or size_bytes > self._job_bytes:
                break
            heappop(self._heap)
            if count + 1 < len(pending.pieces):
                heappush(self._heap, (due_s, count + 1, number))
            job.append((pending, piece))
        return job

    def reorder(self) -> None:
        """After the `due_s` of promotions have changed."""
        self._heap = [(self._promotions[number].due_s, count, number) for _, count, number in self._heap]
        heapify(self._heap)
