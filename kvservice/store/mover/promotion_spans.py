"""Spans of the reads of one promotion, if the request that it is for is traced.

A promotion reads the same layers of all its blocks before the next layers. Each such run of layers has one span: a span
per read would be thousands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvservice.clock import Clock
from kvservice.store.image_check import ImagePiece
from kvservice_api import spans

if TYPE_CHECKING:
    from kvservice.store.mover.pending_promotion import PendingPromotion


class LayerReads:
    """For the event loop's thread, except `begin`."""

    def __init__(self, promotions: Sequence[PendingPromotion], trace: spans.TraceContext, clock: Clock) -> None:
        self._trace, self._clock = trace, clock
        self._tier = str(promotions[0].source.tier)
        self._left = Counter(piece.layer_begin for each in promotions for piece in each.pieces)
        self._blocks = Counter(self._left)
        self._bytes: Counter[int] = Counter()
        self._began_s: dict[int, float] = {}

    def begin(self, piece: ImagePiece) -> None:
        """A read of the piece begins. Any thread may call it."""
        self._began_s.setdefault(piece.layer_begin, self._clock.monotonic_s())

    def end(self, piece: ImagePiece) -> None:
        """The piece is read and verified, or that has failed; or it is not read, because its block has failed."""
        layer = piece.layer_begin
        self._left[layer] -= 1
        self._bytes[layer] += piece.end - piece.start
        if not self._left[layer] and layer in self._began_s:
            spans.record(
                "kvservice.tier.read",
                self._clock.monotonic_s() - self._began_s[layer],
                self._trace,
                tier=self._tier,
                layer=layer,
                blocks=self._blocks[layer],
                bytes=self._bytes[layer],
            )
