"""Bytes per second between the daemon's DRAM tier and a GPU's pages, both ways, beside plain copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.report import Goal, Part
from benchmarks.gpu.rig import (
    TRANSPORTS,
    WAIT_S,
    Clock,
    PageSaves,
    client_of,
    daemon,
    load_of,
    median,
    new_chain,
    opened_by_daemon,
    rounds,
    wait_until_registered,
)
from kvservice_adapter.device.arrays import view_of
from kvservice_adapter.device.cuda import CudaDevice
from kvservice_adapter.engine.page_loads import PagedLayers, release_on
from kvservice_api.cuda.runtime import Gpu
from kvservice_client import BlockChain, Client, Layout

TITLE = "Bytes per second"
ABOUT = (
    "GB/s between host memory and the GPU; medians of up to 7 rounds in rotated order. `pinned`: one cudaMemcpyAsync "
    "of the same size from pinned memory; `split`: one per stored slice; `pageable`: one, from other memory. `shm` "
    "and `cuda_ipc`: loads from the daemon's DRAM tier into shuffled pages, and saves back, as vLLM's connector makes "
    "them. A load's time begins when the blocks' places are asked for, a save's when space is; both end with the last "
    "copy."
)
ROUNDS = 7
GOAL = 0.9  # Of a plain pinned copy.
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
COLUMNS = (
    *("", "KV", "Page tokens", "pinned", "split", "pageable"),
    *TRANSPORTS,
    *(f"{each} / pinned" for each in TRANSPORTS),
)


class Geometry(NamedTuple):
    """The KV of one sequence."""

    name: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    tokens: int
    block_tokens: int
    page_tokens: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * 2 * self.tokens

    @property
    def slice_bytes(self) -> int:
        """Of one layer of a block, as it is stored."""
        return self.size_bytes // self.layers // self.tokens * self.block_tokens


GEOMETRIES = (
    Geometry("MHA, 40 heads of 128, fp16", "float16", 10, 40, 128, 8192, 256, (16, 32, 64)),
    Geometry("GQA, 8 heads of 128, fp16", "float16", 32, 8, 128, 16384, 256, (16, 32, 64)),
    Geometry("MHA, 40 heads of 128, bf16", "bfloat16", 10, 40, 128, 8192, 256, (16,)),
    Geometry("GQA, 8 heads of 128, bf16", "bfloat16", 32, 8, 128, 16384, 256, (16,)),
)
REHEARSED = (
    Geometry("MHA, 4 heads of 16, fp16", "float16", 2, 4, 16, 128, 32, (16,)),
    Geometry("GQA, 2 heads of 16, bf16", "bfloat16", 3, 2, 16, 256, 64, (32,)),
)


def measure(part: Part, clock: Clock, *, rehearsal: bool) -> None:
    """Fill the part."""
    geometries = REHEARSED if rehearsal else GEOMETRIES
    import cupy

    device = CudaDevice(Gpu(0), lambda: cupy.cuda.get_current_stream().ptr)
    for number, geometry in enumerate(geometries):
        share = clock.share(len(geometries) - number)
        # Without SSD the daemon writes nothing else meanwhile. Of the saves one at a time is in DRAM.
        with part.attempt(geometry.name), daemon(geometry.size_bytes * 7 // 2 + (64 << 20), 0) as address:
            _measure(part, geometry, device, address, share, 1 if rehearsal else ROUNDS)
        cupy.get_default_memory_pool().free_all_blocks()


def _measure(part: Part, geometry: Geometry, device: CudaDevice, address: str, clock: Clock, count: int) -> None:
    plain, kv = PlainCopies(device, geometry), _numbers(geometry.size_bytes // 2)
    for number, page_tokens in enumerate(geometry.page_tokens):
        share = clock.share(len(geometry.page_tokens) - number)
        with part.attempt(f"{geometry.name}, pages of {page_tokens}"), ExitStack() as stack:
            loads, saves = (plain.ways(kind, with_pageable=not number) for kind in (_TO_DEVICE, _TO_HOST))
            for transport in TRANSPORTS:
                with part.attempt(f"{geometry.name}, pages of {page_tokens}, {transport}"):
                    ours = open_ours(address, device, geometry, kv, page_tokens, transport)
                    if ours is not None:
                        stack.callback(ours.close)
                        loads[transport], saves[transport] = ours.load, ours.save
            for direction, ways in (("to the GPU", loads), ("from the GPU", saves)):
                found = rounds(ways, count, share.share(2))
                _report(part, geometry, page_tokens, direction, found)


def _report(part: Part, geometry: Geometry, page_tokens: int, direction: str, found: dict[str, list[float]]) -> None:
    rates = {name: geometry.size_bytes / median(times) / 1e9 for name, times in found.items()}
    ratios = {name: rates[name] / rates["pinned"] for name in TRANSPORTS if name in rates}
    figures = [f"{rates[name]:.1f}" if name in rates else "" for name in ("pinned", "split", "pageable", *TRANSPORTS)]
    figures += [f"{ratios[name]:.2f}" if name in ratios else "" for name in TRANSPORTS]
    part.rows.append((direction, geometry.name, str(page_tokens), *figures))
    for name, ratio in ratios.items():
        part.goals.append(
            Goal(f"{geometry.name}, pages of {page_tokens}, {direction}, {name} / pinned", ratio, least=GOAL)
        )


def _numbers(count: int) -> NDArray[np.uint16]:
    """Elements that repeat after a prime number of them, so that no two slices are the same."""
    return np.resize(np.arange(65521, dtype=np.uint16), count)


class PlainCopies:
    """Copies of the same size as a geometry's KV, without us."""

    def __init__(self, device: CudaDevice, geometry: Geometry) -> None:
        self._size_bytes, self._split_bytes = geometry.size_bytes, geometry.slice_bytes
        self._memory = device.gpu.device_memory(self._size_bytes)
        self._stream = device.gpu.stream()
        self._pinned = device.gpu.pinned(self._size_bytes)
        self._pageable = np.ones(self._size_bytes, np.uint8)  # Ones: written, so that all pages exist.

    def ways(self, kind: int, *, with_pageable: bool) -> dict[str, Callable[[], float]]:
        ways = {
            "pinned": lambda: self._copy(kind, self._pinned, self._size_bytes),
            "split": lambda: self._copy(kind, self._pinned, self._split_bytes),
        }
        if with_pageable:  # It is slow, and does not depend on pages.
            ways["pageable"] = lambda: self._copy(kind, self._pageable, self._size_bytes)
        return ways

    def _copy(self, kind: int, host: Any, split_bytes: int) -> float:
        from cupy.cuda import runtime

        begin_s = time.perf_counter()
        for offset in range(0, self._size_bytes, split_bytes):
            ends = self._memory.address + offset, host.ctypes.data + offset
            target, source = ends if kind == _TO_DEVICE else reversed(ends)
            runtime.memcpyAsync(target, source, split_bytes, kind, self._stream.ptr)
        self._stream.synchronize()
        return time.perf_counter() - begin_s


def open_ours(
    address: str, device: CudaDevice, geometry: Geometry, kv: NDArray[np.uint16], page_tokens: int, transport: str
) -> OurCopies | None:
    """None where one of both ends does not have this transport."""
    ours = OurCopies(client_of(address, device), device, geometry, kv, page_tokens, transport)
    try:
        if ours.begin():
            return ours
    except BaseException:
        ours.close()
        raise
    ours.close()
    return None


class OurCopies:
    """One sequence in shuffled pages as vLLM has them, and its loads and saves as vLLM's connector makes them."""

    def __init__(
        self,
        client: Client,
        device: CudaDevice,
        geometry: Geometry,
        kv: NDArray[np.uint16],
        page_tokens: int,
        transport: str,
    ) -> None:
        import cupy

        self._cupy, self._client, self._device, self.transport = cupy, client, device, transport
        self._layout = Layout(
            f"bench/{geometry.name}", geometry.dtype, geometry.layers, geometry.kv_heads, geometry.head_dim,
            geometry.head_dim, block_tokens=geometry.block_tokens,
        )  # fmt: skip
        self._blocks = client.open_layout(self._layout)
        self._tokens = geometry.tokens
        count = geometry.tokens // page_tokens
        size = (geometry.layers, 2, count, page_tokens, geometry.kv_heads, geometry.head_dim)
        self._numbers, self._kv = kv, cupy.asarray(kv.reshape(size))
        self._page_ids = [np.random.default_rng(0).permutation(count).tolist()]
        keys, values = ([view_of(layer[each].transpose(0, 2, 1, 3)) for layer in self._kv] for each in (0, 1))
        self._layers = PagedLayers(keys, values, [geometry.dtype] * geometry.layers, [0] * geometry.layers)
        self._copying, self._ending = device.stream("bench-copy"), device.stream("bench-release")
        self._memory = opened_by_daemon(self._blocks, device, self._layers) if transport == "cuda_ipc" else None
        self._saves = PageSaves(device, self._blocks, self._layers, client, self._memory)
        self._chain = self._last = new_chain(self._layout, geometry.tokens)

    def begin(self) -> bool:
        """Store the sequence, and check that it is loaded back. False where the daemon does not open the pages."""
        if self.transport == "cuda_ipc" and self._memory is None:
            return False
        self._save(self._chain)
        self._check()
        return True

    def close(self) -> None:
        self._saves.close()
        if self._memory is not None:
            self._memory.close()
        self._copying.close()
        self._ending.close()
        self._client.close()

    def load(self) -> float:
        """Seconds from the call for the blocks' places until the last layer is in the pages."""
        release, clock = release_on(self._ending), self._client.clock
        source = load_of(self._blocks, self._device, self._copying, self._chain, release, self._memory, clock)
        begin_s = time.perf_counter()
        for _ in source.begin(source.pages_of_layer(self._layers, self._page_ids)):
            pass
        taken_s = time.perf_counter() - begin_s
        assert source.transport == self.transport, f"the load came by {source.transport}"
        return taken_s

    def save(self) -> float:
        """Seconds from the call that reserves space until the pages may be written again."""
        if self._last is not self._chain:
            self._client.evict(self._last.keys, "dram")
        self._last = new_chain(self._layout, self._tokens)
        return self._save(self._last)

    def _save(self, chain: BlockChain) -> float:
        begin_s = time.perf_counter()
        gathering = self._saves.begin(chain, self._page_ids)
        assert gathering.wait(WAIT_S)
        taken_s = time.perf_counter() - begin_s
        assert not self._saves.end(chain, self.transport), "not all blocks were stored"
        return taken_s

    def _check(self) -> None:
        """What was saved is loaded back, to the bit."""
        wait_until_registered(self._client, self._device, self.transport, 2 * self._kv.nbytes)
        self._kv.fill(0)
        self._cupy.cuda.get_current_stream().synchronize()
        self.load()
        assert np.array_equal(self._kv.get().ravel(), self._numbers), "the loaded KV is not what was saved"
