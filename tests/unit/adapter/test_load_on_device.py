"""Layer-wise pre-loading whose copies a device makes: they are begun, and awaited by their events."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from kvservice_adapter.device.base import Computed, Pages
from kvservice_adapter.device.cpu import CpuEvent
from kvservice_adapter.layer_source import BegunLayer, HostLayers, PlacedLayer
from kvservice_adapter.load import LayerLoader, LoadFailed
from kvservice_api.errors import LeaseExpired
from tests.contracts.device import WAIT_S, holding, pages_of
from tests.daemon import until
from tests.unit.adapter.test_load import (
    COUNTS,
    DEVICE,
    GROUP,
    LAYER_BYTES,
    LAYERS,
    History,
    check,
    empty_pages,
    loader_of,
    settle,
)


class DeviceLayers:
    """A source whose bytes are never on this host: something else copies all layers into pages, and signals each."""

    def __init__(self, history: History) -> None:
        self._history = history
        self.stream = DEVICE.stream("another-process")

    def after(self, computed: Computed) -> None:
        self.stream.after(computed)

    def begin(self, pages_of_layer: Callable[[int], Pages]) -> Iterator[BegunLayer]:
        begun = []
        for index, data in enumerate(self._history.data):
            pages = pages_of_layer(index)
            begun.append(BegunLayer(pages, self.stream.scatter(data, COUNTS, pages), data.nbytes))
        try:
            yield from begun
        finally:
            self._history.ended.append("closed")


class SlowCopies:
    """A source whose copies end when a test says so."""

    def __init__(self) -> None:
        self.events = [CpuEvent() for _ in range(LAYERS)]
        self.begun = 0

    def after(self, computed: Computed) -> None:
        pass

    def begin(self, pages_of_layer: Callable[[int], Pages]) -> Iterator[BegunLayer]:
        for index, event in enumerate(self.events):
            self.begun = index + 1
            yield BegunLayer(pages_of_layer(index), event, LAYER_BYTES)


def test_a_layer_is_begun_while_the_one_before_is_copied_and_no_third_one() -> None:
    source, stream = SlowCopies(), DEVICE.stream("test-load")
    loader = LayerLoader(DEVICE, stream, source, empty_pages, layer_count=LAYERS, buffer_layers=LAYERS)
    loader.start()

    for layer in range(LAYERS):
        begun = min(layer + 2, LAYERS)
        until(lambda expected=(layer, begun): (loader.report.layers, source.begun) == expected)  # type: ignore[misc]
        assert stream.submit(lambda: None).wait(WAIT_S)  # Another turn, which begins no further one.
        assert source.begun == begun
        source.events[layer].end(None)

    until(lambda: loader.is_done)
    assert (loader.report.layers, loader.report.error) == (LAYERS, None)


def test_layers_that_were_waited_for_are_in_the_report_before_the_streams_thread_runs_again() -> None:
    source, stream, held, gate = SlowCopies(), DEVICE.stream("test-load"), threading.Event(), threading.Event()
    loader = LayerLoader(DEVICE, stream, source, empty_pages, layer_count=LAYERS, buffer_layers=LAYERS, wait_s=WAIT_S)
    loader.start()
    for event in source.events[:-2]:
        event.end(None)
    until(lambda: source.begun == LAYERS)
    stream.submit(held.set)
    stream.submit(holding(gate))
    assert held.wait(WAIT_S)
    for event in source.events:
        event.end(None)

    for layer in range(LAYERS):
        loader.wait(layer)

    report = loader.report
    assert (report.layers, report.size_bytes) == (LAYERS, LAYERS * LAYER_BYTES)
    assert 0 < report.busy_s <= report.total_s
    gate.set()
    until(lambda: loader.is_done)
    assert loader.report.layers == LAYERS


@pytest.mark.parametrize("replaced", [None, 1])
def test_each_layer_in_place_is_there_once_its_bytes_can_be_trusted(replaced: int | None) -> None:
    """Blocks that are replaced while a layer is copied fail that layer, not only the load's end."""
    history, stream = History(), DEVICE.stream("test-load")

    def check_bytes(layer: int) -> None:
        if layer == replaced:
            raise LeaseExpired("blocks were moved")

    def placed() -> Iterator[PlacedLayer]:
        for layer, data in enumerate(history.data):
            yield PlacedLayer(layer, data, GROUP, partial(check_bytes, layer))

    source = HostLayers(stream, placed, COUNTS)
    loader = LayerLoader(DEVICE, stream, source, empty_pages, layer_count=LAYERS, buffer_layers=LAYERS, wait_s=WAIT_S)
    loader.start()
    right = LAYERS if replaced is None else replaced
    for layer in range(right):
        check(history, layer, loader.wait(layer))

    if replaced is not None:
        with pytest.raises(LoadFailed, match="blocks were moved"):
            loader.wait(replaced)
    until(lambda: loader.is_done)
    assert loader.report.layers == right


def test_keys_that_could_not_be_copied_as_they_are_stored_fail_their_layer() -> None:
    history, stream = History(), DEVICE.stream("test-load")
    source = HostLayers(stream, history.load, COUNTS, unrotated_pages=lambda layer: pages_of(1, 5, [0]))
    loader = LayerLoader(DEVICE, stream, source, empty_pages, layer_count=LAYERS, buffer_layers=LAYERS, wait_s=WAIT_S)
    loader.start()

    with pytest.raises(LoadFailed, match="could not be copied"):
        loader.wait(0)


def test_layers_that_something_else_copies_are_waited_for_and_leased_until_their_events() -> None:
    history, gate, stream = History(), threading.Event(), DEVICE.stream("test-load")
    source = DeviceLayers(history)
    source.stream.submit(holding(gate))
    loader = LayerLoader(DEVICE, stream, source, empty_pages, layer_count=LAYERS, release=history.release)
    loader.start()

    with pytest.raises(LoadFailed, match=r"layer 0 (was not copied|did not arrive) in time"):
        loader.wait(0, 0.1)
    assert (settle(stream, loader), history.ended) == (0, [])
    gate.set()
    for layer in range(LAYERS):
        check(history, layer, loader.wait(layer, WAIT_S))

    until(lambda: loader.is_done)
    assert history.ended == ["closed", "released"]
    assert (loader.report.layers, loader.report.size_bytes) == (LAYERS, LAYERS * LAYER_BYTES)


def test_a_load_whose_event_never_comes_ends_by_cancel_and_keeps_no_other_load_waiting() -> None:
    stuck, other, gate, stream = History(), History(), threading.Event(), DEVICE.stream("test-load")
    source = DeviceLayers(stuck)
    source.stream.submit(holding(gate))
    loader = LayerLoader(DEVICE, stream, source, empty_pages, layer_count=LAYERS, release=stuck.release)
    with pytest.raises(LoadFailed):
        loader.wait(0, 0.05)

    beside = loader_of(other, stream)
    for layer in range(LAYERS):
        check(other, layer, beside.wait(layer))
    assert stuck.ended == []
    loader.cancel()

    until(lambda: loader.is_done)
    assert stuck.ended == ["closed", "released"]
    gate.set()
