"""Layer-wise pre-loading: layer i+1 is loaded while the engine computes layer i.

    source = HostLayers(stream, lease.load, lease.token_counts)
    loader = LayerLoader(device, stream, source, pages_of_layer, layer_count=30, release=lease.release)
    loader.start()                      # k layers are loaded; the request may still be queued
    ...
    for layer in model:                 # in the engine's forward pass
        pages = loader.wait(layer)      # its keys and values are there

Threads: the engine's thread calls the loader. The stream's thread calls the source, `pages_of_layer` and `release`, one
layer at a time. So several loads take turns on one stream, and a load whose buffer is full occupies no thread.
Layers are begun while those before are still being copied, as many as the device wants, so that it has no pause.
The engine owns the arrays of a layer from `wait` on; before that only the stream may access them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvservice_adapter.device.base import Device, Event, NotOrdered, Pages, Stream, StreamClosed
from kvservice_adapter.layer_source import BegunLayer, LayerSource, PagesOfLayer
from kvservice_adapter.schedule import ReadBuffer
from kvservice_client.retry import SYSTEM_CLOCK, Clock

_TURN_S = 0.01  # Of waiting on the stream's thread for a copy that is under way.


class LoadFailed(Exception):
    """A layer was not loaded, and will not be: compute the history. The cause, if there is one, says why."""


@dataclass(slots=True)
class LoadReport:
    """How a load went. Times in seconds, by a monotonic clock."""

    size_bytes: int = 0
    layers: int = 0  # In the engine's pages.
    first_layer_s: float = 0.0  # From the start to the first layer in the engine's pages.
    total_s: float = 0.0  # From the start to the last layer that was loaded.
    busy_s: float = 0.0  # Of it, loading: without the pauses of a full buffer.
    waited_s: list[float] = field(default_factory=list)  # By layer: how long the engine waited.
    error: Exception | None = None

    @property
    def bytes_per_s(self) -> float:
        """The rate while loading. 0 if nothing was loaded."""
        return self.size_bytes / self.busy_s if self.busy_s else 0.0


class LayerLoader:
    """The load of one history into an engine's pages. For one request; any thread may call it.

    A loader that is dropped ends its load, as `close` does.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        source: LayerSource,
        pages_of_layer: PagesOfLayer,
        *,
        layer_count: int,
        buffer_layers: int = 0,
        wait_s: float = 0.25,
        release: Callable[[], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`pages_of_layer` gives the pages of a layer when its bytes are there.

        It is called on the stream's thread, and so is `release`, once, after all else. `buffer_layers` is
        k: `schedule.ReadBuffer`. `wait_s` bounds each `wait` unless it says otherwise, by `clock`.
        """
        buffer = ReadBuffer(layer_count, buffer_layers)
        self._load = _Loading(device, stream, source, pages_of_layer, buffer, release, clock)
        self._clock = clock
        self._device = device
        self._wait_s = wait_s

    def __del__(self) -> None:
        self.cancel()

    def start(self) -> None:
        """Begin to load, as far as the buffer goes. To be called once, on the engine's thread: the pages are written
        once what the engine's computing was given before is computed.

        A load that begins long before its request runs needs a lease and a timeout that last as long.
        """
        self._load.start()

    def request_runs(self) -> None:
        """The request is computed from now on: layers are taken one after another. The first `wait` implies it."""
        self._load.request_runs()

    def wait(self, layer: int, timeout_s: float | None = None) -> Pages:
        """The filled pages of a layer, which the engine owns from now on. Layers are taken in order, each once.

        Raises LoadFailed if it is not there after `timeout_s`, or if loading has failed or was ended
        before; then within no time. Layers that were loaded before the failure can still be taken.
        """
        begin_s = self._clock.now_s()
        end_s = begin_s + (self._wait_s if timeout_s is None else timeout_s)
        self._load.request_runs()
        try:
            pages, event, _ = self._load.begun(layer, end_s)
            if not self._device.wait_in_compute(event, max(0.0, end_s - self._clock.now_s())):
                raise LoadFailed(f"layer {layer} was not copied in time")
            if event.error is not None:
                raise LoadFailed(f"layer {layer} could not be copied: {event.error}") from event.error
        finally:
            self._load.report.waited_s[layer] += self._clock.now_s() - begin_s
        self._load.took(layer)
        return pages

    @property
    def report(self) -> LoadReport:
        """The load so far: at least the layers that the host waited for in `wait`."""
        return self._load.copy_of_report()

    @property
    def is_done(self) -> bool:
        """Whether nothing more is loaded, and the lease is free."""
        return self._load.is_done

    def cancel(self) -> None:
        """End the load after the layer that is being loaded, and free the lease. Does not wait."""
        self._load.cancel()

    close = cancel


class _UnderWay(NamedTuple):
    event: Event
    begin_s: float
    size_bytes: int


class _Loading:
    """What the stream's thread works on. It holds no reference to the loader, so that one can be dropped."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        source: LayerSource,
        pages_of_layer: PagesOfLayer,
        buffer: ReadBuffer,
        release: Callable[[], None] | None,
        clock: Clock,
    ) -> None:
        self._device = device
        self._stream = stream
        self._source = source
        self._pages_of_layer = pages_of_layer
        self._buffer = buffer
        self._release = release
        self._clock = clock
        self._changed = threading.Condition()
        self._begun: list[BegunLayer | None] = []  # None: taken. The pages are held no longer than that.
        self._iterator: Iterator[BegunLayer] | None = None
        self._awaited = -1  # The layer that the engine asked for last.
        self._on_stream = False  # Work of this load is queued on the stream: no second piece is queued.
        self._ended = False
        self._started_s = self._last_copied_s = 0.0
        self._under_way: deque[_UnderWay] = deque()  # Layers whose copies are not counted in the report yet.
        self.is_done = False
        self.report = LoadReport(waited_s=[0.0] * buffer.layer_count)

    # On the engine's thread

    def start(self) -> None:
        try:
            self._source.after(self._device.computed())
        except NotOrdered as error:
            self._stop(error)
        except StreamClosed:
            pass  # `load_next` finds the same.
        self.load_next()

    def request_runs(self) -> None:
        if not self._buffer.is_running:
            with self._changed:
                self._buffer.is_running = True
            self.load_next()

    def begun(self, layer: int, end_s: float) -> BegunLayer:
        """The copy of a layer, which may not be done yet. Raises LoadFailed."""
        with self._changed:
            self._awaited = layer
            self._clock.wait_for(self._changed, lambda: self._has_come_or_will_not(layer), end_s - self._clock.now_s())
            if len(self._begun) <= layer:
                if self.report.error is not None:
                    error = self.report.error
                    raise LoadFailed(f"layer {layer} is not loaded: {error}") from error
                if self._ended:
                    raise LoadFailed(f"layer {layer} is not loaded: the load was ended before")
                raise LoadFailed(f"layer {layer} did not arrive in time")
            begun = self._begun[layer]
        if begun is None:
            raise LoadFailed(f"layer {layer} was taken before")
        return begun

    def _has_come_or_will_not(self, layer: int) -> bool:
        return len(self._begun) > layer or self._ended

    def took(self, layer: int) -> None:
        with self._changed:
            self._count_copied()  # The stream's thread may see the layer's event later than this one.
            self._buffer.taken = max(self._buffer.taken, layer + 1)
            self._begun[layer] = None
        self.load_next()

    def copy_of_report(self) -> LoadReport:
        with self._changed:
            return replace(self.report, waited_s=list(self.report.waited_s))

    def load_next(self) -> None:
        """Queue the next layer on the stream, if the buffer has room."""
        with self._changed:
            if self._on_stream or self.is_done or not (self._ended or self._buffer.may_load):
                return
            self._on_stream = True
            self._started_s = self._started_s or self._clock.now_s()
        try:
            self._stream.submit(self._turn, waits=False)
        except StreamClosed as error:
            self._stop(error)
            with suppress(RuntimeError):  # No thread can be started when the interpreter ends.
                self._device.stream("kvservice-load-end").submit(self._end)

    def cancel(self) -> None:
        self._stop(None)
        self.load_next()

    # On the stream's thread

    def _turn(self) -> None:
        """See which layers are copied, and have one more begun if it is time. Work of other loads may run before the
        next turn.
        """
        with self._changed:
            self._count_copied()
            has_all = self.report.layers == self._buffer.layer_count
            under_way = [each.event for each in self._under_way]
        if self._ended:
            self._end()
        elif has_all:
            assert self._iterator is not None
            with suppress(Exception):
                next(self._iterator, None)  # Runs the load to its end: closed before that, it would count as cancelled.
            self._end()
        elif len(under_way) < self._device.layers_under_way and self._buffer.may_load:
            self._begin_next()
        elif under_way:
            under_way[0].wait(_TURN_S)
            self._continue()
        else:
            with self._changed:
                self._on_stream = False
            self.load_next()  # The engine may have taken a layer meanwhile.

    def _begin_next(self) -> None:
        """Have one more layer copied as soon as its bytes are here."""
        begin_s = self._clock.now_s()
        try:
            if self._iterator is None:
                self._iterator = self._source.begin(self._pages_of_layer)
            begun = next(self._iterator, None)
            if begun is None:
                raise ValueError(f"the load ended before layer {self._buffer.loaded} arrived")
        except Exception as error:
            self._end(error)
            return
        with self._changed:
            self._under_way.append(_UnderWay(begun.event, begin_s, begun.size_bytes))
            self._buffer.loaded += 1
            self._begun.append(begun)
            self._changed.notify_all()
        self._continue()

    def _continue(self) -> None:
        try:
            self._stream.submit(self._turn, waits=False)
        except StreamClosed as error:
            self._end(error)

    def _end(self, error: Exception | None = None) -> None:
        """Close the load and release the lease. No work of this load is on the stream any more."""
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

    # On either, with the lock held

    def _count_copied(self) -> None:
        """Count the layers that are in the engine's pages. One that could not be copied ends the load."""
        report = self.report
        while self._under_way and self._under_way[0].event.is_done:
            layer, now_s = self._under_way.popleft(), self._clock.now_s()
            if layer.event.error is not None:
                self._stop(layer.event.error)
                continue
            report.busy_s += now_s - max(layer.begin_s, self._last_copied_s)
            self._last_copied_s = now_s
            report.total_s = now_s - self._started_s
            report.first_layer_s = report.first_layer_s or report.total_s
            report.size_bytes += layer.size_bytes
            report.layers += 1
            if self._awaited >= report.layers - 1:  # The engine's thread wakes later.
                self._buffer.taken = max(self._buffer.taken, report.layers)

    def _stop(self, error: Exception | None) -> None:
        """Stop loading, and wake the engine's thread."""
        with self._changed:
            self.report.error = self.report.error or error
            self._ended = True
            self._changed.notify_all()
