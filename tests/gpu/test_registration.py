"""A registration of GPU memory in the daemon, without its processes: what it waits for, and what it frees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvservice.device.registration import LoadRun, PageLoad, Registration, UsedGpu
from kvservice.rpc.devices import _places
from kvservice_adapter.device.cuda_ipc import IpcPages
from kvservice_api.cuda.host_memory import HostMemory
from kvservice_api.cuda.page_kernels import PageKernels
from kvservice_api.cuda.runtime import Gpu
from kvservice_api.errors import RegistrationEnded
from kvservice_client import Shard
from tests.daemon import MIB
from tests.gpu.conftest import simulation
from tests.gpu.ipc_engine import LAYERS, Pages, layout_of

pytestmark = pytest.mark.gpu

LAYOUT = layout_of("bfloat16")
PAGE_IDS = [3, 11, 0, 5]
SLICES = np.ones((2, LAYOUT.shard_slice_bytes(Shard.whole(LAYOUT), 0, LAYOUT.block_tokens)), np.uint8)


@pytest.fixture
def registration(cupy: Any, gpu: Gpu, kernels: PageKernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registration]:
    """CUDA opens no handle in the process that made it: here a handle is looked up."""
    runtime, bases, export = cupy.cuda.runtime, dict[bytes, int](), cupy.cuda.runtime.ipcGetMemHandle

    def get(base: int) -> bytes:
        handle: bytes = export(base)
        bases[handle] = base
        return handle

    monkeypatch.setattr(runtime, "ipcGetMemHandle", get)
    monkeypatch.setattr(runtime, "ipcOpenMemHandle", bases.__getitem__)
    monkeypatch.setattr(runtime, "ipcCloseMemHandle", lambda address: None)
    pages = Pages(cupy, LAYOUT)
    exported = IpcPages(gpu, pages.keys, pages.values, [0] * LAYERS)
    device = UsedGpu(gpu, HostMemory(gpu), kernels)
    places = _places(exported.description())
    made = Registration(device, places, LAYOUT, Shard.whole(LAYOUT), staging_bytes=16 * MIB)
    yield made
    if not made.is_ended:
        made.close()


def load_of(registration: Registration) -> LoadRun:
    order = PageLoad(0, [PAGE_IDS], [0], 2 * LAYOUT.block_tokens, 0, 1)
    runs = [[(slices.ctypes.data, slices.size)] for slices in SLICES]
    return registration.load(order, [LAYOUT.block_tokens] * 2, lambda layer: runs)


def always() -> bool:
    return True


@pytest.mark.sim
def test_a_load_whose_end_cannot_be_recorded_is_waited_for_all_the_same(cupy: Any, registration: Registration) -> None:
    simulation().slow(20000)
    run = load_of(registration)
    simulation().fail("cudaEventRecord", 2, after=4)  # The copies record four themselves.
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        run.step(LAYERS, always)

    run.stop()

    assert registration._writes._computing.done
    assert registration._writes._copying.done


def test_a_closed_registration_has_freed_its_staging_though_a_load_still_refers_to_it(
    cupy: Any, registration: Registration
) -> None:
    free_bytes = cupy.cuda.runtime.memGetInfo
    run = load_of(registration)
    run.step(1, always)
    before = free_bytes()[0]

    registration.close()

    assert free_bytes()[0] - before >= 16 * MIB
    with pytest.raises(RegistrationEnded):
        run.step(LAYERS, always)
    run.stop()


def test_a_save_may_be_ended_after_its_registration_was_closed(registration: Registration) -> None:
    registration.close()

    registration.wait_for_reads()
