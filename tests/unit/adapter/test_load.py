"""Layer-wise pre-loading on the CPU: how far it runs ahead, and all ends of a load."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_adapter.device.arrays import ArrayView
from kvservice_adapter.device.base import Event, Pages, Stream
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader, LoadFailed
from kvservice_adapter.schedule import ReadBuffer
from kvservice_api.errors import ChecksumMismatch
from kvservice_client import LayerGroup, LoadedLayer
from tests.clock import ClientClock
from tests.contracts.device import HEADS, K_DIM, V_DIM, WAIT_S, noise, numbering, same_bits, stored_token
from tests.daemon import until

LAYERS, COUNTS = 6, (16, 16, 5)
GROUP = LayerGroup(LAYERS, HEADS, K_DIM, V_DIM, "float32")
LAYER_BYTES = sum(COUNTS) * HEADS * (K_DIM + V_DIM) * 4
DEVICE = CpuDevice()


class History:
    """Some layers, as a lease yields them. Each may be delayed or fail; records how the load ended."""

    def __init__(self, layers: int = LAYERS) -> None:
        self.data = [noise(LAYER_BYTES, seed) for seed in range(layers)]
        self.gates = [threading.Event() for _ in range(layers)]
        self.failing: dict[int, Exception] = {}
        self.asked = 0
        self.ended: list[str] = []
        for gate in self.gates:
            gate.set()

    def load(self) -> Iterator[LoadedLayer]:
        try:
            for index, data in enumerate(self.data):
                self.asked = index + 1
                assert self.gates[index].wait(WAIT_S)
                if index in self.failing:
                    raise self.failing[index]
                yield LoadedLayer(index, data, GROUP)
        finally:
            self.ended.append("closed")

    def release(self) -> None:
        self.ended.append("released")


def empty_pages(layer: int) -> Pages:
    tokens = sum(COUNTS)
    return Pages(torch.zeros(1, HEADS, tokens, K_DIM), torch.zeros(1, HEADS, tokens, V_DIM), [0])


def loader_of(history: History, stream: Stream | None = None, **options: Any) -> LayerLoader:
    options = {"layer_count": len(history.data), "release": history.release, "wait_s": WAIT_S, **options}
    pages_of_layer = options.pop("pages_of_layer", empty_pages)
    device = options.pop("device", DEVICE)
    stream = stream or device.stream("test-load")
    source = HostLayers(stream, history.load, COUNTS, rotations=options.pop("rotations", None))
    return LayerLoader(device, stream, source, pages_of_layer, **options)


def check(history: History, layer: int, pages: Pages) -> None:
    for token in (0, 15, 16, 36):
        keys, values = stored_token(history.data[layer], COUNTS, token, torch.float32)
        assert same_bits(pages.keys[0, :, token], keys)
        assert same_bits(pages.values[0, :, token], values)


def settle(stream: Stream, loader: LayerLoader) -> int:
    """The number of loaded layers once the stream's queue is empty."""
    loaded, still = -1, 0
    while still < 6:
        assert stream.submit(lambda: None).wait(WAIT_S)
        still = still + 1 if loader.report.layers == loaded else 0
        loaded = loader.report.layers
    return loaded


def test_each_layer_is_in_its_pages_when_its_wait_returns_and_the_lease_is_free_in_the_end() -> None:
    history = History()
    loader = loader_of(history)

    loader.start()
    for layer in range(LAYERS):
        check(history, layer, loader.wait(layer))

    until(lambda: loader.is_done)
    assert history.ended == ["closed", "released"]
    report = loader.report
    assert (report.layers, report.size_bytes, report.error) == (LAYERS, LAYERS * LAYER_BYTES, None)
    assert 0 < report.first_layer_s <= report.total_s
    assert report.bytes_per_s == report.size_bytes / report.busy_s
    with pytest.raises(LoadFailed, match="layer 2 was taken before"):
        loader.wait(2)


@pytest.mark.parametrize("k", [0, 1, 2, 5, 6, 9])
def test_loading_runs_ahead_as_far_as_the_buffer_goes(k: int) -> None:
    stream, history = DEVICE.stream("test-load"), History()
    loader = loader_of(history, stream, buffer_layers=k)
    rule = ReadBuffer(LAYERS, k)

    def expected() -> int:
        while rule.may_load:
            rule.loaded += 1
        return rule.loaded

    loader.start()
    assert settle(stream, loader) == expected() == min(k, LAYERS)
    loader.request_runs()
    rule.is_running = True
    assert settle(stream, loader) == expected()
    for layer in range(LAYERS):
        loader.wait(layer)
        rule.taken += 1
        assert settle(stream, loader) == expected() == min(LAYERS, layer + 1 + max(1, k))


def test_the_layer_after_one_that_the_engine_waits_for_is_loaded_before_the_engine_wakes() -> None:
    class LateDevice(CpuDevice):
        """The engine's thread is slow."""

        def wait_in_compute(self, event: Event, timeout_s: float) -> bool:
            return super().wait_in_compute(event, timeout_s) and gate.wait(WAIT_S)

    stream, history, gate = DEVICE.stream("test-load"), History(), threading.Event()
    loader = loader_of(history, stream, device=LateDevice())
    history.gates[0].clear()
    engine = threading.Thread(target=loader.wait, args=(0,))
    engine.start()
    until(lambda: history.asked == 1)

    history.gates[0].set()

    until(lambda: loader.report.layers == 2)
    assert settle(stream, loader) == 2
    gate.set()
    engine.join(WAIT_S)
    check(history, 1, loader.wait(1))


def test_the_pauses_of_a_full_buffer_do_not_count_as_loading() -> None:
    stream, history, clock = DEVICE.stream("test-load"), History(2), ClientClock()
    loader = loader_of(history, stream, buffer_layers=1, clock=clock)
    loader.start()
    settle(stream, loader)

    clock.advance(seconds=5)
    loader.wait(0)
    loader.wait(1)
    settle(stream, loader)

    assert (loader.report.total_s, loader.report.busy_s) == (5, 0)


def test_a_wait_ends_with_its_bound_and_layers_that_came_stay() -> None:
    history = History()
    history.gates[2].clear()
    loader = loader_of(history, wait_s=0.02)
    loader.start()
    loader.wait(0, WAIT_S)
    pages = loader.wait(1, WAIT_S)

    with pytest.raises(LoadFailed, match="layer 2 did not arrive in time"):
        loader.wait(2)
    with pytest.raises(LoadFailed, match="layer 3 did not arrive in time"):
        loader.wait(3, 0.0)

    check(history, 1, pages)
    assert loader.report.waited_s[2] >= 0.02
    history.gates[2].set()
    check(history, 2, loader.wait(2, WAIT_S))


def test_a_copy_that_takes_too_long_ends_the_wait_as_well() -> None:
    history, gate = History(), threading.Event()

    class SlowDevice(CpuDevice):
        def bits(self, view: ArrayView) -> Any:
            assert gate.wait(WAIT_S)
            return super().bits(view)

    loader = loader_of(history, device=SlowDevice())

    with pytest.raises(LoadFailed, match=r"layer 0 (was not copied|did not arrive) in time"):
        loader.wait(0, 0.1)
    gate.set()
    loader.wait(0)


@pytest.mark.parametrize("k", [0, 6])
def test_a_failure_reaches_the_engine_at_its_layer_with_its_cause_and_no_later(k: int) -> None:
    history = History()
    history.failing[2] = ChecksumMismatch("damaged")
    loader = loader_of(history, buffer_layers=k)

    loader.start()

    taken = [loader.wait(layer) for layer in (0, 1)]
    for layer in (2, 3, 5):
        with pytest.raises(LoadFailed, match="damaged") as raised:
            loader.wait(layer, 20.0)
        assert raised.value.__cause__ is history.failing[2]
    for layer, pages in enumerate(taken):
        check(history, layer, pages)
    until(lambda: loader.is_done)
    assert history.ended == ["closed", "released"]
    assert loader.report.error is history.failing[2]


def test_pages_that_are_not_available_are_a_failure() -> None:
    history, error = History(), MemoryError("no pages")

    def pages_of_layer(layer: int) -> Pages:
        if layer:
            raise error
        return empty_pages(layer)

    loader = loader_of(history, pages_of_layer=pages_of_layer)

    loader.wait(0)
    with pytest.raises(LoadFailed, match="no pages") as raised:
        loader.wait(1)
    assert raised.value.__cause__ is error


def test_pages_that_do_not_fit_are_a_failure() -> None:
    loader = loader_of(
        History(),
        pages_of_layer=lambda layer: Pages(torch.zeros(1, HEADS, 8, K_DIM), torch.zeros(1, HEADS, 8, V_DIM), [0]),
    )

    with pytest.raises(LoadFailed, match="layer 0 could not be copied"):
        loader.wait(0)
    until(lambda: loader.is_done)
    assert isinstance(loader.report.error, ValueError)


@pytest.mark.parametrize(
    ("dtype", "k_dim", "v_dim"),
    [(torch.int32, K_DIM, V_DIM), (torch.float32, V_DIM, K_DIM), (torch.bfloat16, 2 * K_DIM, 2 * V_DIM)],
    ids=str,
)
def test_pages_of_the_right_size_and_another_geometry_are_a_failure(dtype: torch.dtype, k_dim: int, v_dim: int) -> None:
    def pages_of_layer(layer: int) -> Pages:
        keys, values = (torch.zeros(1, HEADS, sum(COUNTS), dim, dtype=dtype) for dim in (k_dim, v_dim))
        return Pages(keys, values, [0])

    loader = loader_of(History(), pages_of_layer=pages_of_layer)

    with pytest.raises(LoadFailed, match=r"pages of .* with head dims"):
        loader.wait(0)


@pytest.mark.parametrize("given", [0, 3])
def test_a_load_that_ends_early_is_a_failure(given: int) -> None:
    history = History(given)
    loader = loader_of(history, layer_count=LAYERS)

    for layer in range(given):
        check(history, layer, loader.wait(layer))
    with pytest.raises(LoadFailed, match=f"ended before layer {given}"):
        loader.wait(given)


def test_a_cancelled_load_ends_and_its_layers_stay() -> None:
    history = History()
    loader = loader_of(history, buffer_layers=2)
    loader.start()
    pages = loader.wait(0)
    until(lambda: loader.report.layers == 3)

    loader.cancel()

    until(lambda: loader.is_done)
    assert history.ended == ["closed", "released"]
    assert history.asked < LAYERS
    check(history, 0, pages)
    check(history, 1, loader.wait(1))
    with pytest.raises(LoadFailed, match="ended before"):
        loader.wait(LAYERS - 1, 20.0)
    assert loader.report.error is None


def test_a_load_that_never_began_frees_its_lease_all_the_same() -> None:
    history = History()
    loader = loader_of(history)

    loader.cancel()

    until(lambda: loader.is_done)
    assert history.ended == ["released"]


def test_cancelling_does_not_wait_while_a_layer_is_loaded() -> None:
    history = History()
    history.gates[1].clear()
    loader = loader_of(history, buffer_layers=4)
    loader.start()
    loader.wait(0)
    until(lambda: history.asked == 2)

    loader.cancel()

    assert not loader.is_done
    with pytest.raises(LoadFailed, match="ended before"):
        loader.wait(1, 20.0)
    history.gates[1].set()
    until(lambda: loader.is_done)
    assert (history.asked, history.ended) == (2, ["closed", "released"])


def test_a_wait_that_is_under_way_ends_when_the_load_is_cancelled() -> None:
    history = History()
    history.gates[0].clear()
    loader, raised = loader_of(history), list[LoadFailed]()

    def wait() -> None:
        try:
            loader.wait(0, 20.0)
        except LoadFailed as error:
            raised.append(error)

    engine = threading.Thread(target=wait)
    engine.start()
    until(lambda: history.asked == 1)
    loader.cancel()
    engine.join(WAIT_S)

    assert len(raised) == 1
    history.gates[0].set()


@pytest.mark.parametrize("begun", [False, True])
def test_a_loader_that_is_dropped_frees_its_lease_and_its_thread(begun: bool) -> None:
    class Cache:
        """The pages' owner knows the loader, and the loader's pages_of_layer know the owner."""

        loader: LayerLoader

        def pages_of_layer(self, layer: int) -> Pages:
            return empty_pages(layer)

    history, cache, stream = History(), Cache(), DEVICE.stream("dropped-load")
    cache.loader = loader_of(history, stream, buffer_layers=2, pages_of_layer=cache.pages_of_layer)
    if begun:
        cache.loader.start()
        assert settle(stream, cache.loader) == 2

    del cache, stream
    gc.collect()

    until(lambda: "released" in history.ended)
    until(lambda: not [each for each in threading.enumerate() if each.name == "dropped-load"])


def test_loads_take_turns_on_a_stream_and_a_full_buffer_does_not_delay_other_loads() -> None:
    stream, first, second = DEVICE.stream("test-load"), History(), History()
    paused, going = loader_of(first, stream, buffer_layers=2), loader_of(second, stream)

    paused.start()
    going.start()

    for layer in range(LAYERS):
        check(second, layer, going.wait(layer))
    assert settle(stream, paused) == 2
    for layer in range(LAYERS):
        check(first, layer, paused.wait(layer))


def test_a_stream_that_is_closed_under_a_load_is_a_failure_at_once() -> None:
    stream, history = DEVICE.stream("test-load"), History()
    loader = loader_of(history, stream, buffer_layers=1)
    loader.start()
    settle(stream, loader)

    stream.close()

    check(history, 0, loader.wait(0))
    with pytest.raises(LoadFailed, match="takes no more work"):
        loader.wait(1, 20.0)
    until(lambda: loader.is_done)
    assert history.ended == ["closed", "released"]
    until(lambda: not [each for each in threading.enumerate() if each.name == "kvservice-load-end"])


def test_keys_are_turned_to_where_they_are_read() -> None:
    history = History()
    history.data = [np.ones(LAYER_BYTES // 4, np.float32).view(np.uint8) for _ in range(LAYERS)]
    loader = loader_of(history, rotations=[numbering(37)] * LAYERS)

    for layer in range(LAYERS):
        pages = loader.wait(layer)
        assert torch.equal(pages.keys, torch.arange(1.0, 38.0)[:, None].expand(1, HEADS, 37, K_DIM))
        assert torch.all(pages.values == 1)


def test_many_loads_at_a_time_all_bring_what_is_theirs_or_end() -> None:
    """Several engines' threads, shared streams, cancels and failures at any moment."""
    streams = [DEVICE.stream("test-load") for _ in range(2)]
    wrong: list[BaseException] = []
    histories: list[History] = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(15):
                history = History(4)
                histories.append(history)
                cancelled_at, failing_at = chance.randrange(12), chance.randrange(12)
                if failing_at < 4:
                    history.failing[failing_at] = ChecksumMismatch("damaged")
                loader = loader_of(history, chance.choice(streams), buffer_layers=chance.randrange(6))
                if chance.random() < 0.5:
                    loader.start()
                for layer in range(4):
                    if layer == cancelled_at:
                        loader.cancel()
                    try:
                        check(history, layer, loader.wait(layer))
                        assert layer < failing_at
                    except LoadFailed:
                        assert layer >= min(cancelled_at, failing_at)
        except BaseException as error:
            wrong.append(error)

    engines = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.join(60)

    assert not wrong
    gc.collect()
    until(lambda: all("released" in history.ended for history in histories))


def test_pages_that_were_taken_are_not_held_by_the_loader() -> None:
    loader = loader_of(History())
    pages = [loader.wait(layer) for layer in range(LAYERS)]
    until(lambda: loader.is_done)
    held = [weakref.ref(each.keys) for each in pages]

    del pages
    gc.collect()

    assert not any(each() is not None for each in held)
