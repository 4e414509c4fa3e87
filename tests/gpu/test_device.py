"""The CUDA device keeps the contract of all devices, on pages that are CuPy's."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_adapter.device.base import NotOrdered, NotTurned, Pages
from kvservice_adapter.device.cuda import CudaDevice, open_device
from kvservice_adapter.torch_device import TorchDevice, device_for
from kvservice_api.cuda.host_memory import HostMemory
from kvservice_api.cuda.runtime import Gpu
from kvservice_api.mapping import Mapping
from tests.contracts.device import WAIT_S, DeviceContract, holding, noise, numbering

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda_device(gpu: Gpu) -> CudaDevice:
    """Slots are small, so that copies take several chunks."""
    import cupy

    return CudaDevice(gpu, lambda: int(cupy.cuda.get_current_stream().ptr), slot_bytes=4 << 10)


class TestCudaDevice(DeviceContract):
    @pytest.fixture
    def device(self, cuda_device: CudaDevice, cupy: Any) -> CudaDevice:
        self._cupy = cupy
        return cuda_device

    def place(self, tensor: torch.Tensor) -> Any:
        bits = tensor.contiguous().view(getattr(torch, f"uint{8 * tensor.element_size()}"))
        placed = self._cupy.asarray(bits.numpy())
        self._cupy.cuda.get_current_stream().synchronize()  # Tests order copies after what the engine computes later.
        return placed

    def read(self, array: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(self._cupy.asnumpy(array)).view(dtype)


@pytest.fixture
def pages(cupy: Any) -> Pages:
    keys, values = cupy.zeros((4, 2, 16, 8), "u2"), cupy.zeros((4, 2, 16, 4), "u2")
    cupy.cuda.get_current_stream().synchronize()
    return Pages(keys, values, [2, 0, 3], dtype="bfloat16")


SIZE = 40 * 2 * 12 * 2
COUNTS = [16, 16, 8]


@pytest.mark.sim
def test_a_gather_does_not_begin_before_the_engines_earlier_work(
    cuda_device: CudaDevice, cupy: Any, pages: Pages
) -> None:
    import cudasim

    stream, back = cuda_device.stream("test"), cuda_device.staging(4096).reserve(SIZE)
    assert back is not None
    back[:] = 0
    with cudasim.held(cupy.cuda.get_current_stream().ptr):
        pages.keys[...] = 7
        stream.after(cuda_device.computed())
        event = stream.gather(pages, COUNTS, back)
        assert event.queued.wait(WAIT_S)
        assert not event.wait(0.05)
        assert not back.any()

    assert event.wait(WAIT_S)
    assert np.count_nonzero(back.view(np.uint16) == 7) == 40 * 2 * 8


@pytest.mark.sim
def test_a_scatter_does_not_begin_before_the_engines_earlier_work_in_its_pages(
    cuda_device: CudaDevice, cupy: Any, pages: Pages
) -> None:
    import cudasim

    stream, ones = cuda_device.stream("test"), np.ones(SIZE, np.uint8)
    with cudasim.held(cupy.cuda.get_current_stream().ptr):
        pages.keys[...] = 7
        stream.after(cuda_device.computed())
        event = stream.scatter(ones, COUNTS, pages)
        assert not event.wait(0.05)

    assert event.wait(WAIT_S)
    assert int(cupy.asnumpy(pages.keys)[[2, 0]].min()) == 0x0101


@pytest.mark.sim
def test_what_the_engine_is_given_after_its_wait_begins_once_the_copy_is_done(
    cuda_device: CudaDevice, cupy: Any, pages: Pages
) -> None:
    """The wait itself returns while the copy is held, and the engine's thread continues."""
    import cudasim

    stream, ones = cuda_device.stream("test"), np.ones(SIZE, np.uint8)
    with cudasim.slow(50_000):
        event = stream.scatter(ones, COUNTS, pages)
        assert cuda_device.wait_in_compute(event, WAIT_S)
        assert not event.is_done
        computed = pages.keys.copy()

    assert int(cupy.asnumpy(computed)[[2, 0]].min()) == 0x0101


def test_a_wait_for_a_copy_that_is_not_queued_ends_with_its_time(cuda_device: CudaDevice, pages: Pages) -> None:
    stream, gate = cuda_device.stream("test"), threading.Event()
    stream.submit(holding(gate))
    event = stream.scatter(np.ones(SIZE, np.uint8), COUNTS, pages)

    assert not cuda_device.wait_in_compute(event, 0.01)
    gate.set()
    assert cuda_device.wait_in_compute(event, WAIT_S)


def test_while_the_engine_captures_a_graph_nothing_is_recorded_there(
    cuda_device: CudaDevice, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = cuda_device.stream("test")
    event = stream.scatter(np.ones(SIZE, np.uint8), COUNTS, pages)
    monkeypatch.setattr("kvservice_adapter.device.cuda._is_capturing", lambda stream: True)

    computed = cuda_device.computed()

    with pytest.raises(NotOrdered, match="graph"):
        stream.after(computed)
    assert cuda_device.wait_in_compute(event, WAIT_S)
    assert event.is_done


def test_an_engines_thread_keeps_its_device(gpu: Gpu, cuda_device: CudaDevice, pages: Pages, cupy: Any) -> None:
    before = cupy.cuda.runtime.getDevice()

    event = cuda_device.stream("test").scatter(np.ones(SIZE, np.uint8), COUNTS, pages)
    cuda_device.computed()
    assert cuda_device.wait_in_compute(event, WAIT_S)

    assert cupy.cuda.runtime.getDevice() == before


def test_pages_of_another_place_are_an_error(cuda_device: CudaDevice) -> None:
    pages = Pages(np.zeros((1, 2, 16, 8), np.uint16), np.zeros((1, 2, 16, 4), np.uint16), [0])

    event = cuda_device.stream("test").scatter(np.ones(16 * 2 * 12 * 2, np.uint8), [16], pages)

    assert event.wait(WAIT_S)
    assert isinstance(event.error, ValueError)
    assert "not of CUDA device" in str(event.error)


def test_a_block_that_no_slot_holds_is_an_error(cuda_device: CudaDevice, cupy: Any) -> None:
    pages = Pages(cupy.zeros((1, 2, 100, 8), "u2"), cupy.zeros((1, 2, 100, 4), "u2"), [0])

    event = cuda_device.stream("test").scatter(np.ones(100 * 2 * 12 * 2, np.uint8), [100], pages)

    assert event.wait(WAIT_S)
    assert isinstance(event.error, ValueError)
    assert "at most 4096 bytes" in str(event.error)


def test_keys_are_turned_in_order_with_the_engines_computing(cuda_device: CudaDevice, cupy: Any) -> None:
    keys = cupy.zeros((2, 20, 8), cupy.float32)
    keys[...] = 1
    cuda_device.rotate(keys, numbering(20))

    assert np.array_equal(cupy.asnumpy(keys)[0, :, 0], np.arange(1, 21))


@pytest.mark.sim
@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMemcpyAsync", "cuLaunchKernel"])
def test_keys_that_cudas_error_keeps_from_being_turned_are_as_before_and_no_error_of_cudas_is_raised(
    cuda_device: CudaDevice, cupy: Any, call: str
) -> None:
    import cudasim

    tokens = 20_000  # More than the memory of earlier tables has room for.
    keys = cupy.ones((2, tokens, 8), cupy.float32)
    cudasim.fail(call, cudasim.OOM)

    with pytest.raises(NotTurned):
        cuda_device.rotate(keys, numbering(tokens))

    cudasim.reset()
    assert (cupy.asnumpy(keys) == 1).all()
    cuda_device.rotate(keys, numbering(tokens))
    assert np.array_equal(cupy.asnumpy(keys)[0, :, 0], np.arange(1, tokens + 1))


@pytest.mark.sim
def test_where_there_is_no_memory_for_the_staging_torch_copies_and_a_line_says_so(
    cupy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import cudasim

    cudasim.fail("cudaHostAlloc", cudasim.OOM, after=1)

    device = device_for(torch.device("cuda", 0))

    assert isinstance(device, TorchDevice)
    assert "slowly: CUDARuntimeError" in caplog.text
    assert "extra cuda13" in caplog.text


def test_blocks_are_read_in_place_only_where_the_gpu_copies_them_itself(gpu: Gpu, cupy: Any) -> None:
    """What the processor copies, it can verify, and does: memory may have been damaged since the daemon did."""
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 1 << 20)
    memory, shared = HostMemory(gpu), Mapping(fd, 1 << 20, writable=True).bytes
    os.close(fd)
    device = CudaDevice(gpu, lambda: 0, host_memory=memory, slot_bytes=4 << 10)

    reads = [device.reads_in_place]
    memory.register(shared, 0, 1 << 20)
    reads.append(device.reads_in_place)
    memory.forget(shared)
    reads.append(device.reads_in_place)

    assert reads == [False, True, False]


def test_engines_of_one_gpu_share_its_staging(cupy: Any) -> None:
    first = open_device(0, lambda: 0)

    assert open_device(0, lambda: 0) is first


def test_each_thread_of_a_stream_is_on_its_gpu(
    gpu: Gpu, cuda_device: CudaDevice, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so in its capture mode: a call of another thread would end an engine's capture."""
    threads: list[str] = []
    use = Gpu.use

    def noted(gpu: Gpu) -> None:
        threads.append(threading.current_thread().name)
        use(gpu)

    monkeypatch.setattr(Gpu, "use", noted)

    event = cuda_device.stream("noted").scatter(np.ones(SIZE, np.uint8), COUNTS, pages)

    assert event.wait(WAIT_S)
    assert threads == ["noted", "noted-end"]


def test_a_wait_for_the_engines_work_ends_no_capture_on_any_thread(
    gpu: Gpu, cuda_device: CudaDevice, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is on a thread that may have made no call to CUDA before, in CUDA's strictest mode."""
    modes: list[str] = []
    relaxed = Gpu.relaxed

    @contextmanager
    def noted(gpu: Gpu) -> Iterator[None]:
        with relaxed(gpu):
            modes.append("relaxed")
            yield
        modes.append("as before")

    monkeypatch.setattr(Gpu, "relaxed", noted)
    computed = cuda_device.computed()

    is_computed: list[bool] = []
    waited = cuda_device.stream("saves").submit(lambda: is_computed.append(computed.wait(WAIT_S)))

    assert waited.wait(WAIT_S)
    assert (waited.error, is_computed, modes) == (None, [True], ["relaxed", "as before"])


@pytest.mark.sim
@pytest.mark.parametrize("fault", ["no event", "no thread"])
def test_a_copy_whose_end_cannot_be_awaited_as_usual_ends_before_its_event(
    cuda_device: CudaDevice, pages: Pages, fault: str
) -> None:
    """What was queued before the error is done: it neither reads nor writes memory that is another's by then."""
    import cudasim

    stream, back = cuda_device.stream("test"), cuda_device.staging(4096).reserve(SIZE)
    assert back is not None
    assert stream.gather(pages, COUNTS, back).wait(WAIT_S)
    back[:] = 7
    with cudasim.held(cuda_device.saves.copies._copying.ptr):
        if fault == "no event":
            cudasim.fail("cudaEventCreateWithFlags", cudasim.OOM, count=1)
        else:
            stream._ending.close()  # As the interpreter's end does.
        event = stream.gather(pages, COUNTS, back)
        assert not event.wait(0.05)

    assert event.wait(WAIT_S)
    assert isinstance(event.error, Exception)
    assert not (back == 7).any()


@pytest.mark.sim
def test_no_more_is_queued_than_cudas_streams_take_without_a_wait(cuda_device: CudaDevice, cupy: Any) -> None:
    """In some of its calls CuPy keeps the interpreter's lock: the engine's thread would stand still with ours."""
    import cudasim

    gc.collect()  # Devices of tests before: to free their memory, CUDA waits for all streams.
    blocks, size = 100, 2 * 12 * 2
    keys, values = cupy.zeros((1, 2, blocks, 8), "u2"), cupy.zeros((1, 2, blocks, 4), "u2")
    pages, stream = Pages(keys, values, [0], dtype="float16"), cuda_device.stream("test")
    memory = cuda_device.host_memory.pinned(2 * size * blocks)
    memory[:] = 1
    slices = [memory[2 * size * block :][:size] for block in range(blocks)]  # Each is a copy of its own.
    with cudasim.held(cupy.cuda.get_current_stream().ptr):
        stream.after(cuda_device.computed())
        events = [stream.scatter(slices, [1] * blocks, pages) for _ in range(20)]
        assert events[6].queued.wait(WAIT_S)
        assert not events[9].queued.wait(0.05)
        assert cudasim.calls("cudaMemcpyAsync") < 1000

    assert events[-1].wait(WAIT_S)
    assert [event.error for event in events] == [None] * 20
    assert (cupy.asnumpy(keys) == 0x0101).all()


def test_many_small_blocks_in_two_ranges_each_are_copied_in_several_chunks(cuda_device: CudaDevice, cupy: Any) -> None:
    blocks, size = 700, 2 * 2 * 1 * 2
    keys, values = cupy.zeros((1, 2, blocks, 1), "u2"), cupy.zeros((1, 2, blocks, 1), "u2")
    cupy.cuda.get_current_stream().synchronize()
    memory = cuda_device.host_memory.pinned(32 * blocks)
    memory[:] = 1
    slices = [(memory[32 * block :][: size // 2], memory[32 * block + 16 :][: size // 2]) for block in range(blocks)]

    event = cuda_device.stream("test").scatter(slices, [1] * blocks, Pages(keys, values, [0], dtype="float16"))

    assert event.wait(WAIT_S)
    assert event.error is None
    assert (cupy.asnumpy(keys) == 0x0101).all()


def test_a_short_range_that_is_copied_by_dma_between_two_that_are_staged_keeps_its_bytes(
    cuda_device: CudaDevice, cupy: Any
) -> None:
    keys, values = cupy.zeros((1, 1, 2, 12), "u2"), cupy.zeros((1, 1, 2, 2), "u2")
    cupy.cuda.get_current_stream().synchronize()
    pinned, pageable = cuda_device.host_memory.pinned(128), np.full(128, 2, np.uint8)
    pinned[:] = 1
    slices = [(pageable[:24], pinned[:4]), (pageable[64:88], pinned[64:68])]

    event = cuda_device.stream("test").scatter(slices, [1, 1], Pages(keys, values, [0], dtype="float16"))

    assert event.wait(WAIT_S)
    assert event.error is None
    assert (cupy.asnumpy(keys) == 0x0202).all()
    assert (cupy.asnumpy(values) == 0x0101).all()


def test_pages_of_the_second_gpu_are_copied_there(cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    with cupy.cuda.Device(1):
        keys, values = cupy.zeros((4, 2, 16, 8), "u2"), cupy.zeros((4, 2, 16, 4), "u2")
        cupy.cuda.get_current_stream().synchronize()
    second = CudaDevice(Gpu(1), lambda: 0, slot_bytes=4 << 10)
    pages = Pages(keys, values, [2, 0, 3], dtype="bfloat16")
    slices, back = noise(SIZE), np.zeros(SIZE, np.uint8)

    stream = second.stream("second")
    stream.scatter(slices, COUNTS, pages)
    event = stream.gather(pages, COUNTS, back)

    assert event.wait(WAIT_S)
    assert event.error is None
    assert np.array_equal(back, slices)
