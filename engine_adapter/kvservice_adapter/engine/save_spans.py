"""The spans of saves that one call of the daemon stores, for requests of any number of traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvservice_api import spans
from kvservice_client import SaveResult
from kvservice_client.transports.reservation import Reservation


class SaveSpans:
    """A span for each traced save of a call, from its begin until it is answered. For one thread at a time.

    The call itself can be part of one trace only: it is below the first of the spans, and the others link to this one.
    """

    def __init__(self, saves: Sequence[tuple[int, spans.TraceContext | None]]) -> None:
        """The number of blocks and the trace of each save of the call; at least one has a trace."""
        self.context: spans.TraceContext | None = None  # Below the first span.
        self._open: dict[int, spans.OpenSpan] = {}  # By the position of the save.
        for number, (blocks, trace) in enumerate(saves):
            if trace is not None:
                made = spans.OpenSpan("kvservice.save", trace, "client", {"blocks": blocks}, linked=self.context)
                self._open[number] = made
                if self.context is None:
                    self.context = made.context

    def copied(self, reservation: Reservation) -> None:
        """The engine has written these blocks."""
        numbers, sizes = [number for number, _ in reservation.blocks], Counter[int]()
        for layer in range(reservation.sums.shape[1]):
            for number, size in zip(numbers, reservation.slice_sizes(layer), strict=True):
                sizes[number] += size
        for number, span in self._open.items():
            span.set(bytes=sizes[number])

    def stored(self, results: Sequence[SaveResult]) -> None:
        """The daemon has answered with the result of each save. All spans end."""
        for number, span in self._open.items():
            span.set(stored_blocks=results[number].stored, refused_blocks=len(results[number].refused))
        self.end()

    def end(self, error: Exception | None = None) -> None:
        """All spans end, those that have not ended."""
        while self._open:
            self._open.popitem()[1].end(error)
