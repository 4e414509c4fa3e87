"""One CUDA device of this process: which one, its memory, and the errors that end its use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvservice_api.cuda.runtime import DeviceBroken, Gpu, allocation_of, error_status, why_unavailable
from tests.forking import Forked
from tests.gpu.conftest import simulation

pytestmark = pytest.mark.gpu


def test_a_device_is_found_by_number_and_by_its_bus(gpu: Gpu) -> None:
    assert why_unavailable() == ""
    assert Gpu.of_bus_id(gpu.bus_id).ordinal == 0
    assert len(gpu.bus_id.split(":")) == 3
    with pytest.raises(ValueError, match="no CUDA device 4096"):
        Gpu(4096)
    with pytest.raises(ValueError, match="no CUDA device ffff:ff:1f"):
        Gpu.of_bus_id("ffff:ff:1f.7")


def test_a_threads_device_is_the_one_before_after_a_use_of_another(cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("it needs two devices")
    runtime, other = cupy.cuda.runtime, Gpu(1)

    with other.current():
        inside = runtime.getDevice()
    with pytest.raises(KeyError), other.current():
        raise KeyError

    assert (inside, runtime.getDevice()) == (1, 0)


def test_the_allocation_of_an_address_inside_it_is_known(gpu: Gpu) -> None:
    memory = gpu.device_memory(4 << 20)

    base, size = allocation_of(memory.address + 1000)

    assert base == memory.address
    assert size >= 4 << 20
    with pytest.raises(ValueError, match="in no allocation"):
        allocation_of(64)


def test_device_memory_is_freed_with_its_object(gpu: Gpu) -> None:
    memory = gpu.device_memory(4 << 20)
    address = memory.address

    del memory

    with pytest.raises(ValueError, match="in no allocation"):
        allocation_of(address)


def test_pinned_memory_stays_while_a_view_of_it_is_kept(cupy: Any, gpu: Gpu) -> None:
    half = gpu.pinned(1 << 16)[1 << 15 :]
    half[:] = 7
    stream, device = gpu.stream(), gpu.device_memory(1 << 15)

    runtime = cupy.cuda.runtime
    runtime.memcpyAsync(device.address, half.ctypes.data, half.size, runtime.memcpyHostToDevice, stream.ptr)
    back = np.zeros(1 << 15, np.uint8)
    runtime.memcpyAsync(back.ctypes.data, device.address, half.size, runtime.memcpyDeviceToHost, stream.ptr)
    stream.synchronize()

    assert (back == 7).all()


def test_an_event_is_done_when_the_stream_is_there(gpu: Gpu) -> None:
    stream, event = gpu.stream(), gpu.event()

    event.record(stream)
    event.synchronize()

    assert event.done


def test_an_error_of_one_call_does_not_end_the_use_of_a_device(cupy: Any) -> None:
    gpu = Gpu(0)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as raised:
        gpu.device_memory(1 << 60)

    assert error_status(raised.value) == 2
    assert error_status(KeyError()) == 0
    assert not gpu.note(raised.value)
    assert not gpu.is_broken
    gpu.check()


@pytest.mark.sim
def test_a_sticky_error_ends_the_use_of_a_device(cupy: Any) -> None:
    gpu, stream = Gpu(0), Gpu(0).stream()
    simulation().poison(700)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as raised:
        stream.synchronize()

    assert gpu.note(raised.value)
    assert gpu.is_broken
    with pytest.raises(DeviceBroken, match=r"CUDA device .* cannot be used by this process any more: .*illegal"):
        gpu.check()


def test_a_child_of_a_process_that_used_cuda_says_so(gpu: Gpu) -> None:
    gpu.stream().synchronize()

    with Forked(why_unavailable) as child:
        assert child.result().startswith("this process was forked from one that used CUDA")


class Driver:
    """The calls of NVIDIA's driver that the simulation lacks."""

    def __init__(self) -> None:
        self.mode, self.modes, self.contexts = 0, list[int](), list[int]()

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.mode, mode._obj.value = mode._obj.value, self.mode
        self.modes.append(self.mode)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 40 + ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.contexts.append(device.value)
        return 0 if device.value == 40 else 101


def test_a_thread_of_an_engine_has_its_capture_mode_again_after_our_calls(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr("kvservice_api.cuda.runtime._libcuda", lambda: driver)

    with gpu.relaxed():
        assert driver.mode == 2

    assert (driver.mode, driver.modes) == (0, [2, 0])


def test_a_context_is_made_for_the_device_or_the_error_is_named(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr("kvservice_api.cuda.runtime._libcuda", lambda: driver)

    gpu.make_context()

    assert driver.contexts == [40]
    monkeypatch.setattr(gpu, "ordinal", 1)
    with pytest.raises(OSError, match="CUDA error 101"):
        gpu.make_context()


def test_memory_is_freed_in_relaxed_mode_on_whichever_thread_the_collector_runs(
    gpu: Gpu, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the engine's, which captures a CUDA graph: a call in its own mode would end the capture."""
    driver, freed = Driver(), list[int]()

    def noted(free: Any) -> Any:
        def call(address: int) -> None:
            freed.append(driver.mode)
            free(address)

        return call

    monkeypatch.setattr("kvservice_api.cuda.runtime._libcuda", lambda: driver)
    for name in ("free", "freeHost"):
        monkeypatch.setattr(cupy.cuda.runtime, name, noted(getattr(cupy.cuda.runtime, name)))
    device, pinned = gpu.device_memory(4096), gpu.pinned(4096)
    pinned[:] = 7
    part = pinned[10:20]
    del device, pinned
    assert freed == [2]

    assert part.sum() == 70
    del part

    assert freed == [2, 2]
    assert driver.mode == 0
