"""Where a load's layers come from: each is begun into an engine's pages, and has an event.

A `LayerLoader` knows this protocol only. `HostLayers` are bytes in host memory, which the device scatters: the daemon's
memory itself, where the device reads that by DMA, or a copy. A source whose daemon copies to the device itself begins
all layers at once and yields the daemon's events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple, Protocol

from kvservice_adapter.device.base import Computed, Event, Pages, Slices, Stream
from kvservice_adapter.device.rotation import Rotation
from kvservice_api.errors import NotShared
from kvservice_client import LayerGroup, Lease, LoadedLayer

COPIED_S = 30.0  # For copies between host memory and an engine's pages.

PagesOfLayer = Callable[[int], Pages]


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """One layer of leased blocks, in the daemon's memory."""

    index: int  # Counted from the shard's first layer.
    data: Slices
    group: LayerGroup
    check: Callable[[], None]  # Once the layer is copied: raises if its bytes may have been replaced meanwhile.


HostLayer = LoadedLayer | PlacedLayer


def layers_of(
    lease: Lease, first: int, block_count: int, *, in_place: bool, layer_timeout_s: float
) -> Iterator[HostLayer]:
    """The layers of leased blocks: with `in_place` where they are, if that is in shared memory; else copies of them.

    Raises what `Lease.load` and `Lease.view` raise. In place each wait for a layer lasts at most `layer_timeout_s`.
    """
    if in_place:
        try:
            view = lease.view(first, block_count, layer_timeout_s=layer_timeout_s)
        except NotShared:
            pass
        else:
            with view:
                for layer in range(view.layer_count):
                    yield PlacedLayer(layer, view.slices(layer), view.group_of(layer), view.check)
            return
    yield from lease.load(first_block=first, block_count=block_count)


class BegunLayer(NamedTuple):
    """A layer whose bytes are being copied into `pages`. They are valid once `event` is done without an error."""

    pages: Pages
    event: Event
    size_bytes: int


class LayerSource(Protocol):
    """The layers of one load, for one request."""

    def after(self, computed: Computed) -> None:
        """The pages are written once this is computed. Called before `begin`, on the engine's thread.

        Raises NotOrdered, StreamClosed.
        """

    def begin(self, pages_of_layer: PagesOfLayer) -> Iterator[BegunLayer]:
        """Begin the layers in order, one with each `next`, which may block while a layer's bytes arrive.

        Called once, on the thread of the stream that loads; `next`, and `close` of the iterator if it has one, are
        called there too, and `pages_of_layer` must be called nowhere else. `next` may be called before events are
        done (`Device.layers_under_way`), but only as far ahead as the read buffer allows. The iterator ends after the
        last layer. Closing it earlier ends the load: on return nothing writes into the pages any more. Any exception
        of the iterator fails the load.
        """


class HostLayers:
    """Layers whose bytes the client has in host memory: the device scatters them."""

    def __init__(
        self,
        stream: Stream,
        layers: Callable[[], Iterable[HostLayer]],
        token_counts: Sequence[int],
        *,
        rotations: Sequence[Rotation] | None = None,
        unrotated_pages: PagesOfLayer | None = None,
    ) -> None:
        """`layers` begins the load and gives the layers in order: `layers_of`, `Lease.load`. `token_counts` are those
        of the blocks in each layer. `rotations`, one per layer, turn the keys in the pages. `unrotated_pages` get the
        layer too, its keys as they are stored.
        """
        self._stream = stream
        self._layers = layers
        self._token_counts = tuple(token_counts)
        self._rotations = rotations
        self._unrotated_pages = unrotated_pages
        self._events: list[Event] = []

    def after(self, computed: Computed) -> None:
        self._stream.after(computed)

    def begin(self, pages_of_layer: PagesOfLayer) -> Iterator[BegunLayer]:
        layers = iter(self._layers())
        try:
            # Not a loop: its variables would keep a layer's pages until the next one is begun.
            yield from map(partial(self._begin, pages_of_layer), count(), layers)
        finally:
            for event in self._events:  # They are begun: this thread did it, before it was called here.
                event.wait(COPIED_S)
            close = getattr(layers, "close", None)
            if close is not None:
                close()

    def _begin(self, pages_of_layer: PagesOfLayer, expected: int, loaded: HostLayer) -> BegunLayer:
        if loaded.index != expected:
            raise ValueError(f"expected layer {expected}; layer {loaded.index} was loaded")
        pages = pages_of_layer(loaded.index)
        pages.check(loaded.group)
        check = loaded.check if isinstance(loaded, PlacedLayer) else None
        if self._unrotated_pages is not None:
            raw = self._stream.scatter(loaded.data, self._token_counts, self._unrotated_pages(loaded.index))
            self._events.append(raw)
            check = partial(_check_both, raw, check)
        rotation = self._rotations[loaded.index] if self._rotations is not None else None
        event = self._stream.scatter(loaded.data, self._token_counts, pages, rotation, check)
        self._events.append(event)
        return BegunLayer(pages, event, sum(self._token_counts) * pages.token_bytes)


def _check_both(raw: Event, check: Callable[[], None] | None) -> None:
    """The copy before this one, with the keys as they are stored, is done too. Raises its error, or that of `check`."""
    if raw.error is not None:
        raise raw.error
    if check is not None:
        check()
