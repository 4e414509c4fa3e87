"""A cold load: the time to its first layer, beside the time of reading that layer's bytes alone.

``python -m benchmarks.client.cold DIRECTORY`` starts a daemon of its own. Blocks are saved, written to SSD and evicted
from DRAM. Then, in turns that change their order, the benchmark reads one slice of each block from the SSD file with
plain ``preadv`` and O_DIRECT, with as many threads as the daemon has for it, and loads the lease. The clock of a load
runs from `Lease.load` on.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from benchmarks import leftovers
from benchmarks.client.parts import daemon
from benchmarks.client.wire import LAYOUT, layer_sizes, random_bytes, until_written
from benchmarks.report import check_folder, check_least
from kvservice.config_sections import SsdSettings
from kvservice_api.errors import TierFull
from kvservice_api.image import PAGE_BYTES, block_geometry
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard
from kvservice_client import Client, Lease

_BYTES = 512 << 20
_EVICTED_S = 10.0


class Cold:
    """Loads of blocks that only the SSD has. `ssd_file` is the daemon's, whose begin these blocks fill."""

    def __init__(self, client: Client, layout: Layout, ssd_file: Path, *, blocks: int) -> None:
        self._client = client
        self._layout = layout
        self._ssd_file = ssd_file
        self._cache = client.open_layout(layout)
        sizes = layer_sizes(layout, blocks)
        self._into = [np.ones(size, np.uint8) for size in sizes]
        self._size_bytes = sum(sizes)
        tokens = np.arange(blocks * layout.block_tokens)
        self._chain: BlockChain = block_chain(layout, tokens, salt=secrets.token_bytes(16))
        result = self._cache.save(self._chain, [random_bytes(size) for size in sizes], timeout_s=120)
        if result.refused:
            raise result.refused[0][1]
        until_written(client, self._cache, self._chain)

    def measure(self, runs: int) -> dict[str, float]:
        """Medians of all turns; the ratio is the median of each turn's own."""
        first_ms, alone_ms, ratios, speeds = [], [], [], []
        geometry = block_geometry(self._layout, Shard.whole(self._layout), self._layout.block_tokens)
        with _LayerAlone(self._ssd_file, len(self._chain), geometry.image_bytes, geometry.slice_bytes(0)) as alone:
            for turn in range(runs + 1):
                before_s = alone.read_s() if turn % 2 else 0.0
                first_s, all_s = self._load()
                alone_s = before_s or alone.read_s()
                if turn:  # The first one faults in the memory of both sides.
                    first_ms.append(first_s * 1e3)
                    alone_ms.append(alone_s * 1e3)
                    ratios.append(first_s / alone_s)
                    speeds.append(self._size_bytes / all_s / 1e9)
        self._client.admin.discard(self._chain)
        return {
            "first_layer_ms": median(first_ms),
            "alone_ms": median(alone_ms),
            "ratio": median(ratios),
            "gbps": median(speeds),
        }

    def _load(self) -> tuple[float, float]:
        """Seconds to the first layer and to the last."""
        with self._cold_lease() as lease:
            started = time.perf_counter()
            layers = lease.load(into=self._into, timeout_s=120)
            next(layers)
            first_s = time.perf_counter() - started
            for _ in layers:
                pass
            return first_s, time.perf_counter() - started

    def _cold_lease(self) -> Lease:
        """Of all blocks, none of which is in DRAM. Until the load before has ended in the daemon, some cannot leave."""
        end_s = time.monotonic() + _EVICTED_S
        while True:
            self._client.evict(self._chain, tier="dram")
            lease = self._cache.lookup(self._chain, lease_ttl_s=120)
            if lease.hit_blocks == len(self._chain) and not any(run.dram for run in lease.residency):
                return lease
            lease.release()
            if time.monotonic() > end_s:
                raise TierFull("the blocks are not only on SSD: its tier is too small, or write-behind too slow")
            time.sleep(0.005)


class _LayerAlone:
    """Plain reads of one slice of each block, by as many threads as the daemon has."""

    def __init__(self, path: Path, blocks: int, image_bytes: int, slice_bytes: int) -> None:
        self._threads = SsdSettings().io_threads
        self._offsets = [PAGE_BYTES + block * image_bytes for block in range(blocks)]
        self._slice_bytes = -(-slice_bytes // PAGE_BYTES) * PAGE_BYTES
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._memory = mmap.mmap(-1, self._slice_bytes * blocks, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # As the daemon's: into scattered small pages a drive reads slower.
        self._memory.write(bytes(len(self._memory)))  # Faulted in, as the daemon's.
        self._pool = ThreadPoolExecutor(self._threads)

    def __enter__(self) -> _LayerAlone:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        os.close(self._fd)

    def read_s(self) -> float:
        started = time.perf_counter()
        with memoryview(self._memory) as memory:
            list(self._pool.map(lambda thread: self._read(memory, thread), range(self._threads)))
        return time.perf_counter() - started

    def _read(self, memory: memoryview, thread: int) -> None:
        for block in range(thread, len(self._offsets), self._threads):
            with memory[block * self._slice_bytes : (block + 1) * self._slice_bytes] as into:
                os.preadv(self._fd, [into], self._offsets[block])


def measure(
    directory: Path,
    *,
    transport: Literal["shm", "bulk", "grpc"] = "shm",
    block_tokens: int = LAYOUT.block_tokens,
    runs: int = 9,
    dram_path: Path = Path("/dev/shm"),
) -> dict[str, float]:
    """As the module says, with blocks of so many tokens of Llama-3-8B."""
    group = LAYOUT.groups[0]
    layout = Layout(
        "cold",
        LAYOUT.dtype,
        layers=LAYOUT.layers,
        kv_heads=group.kv_heads,
        k_head_dim=group.k_head_dim,
        v_head_dim=group.v_head_dim,
        block_tokens=block_tokens,
    )
    blocks = _BYTES // (layout.block_tokens * layout.bytes_per_token)
    with (
        daemon(directory, dram_path, _BYTES + (256 << 20)) as running,
        Client(running.address, name="cold", transport=transport) as client,
    ):
        return Cold(client, layout, directory / "store" / "ssd-000.kv", blocks=blocks).measure(runs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client.cold", description=__doc__)
    parser.add_argument("directory", type=Path, help="a folder on the disk to measure; what is written is removed")
    parser.add_argument("--block-tokens", type=int, default=LAYOUT.block_tokens)
    parser.add_argument("--transport", default="shm", choices=("shm", "grpc", "bulk"))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--dram-path", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args(arguments)
    check_folder(parser, "DIRECTORY", options.directory)
    check_folder(parser, "--dram-path", options.dram_path)
    check_least(parser, "--runs", options.runs)
    check_least(parser, "--block-tokens", options.block_tokens)
    leftovers.begin(options.directory, options.dram_path)
    with leftovers.own_folder(options.directory) as folder:
        found = measure(
            folder,
            transport=options.transport,
            block_tokens=options.block_tokens,
            runs=options.runs,
            dram_path=options.dram_path,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
