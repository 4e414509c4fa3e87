"""A daemon, and the KV of one sequence in it: saved from an engine's pages, loaded back in each of the ways."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.client import parts
from benchmarks.gpu.compute import Compute, Hook
from kvservice_adapter.breaker import Breaker, probe_of
from kvservice_adapter.device.base import Device, Stream
from kvservice_adapter.device.cuda_ipc import exported_pages
from kvservice_adapter.engine.page_loads import AnswerWait, PagedLayers, PrefixLoad, Waits, release_on
from kvservice_adapter.engine.page_saves import Gathering, PageSave, PageSaver
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.save import LayerSaver
from kvservice_client import BlockCache, BlockChain, Client, Durability, Layout, Lease, SaveResult, block_chain
from kvservice_client import Clock as RetryClock
from kvservice_client.device_memory import DeviceMemory, PageIds
from kvservice_client.transports.in_place import Verify

TRANSPORTS = ("cuda_ipc", "shm")
WAIT_S = 120.0  # No wait may end by a timeout here.
_STAGED_BYTES = 512 << 20
_PAGE_STAGING_BYTES = 64 << 20
_POLL_S = 0.0002
_REGISTERED_S = 20.0
_first_tokens = itertools.count(1)


class Clock:
    """The time that a part may take. A part ends its rounds early rather than be cut off."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._end_s - time.monotonic())

    def share(self, parts: float) -> Clock:
        return Clock(self.remaining_s / parts)


def rounds(ways: Mapping[str, Callable[[], float]], count: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each way, once per round, in rotated order, after a round that is not counted.

    At least three rounds are made, and no more when the time is over.
    """
    names = list(ways)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count + 1):
        if number > 3 and not clock.remaining_s:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = ways[name]()
            if number:
                found[name].append(seconds)
    return found


def median(values: list[float]) -> float:
    return statistics.median(values)


@contextmanager
def daemon(dram_bytes: int, ssd_bytes: int | None = None) -> Iterator[str]:
    """A new daemon with as much on SSD as in DRAM, or `ssd_bytes`. Yields its address.

    Raises MemoryError where shared memory has no room for it.
    """
    free = os.statvfs("/dev/shm")
    if free.f_bavail * free.f_frsize < dram_bytes:
        raise MemoryError(f"/dev/shm has {free.f_bavail * free.f_frsize} free bytes; {dram_bytes} are needed")
    with (
        tempfile.TemporaryDirectory(prefix="kvservice-gpu-bench-") as store,
        parts.daemon(Path(store), Path("/dev/shm"), dram_bytes, ssd_bytes) as running,
    ):
        yield running.address


def new_chain(layout: Layout, tokens: int) -> BlockChain:
    """Keys that nothing has yet."""
    numbers = np.arange(tokens)
    numbers[0] = next(_first_tokens)
    return block_chain(layout, numbers, with_partial=True)


class Rig:
    """One model's KV, one layout, and one client."""

    def __init__(self, compute: Compute, client: Client, block_tokens: int) -> None:
        shape = compute.shape
        self.compute, self.client = compute, client
        self.memory: DeviceMemory | None = None  # The pages, if the daemon copies to and from them.
        self.layout = Layout(
            f"bench/{shape.name}", compute.dtype, shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim,
            block_tokens=block_tokens,
        )  # fmt: skip
        self.blocks: BlockCache = client.open_layout(self.layout)
        # The loader's thread waits for copies, so these have a stream of their own; so have the ends of leases.
        names = ("bench-load", "bench-copy", "bench-release")
        self.stream, self.copies, self.releases = map(compute.device.stream, names)
        block_bytes = self.layout.bytes_per_token * block_tokens
        self._part_blocks = max(1, _STAGED_BYTES // block_bytes)
        self.saver = LayerSaver(compute.device, self.blocks, staging_bytes=self._part_blocks * block_bytes)
        pages = [compute.pages(layer) for layer in range(shape.layers)]
        keys, values = [each.key_view for each in pages], [each.value_view for each in pages]
        self.layers = PagedLayers(keys, values, [compute.dtype] * shape.layers, [0] * shape.layers)
        self.page_ids = [range(keys[0].shape[0])]

    def export(self) -> bool:
        """Have the daemon open the pages. Returns whether it has."""
        self.memory = opened_by_daemon(self.blocks, self.compute.device, self.layers)
        return self.memory is not None

    def save(self, chain: BlockChain, durability: Durability = Durability.DRAM) -> None:
        """Store the sequence's first tokens from its pages, whole blocks at a time."""
        first_token = 0
        for begin in range(0, len(chain), self._part_blocks):
            part = chain[begin : begin + self._part_blocks]
            job = self.saver.begin(part)
            assert job is not None, "staging was freed before"
            for layer in range(self.layout.layers):
                job.layer(layer, self.layers.pages(layer, self.page_ids, first_token))
            job.commit(durability)
            assert self.saver.flush(WAIT_S)
            first_token += part.token_count
        stats = self.saver.stats
        assert stats.failed == stats.refused_blocks == 0, stats

    def evict(self, chain: BlockChain) -> None:
        """Leave the blocks on SSD only. Waits until nothing uses them in DRAM."""
        end_s = time.monotonic() + WAIT_S
        while self.client.evict(chain.keys, "dram").held:
            assert time.monotonic() < end_s, "blocks are still in use"
            time.sleep(0.01)  # The daemon does not report the end of a block's use.

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
        self.saver.close()
        for stream in (self.stream, self.copies, self.releases):
            stream.close()


def client_of(address: str, device: Device) -> Client:
    client = Client(address, name="gpu bench", timeout_s=WAIT_S, transport="shm")
    if device.arena_observer is not None:
        client.observe_arenas(device.arena_observer)
    return client


def opened_by_daemon(blocks: BlockCache, device: Device, layers: PagedLayers) -> DeviceMemory | None:
    """The pages, which the daemon has opened; None where one of both ends cannot."""
    pages = exported_pages(device, layers.keys, layers.values, layers.groups)
    if pages is None:
        return None
    memory = blocks.device_memory(pages)
    return memory if memory.register() else None


def load_of(
    blocks: BlockCache,
    device: Device,
    copies: Stream,
    chain: BlockChain,
    release: Callable[[Lease], None],
    memory: DeviceMemory | None,
    clock: RetryClock,
) -> PrefixLoad:
    """The load of a whole chain, as vLLM's connector makes it: a lookup, a ticket, and the copies after what the engine
    has computed so far.
    """
    lease = blocks.lookup(chain, timeout_s=WAIT_S)
    assert lease.hit_blocks == len(chain), f"{lease.hit_blocks} of {len(chain)} blocks are stored"
    ticket = lease.export()
    release(lease)
    waits = Waits(AnswerWait(WAIT_S, clock), WAIT_S, WAIT_S)
    verify: Verify = "once" if device.reads_in_place else "always"
    tokens = 0, chain.token_count
    load = PrefixLoad(copies, blocks, ticket, tokens, waits, release, verify=verify, memory=memory)
    load.after(device.computed())
    return load


def wait_until_registered(client: Client, device: Device, transport: str, size_bytes: int) -> None:
    """Wait until that much of the arena is copied from and to directly. That begins with the first copy.

    After a refusal the wait ends all the same: copies are slow then, and the figures show it.
    """

    def registered_bytes() -> int:
        if transport == "cuda_ipc":
            return client.admin.status().cuda.arena_registered_bytes
        return getattr(device.arena_observer, "registered_bytes", size_bytes)

    end_s = time.monotonic() + _REGISTERED_S
    while registered_bytes() < size_bytes and time.monotonic() < end_s:
        time.sleep(0.01)  # Neither the daemon nor the device reports the end of a registration.


@contextmanager
def connected(address: str, compute: Compute, transport: str, block_tokens: int) -> Iterator[Rig | None]:
    """A client of the daemon that uses this transport. None where one of both ends does not have it."""
    with client_of(address, compute.device) as client:
        rig = Rig(compute, client, block_tokens)
        try:
            yield rig if transport == "shm" or rig.export() else None
        finally:
            rig.close()


class PageSaves:
    """Saves out of pages by the daemon or in its shared memory, as vLLM's connector makes them."""

    def __init__(
        self, device: Device, blocks: BlockCache, layers: PagedLayers, client: Client, memory: DeviceMemory | None
    ) -> None:
        self._client = client
        self._results: list[SaveResult] = []
        self._dropped: list[int] = []  # Numbers of blocks.
        self._breaker = Breaker(probe_of(blocks))
        self._saver = PageSaver(
            device,
            blocks,
            layers,
            self._breaker,
            client.clock,
            staging_bytes=_PAGE_STAGING_BYTES,
            on_saved=self._results.append,
            on_dropped=lambda reason, blocks: self._dropped.append(blocks),
            memory=memory,
        )

    def begin(self, chain: BlockChain, page_ids: PageIds) -> Gathering:
        """Begin to copy the chain's blocks out of pages, of which the first has the chain's first token."""
        self._results.clear()
        self._dropped.clear()
        return self._saver.gather([PageSave(chain, 0, page_ids)], WAIT_S)

    def end(self, chain: BlockChain, transport: str) -> int:
        """Wait until it is decided for each block whether it is stored. Returns how many are not.

        Raises AssertionError where blocks came in another way than by this transport.
        """
        end_s = time.monotonic() + WAIT_S
        while (stored := sum(result.stored for result in self._results)) + sum(self._dropped) < len(chain):
            assert time.monotonic() < end_s, f"not all blocks were stored: {self._results}"
            time.sleep(0.001)  # Blocks may be stored and dropped on several threads; no time is measured here.
        ways = set(self._client.stats().saved_bytes)
        assert ways <= {transport}, f"blocks were saved by {ways}, not by {transport} alone"
        return len(chain) - stored

    def close(self) -> None:
        self._saver.close(WAIT_S)
        self._breaker.close()


class Load:
    """The load of a whole chain into the sequence's pages, as an engine's request makes it: lookup, ticket, layers."""

    def __init__(self, rig: Rig, chain: BlockChain, buffer_layers: int) -> None:
        release, clock = release_on(rig.releases), rig.client.clock
        device, stream = rig.compute.device, rig.stream
        self._source = load_of(rig.blocks, device, rig.copies, chain, release, rig.memory, clock)
        self.loader = LayerLoader(
            device,
            stream,
            self._source,
            self._source.pages_of_layer(rig.layers, rig.page_ids),
            layer_count=rig.layout.layers,
            buffer_layers=buffer_layers,
            wait_s=WAIT_S,
        )
        self.loader.start()

    @property
    def transport(self) -> str:
        return self._source.transport

    def wait_for(self, layers: int) -> None:
        """Until that many layers are in the pages."""
        end_s = time.monotonic() + WAIT_S
        while self.loader.report.layers < layers:
            if self.loader.report.error is not None:
                raise self.loader.report.error
            assert time.monotonic() < end_s, "the load does not progress"
            time.sleep(_POLL_S)  # A load reports single layers only to the forward pass that takes them.

    @property
    def before(self) -> Hook:
        """For the forward pass: has a layer's attention wait for its history."""
        return self.loader.wait

    def end(self) -> None:
        """After the forward pass: wait until the lease is free, so that blocks can be evicted."""
        end_s = time.monotonic() + WAIT_S
        while not self.loader.is_done:
            assert time.monotonic() < end_s, "the load does not end"
            time.sleep(_POLL_S)  # Nothing waits for a load's end: the forward pass has its last layer before.
