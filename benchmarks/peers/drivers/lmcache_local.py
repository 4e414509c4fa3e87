"""LMCache inside the engine's process, without a daemon: its CPU memory and its local disk.

Options: `tier` is "cpu" or "disk"; `view` reads one byte of each page in place instead of copying the blocks out. A put
copies the blocks into LMCache's memory, as its connectors do. On disk, a put ends when the files were written and
synced, and a get is of files that the page cache has dropped.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, main

_GIB = 1 << 30
_PAGE = 4096
# More than a run writes. LMCache counts blocks that were removed, as by `drop`, until they would have been evicted, and
# stores nothing once those alone reach its limit.
_DISK_GIB = 1 << 20


class Local(System):
    def start(self, servers: Servers) -> None:
        self.folder = servers.folder

    def client(self, memory: Memory, number: int) -> Client:
        if self.options["tier"] == "cpu":
            return CpuClient(2 * len(memory.source), is_view=self.options.get("view", False))
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return DiskClient(2 * len(memory.source), folder, use_odirect=self.options.get("direct", False))


def cpu_backend(size_bytes: int, **settings: Any) -> LocalCPUBackend:
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=256, local_cpu=True, max_local_cpu_size=size_bytes / _GIB, **settings
    )
    return LocalCPUBackend(config, metadata(), dst_device="cpu")


def metadata() -> LMCacheMetadata:
    return LMCacheMetadata("peers", 1, 1, 0, 0, torch.uint8, (32, 2, 256, 1, 64))


def keys_of(names: Sequence[str]) -> list[CacheEngineKey]:
    return [CacheEngineKey("peers", 1, 0, hash(name) & (2**63 - 1), torch.uint8) for name in names]


def filled(backend: LocalCPUBackend, block: Bytes) -> Any:
    """A memory object with these bytes. The caller counts its reference down."""
    held = backend.allocate(torch.Size([1, 1, 1, len(block)]), torch.uint8, MemoryFormat.KV_2LTD)
    if held is None:
        raise MemoryError("LMCache has no memory left for a block")
    held.tensor.view(-1).copy_(torch.from_numpy(block))
    return held


class CpuClient(Client):
    def __init__(self, size_bytes: int, *, is_view: bool) -> None:
        self._backend = cpu_backend(size_bytes)
        self._is_view = is_view
        self._held: list[Any] = []

    def names(self, turn: str, block_bytes: int, blocks: int) -> Any:
        return keys_of(super().names(turn, block_bytes, blocks))

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        for key, block in zip(names, blocks, strict=True):
            held = filled(self._backend, block)
            self._backend.submit_put_task(key, held)
            held.ref_count_down()

    def get(self, names: Any, blocks: Sequence[Bytes]) -> Sequence[Any] | None:
        self._held = [self._backend.get_blocking(key) for key in names]
        if self._is_view:
            for held in self._held:
                held.tensor.view(-1).numpy()[::_PAGE].sum()
            return [held.byte_array for held in self._held]
        for held, block in zip(self._held, blocks, strict=True):
            torch.from_numpy(block).copy_(held.tensor.view(-1))
        return None

    def drop(self, names: Any) -> None:
        for key, held in zip(names, self._held, strict=True):
            held.ref_count_down()
            self._backend.remove(key)
        self._held = []


class DiskClient(Client):
    def __init__(self, size_bytes: int, folder: Path, *, use_odirect: bool) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        settings = {
            "local_disk": str(folder),
            "max_local_disk_size": _DISK_GIB,
            "extra_config": {"use_odirect": use_odirect},
        }
        self._memory = cpu_backend(size_bytes, **settings)
        self._memory.use_hot = False
        self._disk = LocalDiskBackend(self._memory.config, self._loop, self._memory, "cpu", None, metadata())
        self._held: list[Any] = []

    def names(self, turn: str, block_bytes: int, blocks: int) -> Any:
        return keys_of(super().names(turn, block_bytes, blocks))

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        written = threading.Semaphore(0)
        for key, block in zip(names, blocks, strict=True):
            held = filled(self._memory, block)
            self._disk.submit_put_task(key, held, on_complete_callback=lambda _: written.release())
            held.ref_count_down()
        for _ in names:
            if not written.acquire(timeout=60):
                raise TimeoutError("LMCache did not write a block within 60 s")
        for key in names:
            self._with_file(key, os.fdatasync)

    def settle(self, names: Any) -> None:
        for key in names:
            self._with_file(key, lambda file: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED))

    def get(self, names: Any, blocks: Sequence[Bytes]) -> Sequence[Any]:
        self._held = self._disk.batched_get_blocking(names)
        return [np.frombuffer(held.byte_array, np.uint8) for held in self._held]

    def drop(self, names: Any) -> None:
        for key, held in zip(names, self._held, strict=True):
            held.ref_count_down()
            self._disk.remove(key)
        self._held = []

    def _with_file(self, key: CacheEngineKey, call: Any) -> None:
        file = os.open(self._disk.dict[key].path, os.O_RDONLY)
        try:
            call(file)
        finally:
            os.close(file)


if __name__ == "__main__":
    main(Local)
