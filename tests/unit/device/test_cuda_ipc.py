"""cuda_ipc in the daemon, where no GPU is needed to show it: what the event loop waits for, and how long."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import Extent
from kvservice.device import cuda_ipc
from kvservice.device.cuda_ipc import ArenaMemory, CudaIpc, _Devices, _Open
from kvservice.device.registration import ChainOrder
from kvservice.device.save_run import SaveRun
from kvservice_api.cuda.runtime import Gpu
from kvservice_api.image import BlockGeometry, block_geometry, checksum
from kvservice_api.layout import Layout, Shard
from tests.clock import HandClock, passes


class StuckGpu:
    """Its memory is not closed before `may_go_on` is set."""

    def __init__(self) -> None:
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()

    def end(self) -> None:
        """As `Registration.end`."""

    def close(self) -> None:
        self.is_asked.set()
        self.may_go_on.wait()


async def never() -> bool:
    return False


async def test_a_gpu_that_hangs_does_not_keep_the_daemon_from_closing_its_files(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, stuck = HandClock(), StuckGpu()
    store: Any = SimpleNamespace(clock=clock)
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as hashing:
        arena = ArenaMemory(np.zeros(1, np.uint8), lambda: 0, never)
        made = CudaIpc(store, arena, hashing, refused_because="", staging_bytes=0, registrations_max=1)
        opened: Any = _Open(SimpleNamespace(name="engine"), stuck, thread, lambda: None)  # type: ignore[arg-type]
        made._open[1] = opened
        closing = asyncio.create_task(made.close())
        await asyncio.to_thread(stuck.is_asked.wait)

        while not closing.done():
            passes(clock)
            await asyncio.sleep(0)

        assert "has not ended its work within 5 s" in caplog.text
        stuck.may_go_on.set()


def test_an_error_is_noted_while_another_gpu_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()
    gpu = SimpleNamespace(bus_id="0000:01:00.0", make_context=lambda: None, use=lambda: None)

    def compiled(gpu: object) -> None:
        has_begun.set()
        may_go_on.wait()

    monkeypatch.setattr(Gpu, "of_bus_id", lambda bus_id: gpu)
    monkeypatch.setattr(cuda_ipc, "PageKernels", compiled)
    devices = _Devices()
    with ThreadPoolExecutor(2) as threads:
        making = threads.submit(partial(devices.of, gpu.bus_id))
        has_begun.wait()

        assert devices.noted(OSError("a launch failed once")) == ""

        may_go_on.set()
        assert making.result().gpu.bus_id == gpu.bus_id


async def test_a_save_works_out_its_slices_on_threads_and_not_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = Layout("pages", "bfloat16", 3, kv_heads=2, k_head_dim=8, v_head_dim=8, block_tokens=32)
    shard, threads_used = Shard.whole(layout), set[int]()
    slice_range = BlockGeometry.slice_range

    def noted(geometry: BlockGeometry, layer: int) -> tuple[int, int]:
        threads_used.add(threading.get_ident())
        return slice_range(geometry, layer)

    monkeypatch.setattr(BlockGeometry, "slice_range", noted)
    geometry = block_geometry(layout, shard, 32)
    arena = np.random.default_rng(7).integers(0, 255, 3 * geometry.image_bytes, np.uint8)
    begins = [2 * geometry.image_bytes, 0]
    places = [
        SimpleNamespace(position=at, extent=Extent(0, begin, geometry.image_bytes)) for at, begin in enumerate(begins)
    ]
    request = SimpleNamespace(layout=layout, shard=shard, token_counts=[32, 32])
    gathered: list[Any] = []
    registration: Any = SimpleNamespace(
        shard=shard,
        check=lambda: None,
        gather=lambda *copy: gathered.append(copy),
        end_of_reads=lambda: SimpleNamespace(synchronize=lambda: None),
    )
    upload: Any = SimpleNamespace(request=request, places=places)
    header: Any = SimpleNamespace(chains=[SimpleNamespace(keys=[b"1", b"2"])])
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as hashing:
        on = partial(asyncio.get_running_loop().run_in_executor, thread)
        run = SaveRun(registration, upload, header, [ChainOrder(0, [[0, 1]])], arena, hashing, on)

        assert [layers async for layers in run.gather()] == [1, 2, 3]
        await run._hashes()

    base, ranges = int(arena.ctypes.data), [slice_range(geometry, layer) for layer in range(3)]
    for layer, (begin, end) in enumerate(ranges):
        assert gathered[layer][-1] == [[(base + offset + begin, end - begin)] for offset in begins]
        assert run._sums[:, layer].tolist() == [checksum(arena[at + begin : at + end].data) for at in begins]
    assert threading.get_ident() not in threads_used
