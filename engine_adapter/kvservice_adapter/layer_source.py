"""Where a load's layers come from: each is begun into an engine's pages, and has an event.

A `LayerLoader` knows this protocol only. `HostLayers` are bytes in host memory (gRPC, shared memory), which the device
scatters. A source whose daemon copies to the device itself begins all layers at once and yields the daemon's events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple, Protocol

from kvservice_adapter.device.base import Event, Pages, Stream
from kvservice_adapter.device.rotation import Rotation
from kvservice_client import LoadedLayer

PagesOfLayer = Callable[[int], Pages]


class BegunLayer(NamedTuple):
    """A layer whose bytes are being copied into `pages`. They are valid once `event` is done without an error."""

    pages: Pages
    event: Event
    size_bytes: int


class LayerSource(Protocol):
    """The layers of one load, for one request."""

    def begin(self, pages_of_layer: PagesOfLayer) -> Iterator[BegunLayer]:
        """Begin the layers in order, one with each `next`, which may block while a layer's bytes arrive.

        Called once, on the thread of the stream that loads; `next`, and `close` of the iterator if it has one, are
        called there too, and `pages_of_layer` must be called nowhere else. `next` is called only when the event before
        it is done, and only as far ahead as the read buffer allows, so a source may reuse a layer's staging then. The
        iterator ends after the last layer. Closing it earlier ends the load: on return nothing writes into the pages
        any more. Any exception of the iterator fails the load.
        """


class HostLayers:
    """Layers whose bytes the client has in host memory: the device scatters them."""

    def __init__(
        self,
        stream: Stream,
        layers: Callable[[], Iterable[LoadedLayer]],
        token_counts: Sequence[int],
        *,
        rotations: Sequence[Rotation] | None = None,
        unrotated_pages: PagesOfLayer | None = None,
    ) -> None:
        """`layers` begins the load and gives the layers in order, such as `Lease.load`; `token_counts` are those of
        the blocks in each layer. `rotations`, one per layer, turn the keys in the pages. `unrotated_pages` get the
        layer too, its keys as they are stored.
        """
        self._stream = stream
        self._layers = layers
        self._token_counts = tuple(token_counts)
        self._rotations = rotations
        self._unrotated_pages = unrotated_pages

    def begin(self, pages_of_layer: PagesOfLayer) -> Iterator[BegunLayer]:
        layers = iter(self._layers())
        try:
            # Not a loop: its variables would keep a layer's pages until the next one is begun.
            yield from map(partial(self._begin, pages_of_layer), count(), layers)
        finally:
            close = getattr(layers, "close", None)
            if close is not None:
                close()

    def _begin(self, pages_of_layer: PagesOfLayer, expected: int, loaded: LoadedLayer) -> BegunLayer:
        if loaded.index != expected:
            raise ValueError(f"expected layer {expected}; layer {loaded.index} was loaded")
        pages = pages_of_layer(loaded.index)
        pages.check(loaded.group)
        if self._unrotated_pages is not None:
            self._stream.scatter(loaded.data, self._token_counts, self._unrotated_pages(loaded.index))
        rotation = self._rotations[loaded.index] if self._rotations is not None else None
        event = self._stream.scatter(loaded.data, self._token_counts, pages, rotation)
        return BegunLayer(pages, event, loaded.data.nbytes)
