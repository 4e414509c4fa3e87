"""Layer-wise pre-loading: layer i+1 comes in while the engine computes layer i.

    loader = LayerLoader(
        device, stream, lease.load, targets, lease.token_counts, layer_count=30, release=lease.release
    )
    loader.start()                      # k layers come in; the request may still be queued
    ...
    for layer in model:                 # in the engine's forward pass
        pages = loader.wait(layer)      # its keys and values are there

The work is done on the stream's thread, a layer at a time, so that several loads take turns on one
stream, and a load whose buffer is full occupies nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from kvservice_adapter.device.base import Device, Event, Pages, Rotation, Stream, StreamClosed
from kvservice_adapter.schedule import ReadBuffer
from kvservice_client import LoadedLayer

Layers = Callable[[], Iterable[LoadedLayer]]


class LoadFailed(Exception):
    """A layer is not there, and will not be: compute the history. The cause, if there is one, says why."""


@dataclass(slots=True)
class LoadReport:
    """How a load went. Times in seconds, by a monotonic clock."""

    size_bytes: int = 0
    layers: int = 0  # That came.
    first_layer_s: float = 0.0  # From the start to the first layer in the engine's pages.
    total_s: float = 0.0  # From the start to the last layer that came.
    busy_s: float = 0.0  # Of it, loading: without the pauses of a full buffer.
    waited_s: list[float] = field(default_factory=list)  # By layer: how long the engine was kept.
    error: Exception | None = None

    @property
    def bytes_per_s(self) -> float:
        """The rate while loading. 0 where nothing came."""
        return self.size_bytes / self.busy_s if self.busy_s else 0.0


class LayerLoader:
    """One history on its way into an engine's pages. For one request; thread-safe.

    A loader that is dropped ends its load, as `close` does.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        layers: Layers,
        targets: Callable[[int], Pages],
        token_counts: Sequence[int],
        *,
        layer_count: int,
        rotation: Rotation | None = None,
        buffer_layers: int = 0,
        wait_s: float = 0.25,
        release: Callable[[], None] | None = None,
    ) -> None:
        """`layers` gives the layers in order, `targets` the pages of one, once its bytes are there.

        Both are called on the stream's thread, and so is `release`, once, after all else. `token_counts` are
        those of the blocks in each layer. `buffer_layers` is k: `schedule.ReadBuffer`. `wait_s` bounds each
        `wait` unless it says otherwise.
        """
        self._load = _Load(
            device,
            stream,
            layers,
            targets,
            tuple(token_counts),
            rotation,
            ReadBuffer(layer_count, buffer_layers),
            release,
        )
        self._device = device
        self._wait_s = wait_s

    def __del__(self) -> None:
        self.cancel()

    def start(self) -> None:
        """Begin to load, as far as the buffer goes. To be called once.

        A load that begins long before its request runs needs a lease and a timeout that last as long.
        """
        self._load.go_on()

    def request_runs(self) -> None:
        """The request is computed from now on: layers are taken one after another. The first `wait` says so too."""
        self._load.request_runs()

    def wait(self, layer: int, timeout_s: float | None = None) -> Pages:
        """The pages of a layer, filled: they are the engine's from now on. Layers are taken in order, each once.

        Raises LoadFailed where it is not there after `timeout_s`, or where loading has failed or was ended
        before; then within no time. Layers that came stay as they are, and those not taken yet may be.
        """
        begin_s = time.monotonic()
        end_s = begin_s + (self._wait_s if timeout_s is None else timeout_s)
        self._load.request_runs()
        try:
            event, pages = self._load.landed(layer, end_s)
            if not self._device.wait_in_compute(event, max(0.0, end_s - time.monotonic())):
                raise LoadFailed(f"layer {layer} was not copied in time")
            if event.error is not None:
                raise LoadFailed(f"layer {layer} could not be copied: {event.error}") from event.error
        finally:
            self._load.report.waited_s[layer] += time.monotonic() - begin_s
        self._load.took(layer)
        return pages

    @property
    def report(self) -> LoadReport:
        """How it went so far."""
        return replace(self._load.report, waited_s=list(self._load.report.waited_s))

    @property
    def is_done(self) -> bool:
        """Whether nothing more is loaded, and the lease is free."""
        return self._load.is_done

    def cancel(self) -> None:
        """End the load after the layer that is on its way, and free the lease. Waits for nothing."""
        self._load.cancel()

    close = cancel


class _Load:
    """What the stream's thread works on. It knows nothing of the loader, so that one can be dropped."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        layers: Layers,
        targets: Callable[[int], Pages],
        token_counts: tuple[int, ...],
        rotation: Rotation | None,
        buffer: ReadBuffer,
        release: Callable[[], None] | None,
    ) -> None:
        self._device = device
        self._stream = stream
        self._layers = layers
        self._targets = targets
        self._token_counts = token_counts
        self._rotation = rotation
        self._buffer = buffer
        self._release = release
        self._changed = threading.Condition()
        self._landed: list[tuple[Event, Pages] | None] = []  # None: taken. The pages are held no longer than that.
        self._iterator: Iterator[LoadedLayer] | None = None
        self._awaited = -1  # The layer that the engine asked for last.
        self._on_stream = False  # A piece of work of ours is there: no second one is given.
        self._ended = False
        self._started_s = 0.0
        self.is_done = False
        self.report = LoadReport(waited_s=[0.0] * buffer.layer_count)

    # On the engine's thread

    def request_runs(self) -> None:
        if not self._buffer.is_running:
            with self._changed:
                self._buffer.is_running = True
            self.go_on()

    def landed(self, layer: int, end_s: float) -> tuple[Event, Pages]:
        """The copy of a layer, which may not be done yet. Raises LoadFailed."""
        with self._changed:
            self._awaited = layer
            while len(self._landed) <= layer:
                if self.report.error is not None:
                    error = self.report.error
                    raise LoadFailed(f"layer {layer} is not loaded: {error}") from error
                if self._ended:
                    raise LoadFailed(f"layer {layer} is not loaded: the load was ended before")
                if not self._changed.wait(end_s - time.monotonic()):
                    raise LoadFailed(f"layer {layer} did not come in time")
            landed = self._landed[layer]
        if landed is None:
            raise LoadFailed(f"layer {layer} was taken before")
        return landed

    def took(self, layer: int) -> None:
        with self._changed:
            self._buffer.taken = max(self._buffer.taken, layer + 1)
            self._landed[layer] = None
        self.go_on()

    def go_on(self) -> None:
        """Give the stream the next layer to load, where the buffer has room."""
        with self._changed:
            if self._on_stream or self.is_done or not (self._ended or self._buffer.may_load):
                return
            self._on_stream = True
            self._started_s = self._started_s or time.monotonic()
        try:
            self._stream.submit(self._next)
        except StreamClosed as error:
            self._stop(error)
            with suppress(RuntimeError):  # No thread can be started when the interpreter ends.
                self._device.stream("kvservice-load-end").submit(self._end)

    def cancel(self) -> None:
        self._stop(None)
        self.go_on()

    # On the stream's thread

    def _next(self) -> None:
        """Have one more layer copied as soon as its bytes are here."""
        if self._ended:
            self._end()
            return
        begin_s = time.monotonic()
        try:
            if self._iterator is None:
                self._iterator = iter(self._layers())
            loaded = next(self._iterator, None)
            if loaded is None or loaded.index != self._buffer.loaded:
                raise ValueError(f"layer {self._buffer.loaded} was to come; {loaded and loaded.index} did")
            pages = self._targets(loaded.index)
            pages.check(loaded.group)
            event = self._stream.scatter(loaded.data, self._token_counts, pages, self._rotation)
            self._stream.submit(lambda: self._copied(event, begin_s, loaded.data.nbytes))
        except Exception as error:
            self._end(error)
            return
        with self._changed:
            self._buffer.loaded += 1
            self._landed.append((event, pages))
            self._changed.notify_all()

    def _copied(self, event: Event, begin_s: float, size_bytes: int) -> None:
        """A layer is in the engine's pages. The next one, if it is time; others' work may come first."""
        if event.error is not None:
            self._end(event.error)
            return
        report, now_s = self.report, time.monotonic()
        report.busy_s += now_s - begin_s
        report.total_s = now_s - self._started_s
        report.first_layer_s = report.first_layer_s or report.total_s
        report.size_bytes += size_bytes
        report.layers += 1
        if report.layers == self._buffer.layer_count:
            assert self._iterator is not None
            with suppress(Exception):
                next(self._iterator, None)  # A load that is let run to its end is not one that was broken off.
            self._end()
            return
        with self._changed:
            self._on_stream = False
            if self._awaited >= report.layers - 1:  # Taken as soon as the engine's thread wakes: go on before that.
                self._buffer.taken = max(self._buffer.taken, report.layers)
        self.go_on()

    def _end(self, error: Exception | None = None) -> None:
        """Close the load and free the lease; nothing of ours is on the stream any more."""
        if self.is_done:
            return
        self._stop(error)
        close, self._iterator = getattr(self._iterator, "close", None), None
        for last in (close, self._release):
            if last is not None:
                with suppress(Exception):
                    last()
        with self._changed:
            self.is_done = True
            self._changed.notify_all()

    def _stop(self, error: Exception | None) -> None:
        """Load nothing more, and let the engine know."""
        with self._changed:
            self.report.error = self.report.error or error
            self._ended = True
            self._changed.notify_all()
