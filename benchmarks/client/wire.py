"""Ours over the wire: loads, saves, an empty call, a lookup, by the client library as it is shipped."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import BulkUnavailable, DeadlineExceeded, TierFull
from kvservice_api.image import layer_starts
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard
from kvservice_client.block_cache import BlockCache
from kvservice_client.client import Client

T = TypeVar("T")

# Llama-3-8B in bf16 with blocks of 256 tokens: slices of 1 MiB, 32 MiB per block.
LAYOUT = Layout("bench", "bfloat16", layers=32, kv_heads=8, k_head_dim=128, v_head_dim=128)
_SMALL_LAYOUT = Layout("bench-small", "uint8", layers=1, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=1)
_LOOKUP_KEYS = 512


class Wire:
    """Measures against one daemon. `pid` is the daemon's, where it runs on this host: for its CPU time."""

    def __init__(self, client: Client, layout: Layout, *, blocks: int, runs: int, pid: int | None) -> None:
        self._client = client
        self._layout = layout
        self._cache = client.open_layout(layout)
        self._block_count = blocks
        self._runs = runs
        self._pid = pid
        self._size_bytes = blocks * layout.block_tokens * layout.bytes_per_token
        sizes = layer_sizes(layout, blocks)
        random = random_bytes(max(sizes))
        self._layers = [random[:size] for size in sizes]
        self._into = [np.ones(size, np.uint8) for size in sizes]
        self._salt = secrets.token_bytes(16)  # A tenant of its own: no other blocks are changed.
        self._turn = 0

    def load(self) -> dict[str, float]:
        """GB/s into faulted-in memory from DRAM, lookup included, and CPU seconds of both sides per GB."""
        chain = self._save()
        until_written(self._client, self._cache, chain)
        speeds, cpu = [], []
        for _ in range(self._runs):
            _, speed, cpu_s = self._timed(lambda: self._load(chain))
            speeds.append(speed)
            cpu.append(cpu_s)
        self._client.admin.discard(chain)
        return {"gbps": median(speeds), "cpu_s_per_gb": median(cpu)}

    def save(self) -> dict[str, float]:
        """GB/s into DRAM, acknowledged there, and CPU seconds of both sides per GB."""
        speeds, cpu = [], []
        for _ in range(self._runs):
            chain, speed, cpu_s = self._timed(self._save)
            speeds.append(speed)
            cpu.append(cpu_s)
            until_written(self._client, self._cache, chain)
            self._client.admin.discard(chain)
        return {"gbps": median(speeds), "cpu_s_per_gb": median(cpu)}

    def first_layer_us(self, count: int) -> float:
        """Median time from the begin of a load of stored blocks until its first layer is there."""
        chain = self._save()
        until_written(self._client, self._cache, chain)
        times = []
        for _ in range(count):
            with self._cache.lookup(chain, lease_ttl_s=120) as lease:
                load = lease.load(into=self._into, timeout_s=120)
                started = time.perf_counter()
                next(load)
                times.append(time.perf_counter() - started)
                for _ in load:  # To its end, so that the next one finds its connections as after any other load.
                    pass
        self._client.admin.discard(chain)
        return median(times) * 1e6

    def empty_call_us(self, count: int) -> float:
        """Median time of an empty call."""
        return _median_us(self._client.capabilities, count)

    def lookup_us(self, count: int) -> float:
        """Median time of a lookup of 512 stored keys that grants a lease."""
        cache, chain = self._small_blocks()
        leases = []
        found = _median_us(lambda: leases.append(cache.lookup(chain)), count, after=lambda: leases.pop().release())
        self._client.admin.discard(chain)
        return found

    def local_lookup_us_per_key(self, count: int) -> float | None:
        """Median time of a lookup of 512 stored keys in shared memory, by key; None if there is no directory."""
        cache, chain = self._small_blocks()
        deadline = time.monotonic() + 10
        while (hit := cache.lookup_local(chain)) is None and time.monotonic() < deadline:
            time.sleep(0.02)  # The daemon builds its directory after it has begun to serve.
        found = None
        if hit is not None:
            if hit.blocks != len(chain):
                raise TierFull(f"the daemon kept only {hit.blocks} of {len(chain)} blocks: its DRAM is too small")
            found = _median_us(lambda: cache.lookup_local(chain), count) / len(chain)
        self._client.admin.discard(chain)
        return found

    def _small_blocks(self) -> tuple[BlockCache, BlockChain]:
        """As many small stored blocks as a lookup asks for. The caller discards them."""
        cache = self._client.open_layout(_SMALL_LAYOUT)
        chain = block_chain(_SMALL_LAYOUT, np.arange(_LOOKUP_KEYS), salt=self._salt)
        result = cache.save(chain, [np.zeros(_LOOKUP_KEYS * 16, np.uint8)])
        if result.refused:
            raise result.refused[0][1]
        return cache, chain

    def check(self, transport: str) -> None:
        """Raises BulkUnavailable if bytes were moved by another transport."""
        stats = self._client.stats()
        if set(stats.loaded_bytes) | set(stats.saved_bytes) != {transport}:
            raise BulkUnavailable(f"not all of it went by {transport}: {stats.bulk_refused_because}")

    def _save(self) -> BlockChain:
        self._turn += 1
        tokens = np.arange(self._block_count * self._layout.block_tokens) + self._turn
        chain = block_chain(self._layout, tokens, salt=self._salt)
        result = self._cache.save(chain, self._layers, timeout_s=120)
        if result.refused:
            raise result.refused[0][1]
        if result.stored != len(chain):
            raise TierFull(f"only {result.stored} of {len(chain)} blocks were stored")
        return chain

    def _load(self, chain: BlockChain) -> None:
        with self._cache.lookup(chain, lease_ttl_s=120) as lease:
            if lease.hit_blocks != len(chain):
                raise TierFull(f"the daemon kept only {lease.hit_blocks} of {len(chain)} blocks: its DRAM is too small")
            for _ in lease.load(into=self._into, timeout_s=120):
                pass

    def _timed(self, work: Callable[[], T]) -> tuple[T, float, float]:
        """What `work` returns, its GB/s, and its CPU seconds per GB."""
        cpu_before, started = self._cpu_s(), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        gigabytes = self._size_bytes / 1e9
        return result, gigabytes / seconds, (self._cpu_s() - cpu_before) / gigabytes

    def _cpu_s(self) -> float:
        ours = time.process_time()
        if self._pid is None:
            return ours
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return ours + (int(fields[11]) + int(fields[12])) / 100  # utime and stime, in ticks of 10 ms.


def layer_sizes(layout: Layout, blocks: int) -> list[int]:
    """Bytes of each layer of so many full blocks."""
    starts = layer_starts(layout, Shard.whole(layout), [layout.block_tokens] * blocks)
    return [of_layer[-1] for of_layer in starts]


def random_bytes(size_bytes: int) -> NDArray[np.uint8]:
    """At most 1 MiB of them differ: drawing more takes longer than what is measured."""
    return np.resize(np.frombuffer(secrets.token_bytes(min(size_bytes, 1 << 20)), np.uint8), size_bytes)


def until_allocated(client: Client) -> None:
    """Wait until the daemon has all of its DRAM: it allocates it in the background, on a processor that is measured.

    A daemon that lacks memory keeps less than it was given, so this ends after a minute without an error.
    """
    deadline = time.monotonic() + 60
    while (dram := client.admin.status().dram).capacity_bytes < dram.configured_bytes and time.monotonic() < deadline:
        time.sleep(0.05)  # The daemon does not report the end of the allocation.


def until_written(client: Client, cache: BlockCache, chain: BlockChain) -> None:
    """Wait until write-behind is done with these blocks: otherwise it disturbs the next measurement.

    Raises DeadlineExceeded if it is not done in a minute: figures taken beside it would be wrong.
    """
    if not client.admin.status().ssd.capacity_bytes:
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with cache.lookup(chain) as lease:
            if all(run.ssd for run in lease.residency):
                return
        time.sleep(0.02)  # Rarely, so that polling does not disturb it.
    raise DeadlineExceeded("the blocks that were saved are not on SSD after 60 s: is its disk too slow, or refusing?")


def _median_us(work: Callable[[], object], count: int, after: Callable[[], None] | None = None) -> float:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
        if after is not None:
            after()
    return median(times) * 1e6
