"""An engine's loads and saves by cuda_ipc, and by the next transport where it cannot: before a load, and within one."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice_adapter.breaker import Breaker, probe_of
from kvservice_adapter.device.cuda import CudaDevice
from kvservice_adapter.device.cuda_ipc import IpcPages, exported_pages
from kvservice_adapter.engine.page_loads import AnswerWait, PagedLayers, PrefixLoad, Waits, release_on, stop_all
from kvservice_adapter.engine.page_saves import PageSave, PageSaver
from kvservice_adapter.load import LayerLoader, LoadFailed
from kvservice_api.cuda.runtime import Gpu
from kvservice_api.errors import Cancelled, ChecksumMismatch, DeviceUnavailable
from kvservice_client import BlockChain, Client, Clock
from kvservice_client.retry import SYSTEM_CLOCK
from tests.clock import ClientClock
from tests.daemon import MIB, NEVER_S, SOON_S, DaemonProcess, until
from tests.gpu.conftest import simulation
from tests.gpu.ipc_engine import Pages, layout_of, new_chain, same_tokens

pytestmark = pytest.mark.gpu

LAYERS = 8
LAYOUT = layout_of("bfloat16", LAYERS)
FROM, TO = [7, 2, 9, 4, 1], [3, 11, 0, 5, 8]


@pytest.fixture(scope="module")
def device(gpu: Gpu) -> CudaDevice:
    import cupy

    return CudaDevice(gpu, lambda: int(cupy.cuda.get_current_stream().ptr), slot_bytes=MIB)


class Worker:
    """As vLLM's worker role uses the parts."""

    def __init__(self, cupy: Any, device: CudaDevice, client: Client, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.pages = Pages(cupy, LAYOUT)
        self.device, self.client = device, client
        self.layers = PagedLayers(self.pages.keys, self.pages.values, ["bfloat16"] * LAYERS, [0] * LAYERS)
        self.blocks = client.open_layout(LAYOUT)
        exported = IpcPages(device.gpu, self.pages.keys, self.pages.values, [0] * LAYERS, clock)
        self.memory = self.blocks.device_memory(exported)
        self.memory.register()
        self.saver = PageSaver(
            device,
            self.blocks,
            self.layers,
            Breaker(probe_of(self.blocks)),
            SYSTEM_CLOCK,
            staging_bytes=MIB,
            memory=self.memory,
        )

    def save(self, chain: BlockChain, page_ids: Sequence[int]) -> None:
        gathering = self.saver.gather([PageSave(chain, 0, [page_ids])], SOON_S)
        assert gathering.wait(SOON_S)
        until(lambda: self.blocks.contains(chain) == len(chain))

    def load(self, chain: BlockChain, end: int, layer_s: float = SOON_S, clock: Clock = SYSTEM_CLOCK) -> PrefixLoad:
        stream = self.device.stream("test")
        waits = Waits(AnswerWait(SOON_S, clock), layer_s, layer_s)
        ticket = self.blocks.lookup(chain).export()
        load = PrefixLoad(
            stream, self.blocks, ticket, (0, end), waits, release_on(stream), verify="once", memory=self.memory
        )
        load.after(self.device.computed())
        return load

    def loaded(self, chain: BlockChain, end: int) -> str:
        """Load all at once. Returns the transport."""
        load = self.load(chain, end)
        for begun in load.begin(load.pages_of_layer(self.layers, [TO])):
            assert begun.event.wait(SOON_S)
        return load.transport

    def close(self) -> None:
        self.saver.close(SOON_S)
        self.memory.close()


@pytest.fixture
def worker(cupy: Any, device: CudaDevice, daemon: DaemonProcess) -> Iterator[Worker]:
    with daemon.client("engine") as client:
        made = Worker(cupy, device, client)
        yield made
        made.close()


def test_a_worker_saves_and_loads_by_cuda_ipc_to_the_bit(worker: Worker) -> None:
    chain, saved = new_chain(LAYOUT, 75), worker.pages.fill()

    worker.save(chain, FROM)
    worker.pages.clear()

    assert worker.loaded(chain, 75) == "cuda_ipc"
    assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 75)
    stats = worker.client.stats()
    assert set(stats.transports) == {"cuda_ipc"}
    assert stats.loaded_bytes == stats.saved_bytes == {"cuda_ipc": 75 * worker.layers.token_bytes}


def test_layers_are_taken_one_by_one_while_later_ones_are_copied(worker: Worker) -> None:
    chain, saved = new_chain(LAYOUT, 64), worker.pages.fill()
    worker.save(chain, FROM)
    worker.pages.clear()
    load = worker.load(chain, 64)
    loader = LayerLoader(
        worker.device,
        worker.device.stream("test-load"),
        load,
        load.pages_of_layer(worker.layers, [TO]),
        layer_count=LAYERS,
        buffer_layers=LAYERS,
        wait_s=SOON_S,
    )
    loader.start()

    for layer in range(LAYERS):
        loader.wait(layer)

    assert load.transport == "cuda_ipc"
    assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)


def test_a_daemon_without_cuda_is_used_by_shared_memory_and_said_once(
    cupy: Any, device: CudaDevice, new_daemon: Callable[..., DaemonProcess], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with new_daemon(cuda__enabled="off").client() as client:
        worker = Worker(cupy, device, client)
        chain, saved = new_chain(LAYOUT, 64), worker.pages.fill()
        worker.save(chain, FROM)
        for _ in range(2):
            worker.pages.clear()

            assert worker.loaded(chain, 64) == "shm"

            assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)
        worker.close()
    assert sum("cuda_ipc is not used: cuda.enabled is off" in line for line in caplog.messages) == 1


@pytest.mark.sim
def test_a_load_that_fails_in_a_middle_layer_continues_by_shared_memory(
    cupy: Any, device: CudaDevice, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us="3000", faults=f"cuLaunchKernel:2:{LAYERS + 6}:1")
    with daemon.client() as client:
        worker = Worker(cupy, device, client)
        chain, saved = new_chain(LAYOUT, 64), worker.pages.fill()
        worker.save(chain, FROM)
        worker.pages.clear()

        assert worker.loaded(chain, 64) == "cuda_ipc+shm"

        assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)
        assert "GPU copy failed" in client.stats().cuda_ipc_refused_because
        worker.pages.clear()
        assert worker.loaded(chain, 64) == "shm"  # It is not asked again.
        assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)
        worker.close()


@pytest.mark.sim
def test_a_load_while_the_engine_still_computes_is_ordered_after_it_on_the_gpu(cupy: Any, worker: Worker) -> None:
    chain, saved = new_chain(LAYOUT, 64), worker.pages.fill()
    worker.save(chain, FROM)
    worker.pages.clear()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        with simulation().held(stream.ptr):
            load = worker.load(chain, 64)
            layers = load.begin(load.pages_of_layer(worker.layers, [TO]))
            begun = next(layers)  # It is given to the engine's thread, which continues.

            assert load.transport == "shm"
            assert not begun.event.is_done
        assert all(each.event.wait(SOON_S) for each in (begun, *layers))
    assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)


def test_a_refusal_that_took_all_the_time_for_an_answer_leaves_the_next_transport_its_own(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, saved = new_chain(LAYOUT, 64), worker.pages.fill()
    worker.save(chain, FROM)
    worker.pages.clear()
    clock = ClientClock()
    load = worker.load(chain, 64, clock=clock)

    def refuse(*order: object) -> Any:
        clock.advance(seconds=2 * SOON_S)
        raise DeviceUnavailable("a launch failed once")

    monkeypatch.setattr(worker.memory, "load", refuse)

    for begun in load.begin(load.pages_of_layer(worker.layers, [TO])):
        assert begun.event.wait(SOON_S)

    assert load.transport == "shm"
    assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)


@pytest.mark.sim
def test_a_stopped_load_writes_no_more_while_the_daemon_does_not_answer(
    cupy: Any, device: CudaDevice, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us="10000")
    with daemon.client() as client:
        worker = Worker(cupy, device, client)
        chain = new_chain(LAYOUT, 64)
        worker.pages.fill()
        worker.save(chain, FROM)
        load = worker.load(chain, 64, NEVER_S)
        layers = load.begin(load.pages_of_layer(worker.layers, [TO]))
        next(layers)  # The next layers are queued on the GPU.
        with daemon.stopped():
            load.stop()
            other = worker.pages.fill()
            with pytest.raises(Cancelled):
                list(layers)
        worker.close()  # It waits for the daemon's copies.
        assert all(np.array_equal(before, after) for before, after in zip(other, worker.pages.read(), strict=True))


def test_after_a_restart_the_pages_are_opened_again_and_meanwhile_others_carry(
    cupy: Any, device: CudaDevice, new_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = new_daemon()
    with daemon.client() as client:
        worker = Worker(cupy, device, client)
        chain, saved = new_chain(LAYOUT, 64), worker.pages.fill()
        worker.save(chain, FROM)
        daemon.stop()
        daemon.start()
        worker.pages.clear()

        assert worker.loaded(chain, 64) in ("shm", "cuda_ipc")

        assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)
        until(lambda: worker.memory.is_ready)
        worker.pages.clear()
        assert worker.loaded(chain, 64) == "cuda_ipc"
        assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 64)
        worker.close()


@pytest.mark.sim
def test_many_stopped_loads_are_waited_for_at_one_time(
    cupy: Any, device: CudaDevice, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us="10000")
    with daemon.client() as client:
        clock = ClientClock()
        worker = Worker(cupy, device, client, clock=clock)
        chain = new_chain(LAYOUT, 64)
        worker.pages.fill()
        worker.save(chain, FROM)
        loads = [worker.load(chain, 64, NEVER_S) for _ in range(4)]
        running = [load.begin(load.pages_of_layer(worker.layers, [TO])) for load in loads]
        for layers in running:
            next(layers)
        began_s = clock.now_s()
        with daemon.stopped():
            stop_all(loads)

            assert 0 < clock.now_s() - began_s < 0.06
            other = worker.pages.fill()
            for layers in running:
                with pytest.raises(Cancelled):
                    list(layers)
        assert clock.now_s() - began_s < 0.06
        worker.close()
        assert all(np.array_equal(before, after) for before, after in zip(other, worker.pages.read(), strict=True))


@pytest.mark.sim
def test_a_slow_daemon_holds_the_pages_of_a_save_no_longer_than_one_answer(
    cupy: Any, device: CudaDevice, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us="100000")  # Of each of several pieces of work per layer.
    with daemon.client() as client:
        worker = Worker(cupy, device, client)
        chain = new_chain(LAYOUT, 64)
        worker.pages.fill()

        gathering = worker.saver.gather([PageSave(chain, 0, [FROM])], 0.3)

        assert gathering.wait(SOON_S)
        assert gathering.unanswered_s >= 0.3  # Each layer takes less, all of them more.
        until(lambda: worker.blocks.contains(chain) == len(chain))
        assert "cuda_ipc" not in client.stats().saved_bytes
        worker.close()


def test_a_damaged_block_is_found_and_those_before_it_are_loaded(
    cupy: Any, device: CudaDevice, new_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon, chain = new_daemon(), new_chain(LAYOUT, 75)
    with daemon.client() as client:
        worker = Worker(cupy, device, client)
        saved = worker.pages.fill()
        worker.save(chain, FROM)
        worker.close()
    daemon.stop()
    second_block = np.concatenate([saved[5][page] for page in FROM], axis=1)[:, 32:64, :16].tobytes()[:64]
    files = [file for file in daemon.arena_folder.iterdir() if file.is_file() and file.stat().st_size]
    assert sum(_with_a_wrong_byte(file, second_block) for file in files) == 1
    daemon.start()
    with daemon.client() as client:
        worker = Worker(cupy, device, client)
        worker.pages.clear()
        load = worker.load(chain, 75)

        with pytest.raises(ChecksumMismatch):
            list(load.begin(load.pages_of_layer(worker.layers, [TO])))

        assert (load.transport, load.valid_tokens) == ("cuda_ipc", 32)
        assert same_tokens(saved, FROM, worker.pages.read(), TO, 0, 32)
        worker.close()


def _with_a_wrong_byte(file: Path, content: bytes) -> bool:
    """Whether the content was there."""
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        at = mapped.find(content)
        if at >= 0:
            mapped[at + 3] ^= 0x5A
        return at >= 0


def test_pages_on_a_cpu_are_not_exported() -> None:
    from kvservice_adapter.device.cpu import CpuDevice

    assert exported_pages(CpuDevice(), [], [], []) is None


@pytest.mark.sim
def test_a_load_whose_daemon_dies_fails_in_time(
    cupy: Any, device: CudaDevice, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us="10000")
    with daemon.client(reconnect_wait_s=0.1) as client:
        worker = Worker(cupy, device, client)
        chain = new_chain(LAYOUT, 64)
        worker.pages.fill()
        worker.save(chain, FROM)
        load = worker.load(chain, 64)
        loader = LayerLoader(
            device,
            device.stream("test-load"),
            load,
            load.pages_of_layer(worker.layers, [TO]),
            layer_count=LAYERS,
            buffer_layers=0,
            wait_s=SOON_S,
        )
        loader.start()
        loader.wait(0)
        daemon.kill()

        with pytest.raises(LoadFailed):
            _take(loader)
        worker.close()


def _take(loader: LayerLoader) -> None:
    for layer in range(1, LAYERS):
        loader.wait(layer)
