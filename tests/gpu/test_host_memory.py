"""Registered host memory, and copies between it and pages: edges of pieces, aliases, pinned slots."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_api.cuda import host_memory as module
from kvservice_api.cuda.geometry import LayerPages, PageArray
from kvservice_api.cuda.host_memory import HostMemory
from kvservice_api.cuda.layer_copies import LayerCopies
from kvservice_api.cuda.page_kernels import PageKernels
from kvservice_api.cuda.runtime import Gpu
from kvservice_api.mapping import Mapping
from tests.contracts.device import WAIT_S
from tests.gpu.conftest import simulation

pytestmark = pytest.mark.gpu
PAGE, HEADS, DIM, TOKENS = 4096, 2, 16, 16
BLOCK_BYTES = TOKENS * HEADS * 2 * DIM * 2

Bytes = NDArray[np.uint8]


@pytest.fixture
def shared() -> Iterator[tuple[Bytes, Bytes]]:
    """Sixteen pages of shared memory, mapped twice: writable, and read-only."""
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 16 * PAGE)
    yield Mapping(fd, 16 * PAGE, writable=True).bytes, Mapping(fd, 16 * PAGE, writable=False).bytes
    os.close(fd)


@pytest.fixture
def memory(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Registers two pages at a time."""
    monkeypatch.setattr(module, "PIECE_BYTES", 2 * PAGE)
    return HostMemory(gpu)


def address(array: Bytes) -> int:
    return int(array.ctypes.data)


def test_a_range_is_cut_where_pieces_end(memory: HostMemory, shared: tuple[Bytes, Bytes]) -> None:
    writable, readable = shared
    base = address(writable)
    memory.alias(readable, writable)
    memory.register(writable, 0, 5 * PAGE)

    assert memory.registered == [(base, 2 * PAGE), (base + 2 * PAGE, 2 * PAGE), (base + 4 * PAGE, PAGE)]
    with memory.held():
        assert memory.dma(base + 10, 100) == [(base + 10, 100)]
        assert memory.dma(base, 2 * PAGE) == [(base, 2 * PAGE)]
        assert memory.dma(base + 2 * PAGE - 1, 2) == [(base + 2 * PAGE - 1, 1), (base + 2 * PAGE, 1)]
        assert memory.dma(address(readable) + 2 * PAGE - 1, 2) == [(base + 2 * PAGE - 1, 1), (base + 2 * PAGE, 1)]
        assert memory.dma(base + PAGE, 4 * PAGE) == [
            (base + PAGE, PAGE),
            (base + 2 * PAGE, 2 * PAGE),
            (base + 4 * PAGE, PAGE),
        ]
        assert memory.dma(base + 5 * PAGE - 1, 2) is None
        assert memory.dma(base + 5 * PAGE, 1) is None
        assert memory.dma(base - 1, 2) is None
    memory.forget(writable)
    with memory.held():
        assert memory.dma(base, 1) is None
        assert memory.dma(address(readable), 1) is None
    assert memory.registered == []


def test_only_whole_pages_of_memory_are_registered(memory: HostMemory, shared: tuple[Bytes, Bytes]) -> None:
    writable, _ = shared
    memory.register(writable, 10, 3 * PAGE - 1)

    assert memory.registered == [(address(writable) + PAGE, PAGE)]
    memory.forget(writable)


def test_pinned_memory_is_known_as_long_as_it_is_used(memory: HostMemory) -> None:
    pinned = memory.pinned(100)
    begin = address(pinned)
    part = pinned[10:20]
    del pinned

    with memory.held():
        assert memory.dma(address(part), 10) == [(begin + 10, 10)]
    del part
    with memory.held():
        assert memory.dma(begin, 1) is None


@pytest.mark.sim
def test_a_refusal_is_logged_once_and_the_rest_is_not_registered(
    memory: HostMemory, shared: tuple[Bytes, Bytes], caplog: pytest.LogCaptureFixture
) -> None:
    import cudasim

    cudasim.fail("cudaHostRegister", cudasim.OOM, after=1, count=2)

    was_registered = [memory.is_registered]
    memory.register(shared[0], 0, 2 * PAGE)
    was_registered.append(memory.is_registered)
    memory.register(shared[0], 2 * PAGE, 8 * PAGE)
    was_registered.append(memory.is_registered)
    memory.register(shared[0], 8 * PAGE, 12 * PAGE)
    memory.register(shared[0], 12 * PAGE, 16 * PAGE)

    base = address(shared[0])
    assert [begin - base for begin, _ in memory.registered] == [0, 12 * PAGE, 14 * PAGE]
    assert was_registered == [False, True, False]
    assert caplog.text.count("cannot be registered") == 1
    memory.forget(shared[0])


class Copied:
    """Pages on the device, and copies with slots of three blocks."""

    def __init__(self, cupy: Any, gpu: Gpu, kernels: PageKernels, memory: HostMemory) -> None:
        self.keys, self.values = (cupy.zeros((8, HEADS, TOKENS, DIM), "u2") for _ in range(2))
        cupy.cuda.get_current_stream().synchronize()
        keys, values = (PageArray(each.data.ptr, 8, each.strides, DIM) for each in (self.keys, self.values))
        self.layer = LayerPages(keys, values, HEADS, TOKENS, 2, "float16")
        self.copies = LayerCopies(gpu, memory, kernels, slot_bytes=3 * BLOCK_BYTES)

    def scatter(self, blocks: list[Bytes], page_ids: list[int]) -> None:
        runs = [[(address(block), block.size)] for block in blocks]
        self.copies.scatter(runs, [TOKENS] * len(blocks), self.layer, page_ids, 0, None)
        self.copies.record().synchronize()

    def gather(self, blocks: list[Bytes], page_ids: list[int]) -> list[int]:
        seen: list[int] = []
        runs = [[(address(block), block.size)] for block in blocks]
        counts = [TOKENS] * len(blocks)
        self.copies.gather(self.layer, page_ids, 0, None, counts, runs, seen.append)
        return seen


def blocks_in(memory: Bytes, count: int) -> list[Bytes]:
    """Blocks that do not follow each other, some over the ends of pages."""
    step = BLOCK_BYTES + 48
    return [memory[8 + number * step :][:BLOCK_BYTES] for number in range(count)]


@pytest.mark.parametrize("registered", [0, 3 * PAGE, 16 * PAGE], ids=["none", "some", "all"])
def test_blocks_are_copied_over_the_ends_of_pieces_and_of_what_is_registered(
    cupy: Any,
    gpu: Gpu,
    kernels: PageKernels,
    memory: HostMemory,
    shared: tuple[Bytes, Bytes],
    registered: int,
) -> None:
    writable, readable = shared
    writable[:] = np.random.default_rng(1).integers(0, 256, writable.size, np.uint8)
    memory.alias(readable, writable)
    memory.register(writable, 0, registered)
    copied, page_ids = Copied(cupy, gpu, kernels, memory), [3, 1, 7, 0, 2, 6, 4]
    stored = blocks_in(readable, 7)

    copied.scatter(stored, page_ids)

    check_copies("h2d")
    for block, page in zip(stored, page_ids, strict=True):
        in_page = np.concatenate([cupy.asnumpy(each[page]).ravel() for each in (copied.keys, copied.values)])
        assert np.array_equal(in_page.view(np.uint8), block)
    if simulation() is not None:
        simulation().reset()
    expected = [block.copy() for block in stored]
    writable[:] = 0
    assert copied.gather(blocks_in(writable, 7), page_ids) == list(range(7))
    check_copies("d2h")
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(stored, expected, strict=True))
    memory.forget(writable)


def check_copies(direction: str) -> None:
    """None was of pageable memory. Those of the test itself, after this, are not counted."""
    if simulation() is not None:
        assert simulation().copies()[direction]["pageable"] == (0, 0)
        assert simulation().findings() == []
        simulation().reset()


@pytest.mark.sim
def test_memory_is_unregistered_once_the_copies_that_use_it_are_done(
    cupy: Any, gpu: Gpu, kernels: PageKernels, memory: HostMemory, shared: tuple[Bytes, Bytes]
) -> None:
    import cudasim

    writable, _ = shared
    memory.register(writable, 0, 16 * PAGE)
    copied, blocks = Copied(cupy, gpu, kernels, memory), blocks_in(writable, 2)
    with cudasim.slow(20_000):
        copied.copies.scatter(
            [[(address(block), block.size)] for block in blocks], [TOKENS] * 2, copied.layer, [0, 1], 0, None
        )
        memory.forget(writable)

    assert cudasim.findings() == []


class Lost:
    """Copies of a GPU that has failed."""

    def synchronize(self) -> None:
        raise RuntimeError("the device is lost")


def test_memory_is_unregistered_also_where_the_copies_of_one_gpu_cannot_be_waited_for(
    memory: HostMemory, shared: tuple[Bytes, Bytes]
) -> None:
    writable, _ = shared
    lost = Lost()
    memory.used_by(lost)
    memory.register(writable, 0, 16 * PAGE)
    assert memory.registered_bytes == 16 * PAGE

    memory.forget(writable)
    memory.register(writable, 0, 16 * PAGE)

    assert memory.registered_bytes == 16 * PAGE  # What is registered still cannot be registered again.
    memory.forget(writable)
    del lost


def test_threads_queue_copies_at_one_time_and_what_they_use_is_not_unregistered_meanwhile(
    memory: HostMemory, shared: tuple[Bytes, Bytes]
) -> None:
    writable, _ = shared
    memory.register(writable, 0, 16 * PAGE)
    queueing, may_end = threading.Event(), threading.Event()

    def queue() -> None:
        with memory.held():
            queueing.set()
            assert may_end.wait(WAIT_S)

    other = threading.Thread(target=queue)
    other.start()
    assert queueing.wait(WAIT_S)
    with memory.held():
        assert memory.dma(address(writable), PAGE) == [(address(writable), PAGE)]
    forgetting = threading.Thread(target=memory.forget, args=(writable,))
    forgetting.start()
    forgetting.join(0.05)
    assert forgetting.is_alive()
    may_end.set()
    forgetting.join(WAIT_S)
    other.join(WAIT_S)

    assert not forgetting.is_alive()
    assert memory.registered_bytes == 0
