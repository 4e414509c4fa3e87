"""Ours through shared memory: loads, saves and views, by the client library as it is shipped.

The limit is a plain copy of the same size between two faulted-in arrays.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import numpy as np

from benchmarks.client.wire import layer_sizes, random_bytes, until_written
from kvservice_api.errors import NotShared, TierFull
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout
from kvservice_client.client import Client

T = TypeVar("T")

VIEW_BYTES = 1 << 30


class Memory:
    """Measures against one daemon on this host. Raises NotShared if its arena cannot be used here."""

    def __init__(self, client: Client, layout: Layout, *, blocks: int, runs: int) -> None:
        self._client = client
        self._layout = layout
        self._cache = client.open_layout(layout)
        self._block_count = blocks
        self._runs = runs
        self._block_bytes = layout.block_tokens * layout.bytes_per_token
        self._size_bytes = blocks * self._block_bytes
        self._layers = [random_bytes(size) for size in layer_sizes(layout, blocks)]  # No two share memory.
        self._into = [np.ones(len(layer), np.uint8) for layer in self._layers]
        self._salt = secrets.token_bytes(16)  # A tenant of its own: no other blocks are changed.
        self._turn = 0

    def load(self) -> dict[str, float]:
        """GB/s into faulted-in memory, verified, lookup included."""
        chain = self._saved()
        speeds = [self._timed(lambda: self._load(chain))[1] for _ in range(self._runs + 1)]
        self._client.admin.discard(chain)
        return {"gbps": median(speeds[1:])}  # The first one faulted the mapping in.

    def save(self) -> dict[str, float]:
        """GB/s into the arena, acknowledged at DRAM."""
        speeds = []
        for _ in range(self._runs + 1):
            chain, speed = self._timed(lambda: self._save(self._block_count))
            speeds.append(speed)
            until_written(self._client, self._cache, chain)
            self._client.admin.discard(chain)
        return {"gbps": median(speeds[1:])}

    def view_ms(self) -> float:
        """Lease and view of 1 GiB of blocks verified since the daemon's start, until each slice is at hand. Median."""
        count = max(1, VIEW_BYTES // self._block_bytes)
        chain = self._chain(count)
        for first in range(0, count, self._block_count):
            part = chain[first : first + self._block_count]
            sizes = layer_sizes(self._layout, len(part))
            layers = [layer[:size] for layer, size in zip(self._layers, sizes, strict=True)]
            result = self._cache.save(part, layers, timeout_s=120)
            if result.refused:
                raise result.refused[0][1]
        until_written(self._client, self._cache, chain)
        self._view(chain)  # Verifies them.
        times = [self._view(chain) for _ in range(2 * self._runs + 1)]
        self._client.admin.discard(chain)
        return median(times) * 1e3

    def hit_us(self, count: int) -> tuple[float, float]:
        """Lookup until the last byte of one warm block, and a plain copy of as many bytes. Medians, in microseconds."""
        sizes = layer_sizes(self._layout, 1)
        chain = self._chain(1)
        result = self._cache.save(chain, [layer[:size] for layer, size in zip(self._layers, sizes, strict=True)])
        if result.refused:
            raise result.refused[0][1]
        until_written(self._client, self._cache, chain)
        into = [layer[:size] for layer, size in zip(self._into, sizes, strict=True)]
        hits, copies = [], []
        for _ in range(count):
            started = time.perf_counter()
            for _ in self._cache.lookup(chain).load(into=into, release=True):
                pass
            hits.append(time.perf_counter() - started)
            started = time.perf_counter()
            for layer, target in zip(self._layers, into, strict=True):
                np.copyto(target, layer[: len(target)])
            copies.append(time.perf_counter() - started)
        self._client.admin.discard(chain)
        return median(hits) * 1e6, median(copies) * 1e6

    def _view(self, chain: BlockChain) -> float:
        started = time.perf_counter()
        with self._cache.lookup(chain, lease_ttl_s=120) as lease:
            if lease.hit_blocks != len(chain):
                raise TierFull(f"the daemon kept only {lease.hit_blocks} of {len(chain)} blocks: its DRAM is too small")
            with lease.view(timeout_s=120) as view:
                slices = [view.slices(layer) for layer in range(self._layout.layers)]
                seconds = time.perf_counter() - started
                assert len(slices[-1]) == len(chain)
        return seconds

    def check(self) -> None:
        """Raises NotShared if bytes were moved by another transport."""
        stats = self._client.stats()
        if set(stats.loaded_bytes) | set(stats.saved_bytes) != {"shm"}:
            raise NotShared(f"not all of it went through shared memory: {stats.shm_refused_because}")

    def _chain(self, blocks: int) -> BlockChain:
        self._turn += 1
        return block_chain(self._layout, np.arange(blocks * self._layout.block_tokens) + self._turn, salt=self._salt)

    def _save(self, blocks: int) -> BlockChain:
        chain = self._chain(blocks)
        result = self._cache.save(chain, self._layers, timeout_s=120)
        if result.refused:
            raise result.refused[0][1]
        return chain

    def _saved(self) -> BlockChain:
        chain = self._save(self._block_count)
        until_written(self._client, self._cache, chain)
        return chain

    def _load(self, chain: BlockChain) -> None:
        with self._cache.lookup(chain, lease_ttl_s=120) as lease:
            if lease.hit_blocks != len(chain):
                raise TierFull(f"the daemon kept only {lease.hit_blocks} of {len(chain)} blocks: its DRAM is too small")
            for _ in lease.load(into=self._into, timeout_s=120):
                pass

    def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """What `work` returns, and its GB/s."""
        started = time.perf_counter()
        result = work()
        return result, self._size_bytes / (time.perf_counter() - started) / 1e9
