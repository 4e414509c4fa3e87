"""An engine whose KV is in CuPy arrays, without torch: both pipelines, with a daemon, on a CUDA device."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest

from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cuda import CudaDevice
from kvservice_adapter.layer_source import HostLayers, layers_of
from kvservice_adapter.load import LayerLoader, LoadFailed
from kvservice_adapter.save import LayerSaver
from kvservice_api.cuda.host_memory import HostMemory
from kvservice_api.cuda.runtime import Gpu
from kvservice_client import BlockCache, BlockChain, Client, KVError, Layout, Lease, block_chain
from kvservice_client.buffers import Bytes
from tests.contracts.device import WAIT_S
from tests.daemon import MIB, DaemonProcess, until
from tests.gpu.conftest import simulation

pytestmark = pytest.mark.gpu
LAYERS, HEADS, K_DIM, V_DIM, PAGE_TOKENS = 4, 2, 16, 8, 16
TOKENS = 90
PAGE_IDS = [5, 0, 3, 6, 1, 2]
DTYPES = {"float16": "u2", "bfloat16": "u2", "float8_e4m3fn": "u1"}

Arrays = list[tuple[Any, Any]]


_first_tokens = count()


def new_chain(layout: Layout) -> BlockChain:
    """A chain that no other test has."""
    tokens = np.arange(TOKENS)
    tokens[0] = 1000 + next(_first_tokens)
    return block_chain(layout, tokens, with_partial=True)


def layout_of(dtype: str) -> Layout:
    return Layout("cupy", dtype, layers=LAYERS, kv_heads=HEADS, k_head_dim=K_DIM, v_head_dim=V_DIM, block_tokens=32)


class Engine:
    """Pages of every layer, ``[page, head, token, dim]`` in the order of vLLM: pages and tokens first."""

    def __init__(
        self, cupy: Any, gpu: Gpu, dtype: str = "float16", seed: int = 0, beside: Engine | None = None
    ) -> None:
        """Engines of one process share what is registered."""
        self.cupy, self.dtype = cupy, dtype
        self.host_memory: HostMemory = HostMemory(gpu) if beside is None else beside.host_memory
        self.device = CudaDevice(
            gpu, lambda: int(cupy.cuda.get_current_stream().ptr), host_memory=self.host_memory, slot_bytes=64 << 10
        )
        random = np.random.default_rng(seed)
        shape = LAYERS, 2, 7, PAGE_TOKENS, HEADS, K_DIM
        bits = random.integers(0, 256, (*shape, np.dtype(DTYPES[dtype]).itemsize), np.uint8)
        self.memory = cupy.asarray(bits.view(DTYPES[dtype])[..., 0])
        cupy.cuda.get_current_stream().synchronize()

    def pages(self, layer: int) -> Pages:
        keys, values = self.memory[layer]
        return Pages(keys.swapaxes(1, 2), values[..., :V_DIM].swapaxes(1, 2), PAGE_IDS, 0, self.dtype)

    def tokens(self, layer: int) -> tuple[Any, ...]:
        """Bits of keys and values of all tokens, ``[token, head, dim]``."""
        keys, values = self.memory[layer]
        arrays = keys[PAGE_IDS], values[PAGE_IDS][..., :V_DIM]
        return tuple(self.cupy.asnumpy(each.reshape(-1, *each.shape[2:])[:TOKENS]) for each in arrays)

    def save(self, blocks: BlockCache, chain: BlockChain, saver: LayerSaver | None = None) -> LayerSaver:
        saver = saver or LayerSaver(self.device, blocks, staging_bytes=MIB)
        job = saver.begin(chain)
        assert job is not None
        for layer in range(LAYERS):
            job.layer(layer, self.pages(layer))
        job.commit()
        assert saver.flush(WAIT_S)
        return saver

    def loader(self, lease: Lease, pages: Sequence[Pages] = ()) -> LayerLoader:
        stream = self.device.stream("cupy-load")
        in_place = self.device.reads_in_place
        layers = partial(layers_of, lease, 0, lease.hit_blocks, in_place=in_place, layer_timeout_s=WAIT_S)
        source = HostLayers(stream, layers, lease.token_counts)
        return LayerLoader(
            self.device,
            stream,
            source,
            pages.__getitem__ if pages else self.pages,
            layer_count=LAYERS,
            buffer_layers=LAYERS,
            wait_s=WAIT_S,
            release=lease.release,
        )

    def load(self, blocks: BlockCache, chain: BlockChain) -> LayerLoader:
        loader = self.loader(blocks.lookup(chain))
        loader.start()
        take_all(loader)
        return loader

    def has_the_tokens_of(self, other: Engine) -> bool:
        return all(
            np.array_equal(ours, theirs)
            for layer in range(LAYERS)
            for ours, theirs in zip(self.tokens(layer), other.tokens(layer), strict=True)
        )


def take_all(loader: LayerLoader) -> None:
    for layer in range(LAYERS):
        loader.wait(layer)


@contextmanager
def attached(daemon: DaemonProcess, engine: Engine, transport: str) -> Iterator[Client]:
    """A client whose arena is registered, if it has one."""
    with daemon.client("cupy", timeout_s=15, transport=transport) as client:
        client.observe_arenas(engine.host_memory)
        if transport == "shm":
            client.open_layout(layout_of(engine.dtype)).ping()
            until(lambda: bool(engine.host_memory.registered))
        yield client


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_from_an_engines_pages_is_loaded_into_anothers_to_the_bit(
    cupy: Any, gpu: Gpu, daemon: DaemonProcess, dtype: str, transport: str
) -> None:
    first = Engine(cupy, gpu, dtype, 1)
    second = Engine(cupy, gpu, dtype, 2, beside=first)
    with attached(daemon, first, transport) as client:
        blocks = client.open_layout(layout_of(dtype))
        chain = new_chain(blocks.layout)
        saver = first.save(blocks, chain)
        assert (saver.stats.saved, saver.stats.failed) == (1, 0)

        assert not second.has_the_tokens_of(first)
        loader = second.load(blocks, chain)

        assert second.has_the_tokens_of(first)
        until(lambda: loader.is_done)
        report = loader.report
        assert (report.layers, report.error) == (LAYERS, None)
        assert client.stats().viewed_bytes == (report.size_bytes if transport == "shm" else 0)


@pytest.mark.sim
@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_no_copy_of_pageable_memory_and_no_wait_of_the_device_is_in_a_step(
    cupy: Any, gpu: Gpu, daemon: DaemonProcess, transport: str
) -> None:
    import cudasim

    first = Engine(cupy, gpu, seed=1)
    second = Engine(cupy, gpu, seed=2, beside=first)
    with attached(daemon, first, transport) as client:
        blocks = client.open_layout(layout_of("float16"))
        chain = new_chain(blocks.layout)
        saver = LayerSaver(first.device, blocks, staging_bytes=MIB)
        cudasim.reset()

        first.save(blocks, chain, saver)
        loader = second.load(blocks, chain)

        until(lambda: loader.is_done)
        assert saver.stats.saved == 1
        for direction, counts in cudasim.copies().items():
            assert counts["pageable"] == (0, 0), direction
        for call in NOT_IN_A_STEP:
            assert cudasim.calls(call) == 0, call
        assert cudasim.findings() == []


NOT_IN_A_STEP = ["cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaDeviceSynchronize", "cudaMemcpy"]


@pytest.mark.sim
def test_the_engines_thread_only_records_events_and_waits_for_them_on_its_stream(
    cupy: Any, gpu: Gpu, daemon: DaemonProcess
) -> None:

    first = Engine(cupy, gpu, seed=1)
    second = Engine(cupy, gpu, seed=2, beside=first)
    with attached(daemon, first, "shm") as client:
        blocks = client.open_layout(layout_of("float16"))
        chain = new_chain(blocks.layout)
        saver = first.save(blocks, chain)
        engine = threading.get_ident()
        called: list[str] = []
        runtime = cupy.cuda.runtime
        with recorded(runtime, engine, called):
            job = saver.begin(new_chain(blocks.layout))
            assert job is not None
            for layer in range(LAYERS):
                job.layer(layer, first.pages(layer))
            job.commit()
            loader = second.loader(blocks.lookup(chain))
            loader.start()
            for layer in range(LAYERS):
                loader.wait(layer)

        assert set(called) <= {"getDevice", "streamIsCapturing", "eventRecord", "streamWaitEvent"}
        assert called.count("eventRecord") == LAYERS + 1
        assert second.has_the_tokens_of(first)
        assert saver.flush(WAIT_S)


@contextmanager
def recorded(runtime: Any, thread: int, called: list[str]) -> Iterator[None]:
    """Names of the runtime's functions that a thread calls meanwhile."""

    def recording(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            if threading.get_ident() == thread:
                called.append(name)
            return function(*given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(runtime):
            function = getattr(runtime, name)
            if callable(function) and not isinstance(function, type) and not name.startswith("_"):
                patch.setattr(runtime, name, recording(name, function))
        yield


@pytest.mark.sim
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_streams_holds_under_random_delays(cupy: Any, gpu: Gpu, daemon: DaemonProcess, seed: int) -> None:
    """An engine computes, saves what it computed, and computes again in the same pages; then it loads into them."""
    import cudasim

    first = Engine(cupy, gpu, seed=10 + seed)
    second = Engine(cupy, gpu, seed=20 + seed, beside=first)
    computed = Engine(cupy, gpu, seed=30 + seed, beside=first)
    with attached(daemon, first, "shm") as client, cudasim.slow(0, 3000):
        blocks = client.open_layout(layout_of("float16"))
        chain = new_chain(blocks.layout)
        saver = LayerSaver(first.device, blocks, staging_bytes=MIB)
        job = saver.begin(chain)
        assert job is not None
        for layer in range(LAYERS):
            first.memory[layer] = computed.memory[layer]  # A forward, on the engine's stream.
            event = job.layer(layer, first.pages(layer))
            assert first.device.wait_in_compute(event, WAIT_S)
            first.memory[layer] = 0
        job.commit()
        assert saver.flush(WAIT_S)
        assert saver.stats.saved == 1

        loader = second.loader(blocks.lookup(chain))
        for layer in range(LAYERS):
            second.memory[layer] = 1  # Earlier work of the engine in the pages that are loaded into.
        loader.start()
        for layer in range(LAYERS):
            loader.wait(layer)
        copy = second.memory.copy()

        second.memory = copy
        assert second.has_the_tokens_of(computed)
    assert cudasim.findings() == []


@pytest.mark.sim
def test_after_a_sticky_error_loads_fail_saves_are_dropped_and_nothing_is_raised_into_the_engine(
    cupy: Any, daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    import cudasim

    engine = Engine(cupy, Gpu(0), seed=1)
    with attached(daemon, engine, "shm") as client:
        blocks = client.open_layout(layout_of("float16"))
        chain = new_chain(blocks.layout)
        saver = engine.save(blocks, chain)
        lease = blocks.lookup(chain)
        pages = [engine.pages(layer) for layer in range(LAYERS)]
        cudasim.fail("@copy", cudasim.ILLEGAL_ADDRESS, count=0)

        loader = engine.loader(lease, pages)
        loader.start()
        with pytest.raises(LoadFailed):
            take_all(loader)
        until(lambda: loader.is_done)
        assert engine.device.computed().unordered_because
        job = saver.begin(new_chain(blocks.layout))
        assert job is not None
        for layer in range(LAYERS):
            job.layer(layer, pages[layer])
        job.commit()

        assert saver.flush(WAIT_S)
        assert (saver.stats.saved, saver.stats.failed) == (1, 1)
        assert blocks.lookup(chain).hit_blocks > 0  # The lease of the failed load has ended, and the daemon answers.
        lost = [record for record in caplog.records if "the CUDA device fails" in record.message]
        assert len(lost) == 1
        cudasim.reset()


@pytest.mark.sim
def test_what_cannot_be_allocated_or_queued_is_the_error_of_one_copy(
    cupy: Any, gpu: Gpu, daemon: DaemonProcess
) -> None:
    import cudasim

    first = Engine(cupy, gpu, seed=1)
    second = Engine(cupy, gpu, seed=2, beside=first)
    with attached(daemon, first, "shm") as client:
        blocks = client.open_layout(layout_of("float16"))
        chain = new_chain(blocks.layout)
        saver = first.save(blocks, chain)
        cudasim.fail("cudaMemcpyAsync", cudasim.OOM, after=1)

        failed = second.loader(blocks.lookup(chain))
        failed.start()
        with pytest.raises(LoadFailed):
            take_all(failed)
        until(lambda: failed.is_done)
        second.load(blocks, chain)

        assert second.has_the_tokens_of(first)
        assert saver.stats.failed == 0
        assert cudasim.findings() == []


def test_an_arena_that_the_daemon_replaces_is_unregistered_and_the_new_one_registered(
    cupy: Any, gpu: Gpu, new_daemon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = new_daemon()
    first = Engine(cupy, gpu, seed=1)
    second = Engine(cupy, gpu, seed=2, beside=first)
    with attached(daemon, first, "shm") as client:
        blocks = client.open_layout(layout_of("float16"))
        first.save(blocks, new_chain(blocks.layout))
        forgotten, forget = threading.Event(), first.host_memory.forget

        def forget_and_say_so(memory: Bytes) -> None:
            forget(memory)
            forgotten.set()

        # The new mapping may have the old one's address, so addresses tell nothing.
        monkeypatch.setattr(first.host_memory, "forget", forget_and_say_so)

        daemon.stop()
        shutil.rmtree(daemon.arena_folder)
        daemon.start()
        until(lambda: answers(blocks))
        assert forgotten.wait(WAIT_S)
        until(lambda: bool(first.host_memory.registered))
        chain = new_chain(blocks.layout)
        first.save(blocks, chain)
        second.load(blocks, chain)

        assert second.has_the_tokens_of(first)
    if simulation() is not None:
        assert simulation().findings() == []


def answers(blocks: BlockCache) -> bool:
    try:
        blocks.ping()
    except KVError:
        return False
    return True


@pytest.mark.sim
def test_the_engines_thread_waits_for_no_layer_while_the_gpu_computes_what_came_before(
    cupy: Any, gpu: Gpu, daemon: DaemonProcess
) -> None:
    import cudasim

    first = Engine(cupy, gpu, seed=1)
    second = Engine(cupy, gpu, seed=2, beside=first)
    with attached(daemon, first, "shm") as client:
        blocks = client.open_layout(layout_of("float16"))
        chain = new_chain(blocks.layout)
        first.save(blocks, chain)
        pages = [second.pages(layer) for layer in range(LAYERS)]
        stream, lease = second.device.stream("cupy-load"), blocks.lookup(chain)
        source = HostLayers(stream, lease.load, lease.token_counts)
        with cudasim.held(cupy.cuda.get_current_stream().ptr):
            second.memory[...] = 1  # The GPU does not get to it meanwhile.
            loader = LayerLoader(
                second.device,
                stream,
                source,
                pages.__getitem__,
                layer_count=LAYERS,
                buffer_layers=LAYERS,
                wait_s=WAIT_S,
                release=lease.release,
            )
            loader.start()
            take_all(loader)
            assert loader.report.layers == 0

        assert second.has_the_tokens_of(first)
        until(lambda: loader.is_done)
