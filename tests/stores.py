"""Real stores for tests: LMDB, an arena, SSD files and threads, on a clock that the test moves.

A store can be closed, or killed as by SIGKILL, and opened again on what it left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kvservice.blocks import Extent, TierName
from kvservice.counters import Counters
from kvservice.index.block_index import BlockIndex
from kvservice.policy import Placement
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import DEFAULT_TENANT, Caller
from kvservice.store.directory import ResidencyDirectory
from kvservice.store.leases import Client, Lease, Leases
from kvservice.store.miss_reasons import MissReasons
from kvservice.store.mover.evictor import Evictor, Watermarks
from kvservice.store.mover.learned_counts import LearnedCounts
from kvservice.store.mover.promoter import Promoter
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.operations.drain import Drain
from kvservice.store.operations.explain import Explain
from kvservice.store.operations.requests import Requests
from kvservice.store.operations.scrub import Scrub
from kvservice.store.recovery import recover
from kvservice.store.sessions.sessions import Sessions
from kvservice.store.store import BlockStore, StoreLimits
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice.store.tickets import Tickets
from kvservice.store.transfers.admission import Claims
from kvservice.store.transfers.in_place_uploads import InPlaceUploads
from kvservice.store.transfers.leased_bytes import Part
from kvservice.store.transfers.reads import Reads
from kvservice.store.transfers.save_request import SaveOutcome
from kvservice.store.transfers.upload import Upload, Uploads
from kvservice.store.types import Located, NotInPlace, SaveChain, SaveHeader, Span
from kvservice.tiers.arena import Arena
from kvservice.tiers.base import Tier
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import FileCalls
from kvservice.tiers.ssd import SsdTier
from kvservice_api.bulk import UNIT_BYTES
from kvservice_api.frames import Frame
from kvservice_api.image import block_geometry, checksum
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard
from kvservice_api.residency_directory import HEADER_BYTES, IN_DRAM, ON_SSD, SLOT, DirectoryState, Header
from tests.clock import FakeClock

T = TypeVar("T")

KIB, MIB = 2**10, 2**20

# A whole block of it takes 12 KiB: two slices of 4 KiB and the trailer's page.
LAYOUT = Layout(model_id="test", dtype="float32", layers=2, kv_heads=2, k_head_dim=16, v_head_dim=16, block_tokens=16)
WHOLE = Shard.whole(LAYOUT)

CALLER = Caller("test", DEFAULT_TENANT, b"")


def caller_of(client: Client) -> Caller:
    """The caller of a request that names this client."""
    return replace(CALLER, client=client.client_id)


_boot_epochs = itertools.count(1)

NO_WATERMARKS = Watermarks(0.0, 0.0)  # Nothing is evicted in advance.
LIMITS = StoreLimits(reserve_wait_s=2.0, upload_wait_s=2.0)
PATIENT = StoreLimits(reserve_wait_s=600.0, upload_wait_s=600.0)  # For tests of operations that must not wait.


@dataclass
class StoreFiles:
    """The parts that outlive a process: a store's folder, its arena's folder, and the store's settings."""

    folder: Path
    dram_bytes: int = 1 * MIB
    ssd_bytes: int = 4 * MIB  # 0 means no SSD tier.
    ssd_files: int = 1
    map_bytes: int = 1 * MIB
    watermarks: Watermarks = NO_WATERMARKS
    limits: StoreLimits = LIMITS
    clock: FakeClock = field(default_factory=FakeClock)
    policy: Placement | None = None
    learned: Path | None = None  # The file of what policies have learned.
    calls: FileCalls = field(default_factory=FileCalls)
    history_events: int = 1000
    share: bool = False  # Whether clients may map the arena.
    shared_memory: Path = field(init=False)

    def __post_init__(self) -> None:
        self.shared_memory = Path(tempfile.mkdtemp(prefix="kvservice-test-", dir="/dev/shm"))

    def open(self, *, started: bool = True) -> OpenStore:
        """Open the store, or create it. Needs a running event loop."""
        opened = OpenStore(self)
        if started:
            opened.store.start()
            opened.tasks.start(opened.directory.keep(), "residency directory")
        return opened

    def lose_power(self) -> None:
        """Delete the shared memory, as after a reboot."""
        shutil.rmtree(self.shared_memory)
        self.shared_memory.mkdir()

    def remove(self) -> None:
        shutil.rmtree(self.shared_memory, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class OpenStore:
    """One run of a store, composed as the daemon does it, without gRPC."""

    def __init__(self, files: StoreFiles) -> None:
        """Use `StoreFiles.open`."""
        self.files = files
        self.is_over = False
        self.ssd: SsdTier | None = None

        def make_bytes_durable() -> None:
            if self.ssd is not None:
                self.ssd.sync()

        folder = files.folder
        self.index = BlockIndex.open(
            folder / "index", map_bytes=files.map_bytes, before_commit=make_bytes_durable if files.ssd_bytes else None
        )
        if files.ssd_bytes:
            self.ssd = SsdTier.open(
                [folder / f"ssd-{number}.kv" for number in range(files.ssd_files)],
                store_id=self.index.store_id,
                capacity_bytes=files.ssd_bytes,
                io_threads=2,
                calls=files.calls,
            )
        self.arena = Arena.open(files.shared_memory, self.index.store_id, files.dram_bytes, calls=files.calls)
        self.dram = DramTier(self.arena)
        if files.share:
            self.arena.share()
        self.index.open_volatile(
            self.arena.directory / "index",
            self.arena.arena_id,
            map_bytes=files.map_bytes,
            now_ms=files.clock.wall_ms(),
            why_new=self.arena.why_new,
        )
        tiers: dict[TierName, Tier] = {TierName.DRAM: self.dram}
        if self.ssd:
            tiers[TierName.SSD] = self.ssd
        self.executor = ThreadPoolExecutor(2)
        history = MissReasons(files.clock, files.history_events)
        self.blocks = recover(self.index, tiers, history)
        self.counters = Counters()
        self.store = BlockStore(
            self.blocks,
            self.dram,
            {TierName.SSD: self.ssd} if self.ssd else {},
            self.index,
            files.policy,
            files.clock,
            self.counters,
            self.executor,
            limits=files.limits,
            watermarks=dict.fromkeys(tiers, files.watermarks),
            history=history,
            learned=LearnedCounts(files.learned),
        )

        self.directory = ResidencyDirectory(
            self.blocks,
            self.index.layouts,
            self.arena.directory,
            store_id=self.index.store_id,
            arena_id=self.arena.arena_id,
            boot_epoch=next(_boot_epochs),
            bytes_max=1 * MIB,
        )

    async def close(self) -> None:
        """Close as at SIGTERM. No effect if it is closed already."""
        if not self.is_over:
            await self.store.stop()
            self.directory.close()
            self._close_files()

    async def kill(self) -> None:
        """Stop as by SIGKILL: changes that are not committed yet are lost. The process itself continues."""
        for environment in self.index._environments.values():
            with contextlib.suppress(queue.Empty):
                while True:
                    environment._queue.get_nowait()
        self.index.close()  # The running commit may end.
        logging.disable()  # Interrupted tasks log errors of the index.
        await self.tasks.stop()
        logging.disable(logging.NOTSET)
        self.store._policy.close()
        self._close_files()

    def _close_files(self) -> None:
        self.is_over = True
        self.executor.shutdown()
        self.index.close()
        if self.ssd is not None:
            self.ssd.close()
        self.arena.close()

    # Parts of the store, for tests of these parts. The verbs of clients and operators are used through `store`.

    @property
    def tasks(self) -> Tasks:
        return self.store._tasks

    @property
    def loop_budget(self) -> LoopBudget:
        return self.store._loop_budget

    @property
    def block_lifecycle(self) -> BlockLifecycle:
        return self.store._lifecycle

    @property
    def evictor(self) -> Evictor:
        return self.store._evictor

    @property
    def write_behind(self) -> WriteBehind | None:
        return self.store._write_behind

    @property
    def promoter(self) -> Promoter | None:
        return self.store._promoter

    @property
    def leases(self) -> Leases:
        return self.store.leases

    @property
    def tickets(self) -> Tickets:
        return self.store.tickets

    @property
    def claims(self) -> Claims:
        return self.uploads.claims

    @property
    def uploads(self) -> Uploads:
        return self.store._uploads

    @property
    def in_place_uploads(self) -> InPlaceUploads:
        return self.store._in_place_uploads

    @property
    def reads(self) -> Reads:
        return self.store._reads

    @property
    def scrub(self) -> Scrub:
        return self.store.scrub

    @property
    def sessions(self) -> Sessions:
        return self.store.sessions

    @property
    def requests(self) -> Requests:
        return self.store._requests

    @property
    def explain(self) -> Explain:
        return self.store._explain

    @property
    def drain(self) -> Drain:
        return self.store.drain

    # Operations that many tests use

    async def decided(self) -> None:
        """Wait until the policy has decided about all that has happened, and what it wants is read."""
        policy, promoter = self.store._policy, self.promoter
        assert policy._items is not None and policy._read_ahead is not None and promoter is not None
        read_ahead = policy._read_ahead
        for _ in range(2):  # A look that has begun may lack the last events.
            before = read_ahead.looks
            read_ahead.look_soon()
            await until(lambda before=before: read_ahead.looks > before)  # type: ignore[misc]
            await until(lambda: read_ahead._reading is None and not promoter.pending_bytes)

    def published(self) -> dict[tuple[bytes, Shard], set[TierName]] | None:
        """The contents of the residency directory; None while it is being filled."""
        data = Path(self.directory.path).read_bytes()
        if Header.decode(data).state is not DirectoryState.LIVE:
            return None
        slots = np.frombuffer(data, SLOT, offset=HEADER_BYTES)
        flags = {IN_DRAM: {TierName.DRAM}, ON_SSD: {TierName.SSD}, IN_DRAM | ON_SSD: {TierName.DRAM, TierName.SSD}}
        used = slots[(slots["flags"] & (IN_DRAM | ON_SSD)) != 0]
        found = {(slot["key"].tobytes(), Shard.decode(slot["shard"].tobytes())): flags[slot["flags"]] for slot in used}
        assert len(found) == len(used), "an object has one slot"
        return found

    @contextlib.contextmanager
    def commits_held(self, tier: TierName) -> Iterator[None]:
        """No commit to this tier's index ends before the block is left."""
        with self.index._environments[tier]._env_lock:
            yield

    def extents(self, tier: TierName) -> dict[int, Extent]:
        """Row -> its extent in `tier`, with discarded rows that are still held."""
        blocks = self.blocks
        rows = np.flatnonzero(blocks.resident(tier)).tolist()
        return {row: extent for row in rows if (extent := blocks.extent(row, tier)) is not None}

    def records(self, tier: TierName) -> dict[bytes, Extent]:
        """Object key -> its extent in `tier` according to the index."""
        found = self.index.load(tier)
        assert not found.damaged
        places = found.records[["segment", "offset_bytes", "size_bytes"]].tolist()
        return {key: Extent(*place) for key, place in zip(found.keys, places, strict=True)}

    def residency(self, key: bytes, shard: Shard = WHOLE) -> set[TierName]:
        blocks = self.blocks
        row = blocks.row_of(key, shard)
        return {tier for tier in (TierName.DRAM, TierName.SSD) if row >= 0 and blocks.is_resident(row, tier)}

    async def save(
        self,
        client: Client,
        chain: BlockChain,
        images: Sequence[bytes],
        *,
        shard: Shard = WHOLE,
        layout: Layout = LAYOUT,
        on_ssd: bool = False,
        caller: Caller | None = None,
    ) -> SaveOutcome:
        """`images`: per block all its slices, concatenated."""
        async with self.begin_save(client, chain, shard=shard, layout=layout, caller=caller) as upload:
            for frame in frames_of(layout, shard, chain, images):
                upload.write(frame)
            return await upload.commit(checksums_of(shard, images), on_ssd=on_ssd)

    def begin_save(
        self,
        client: Client,
        chain: BlockChain,
        *,
        shard: Shard = WHOLE,
        layout: Layout = LAYOUT,
        caller: Caller | None = None,
    ) -> Upload:
        """`caller` is by default the one that names the client."""
        caller = caller_of(client) if caller is None else caller
        return self.store.saves.save(caller, header_of(chain, shard=shard, layout=layout))

    def narrowed(self, client: Client, lease: Lease, shard: Shard) -> Awaitable[Lease]:
        """The lease, narrowed to this shard as for a load of the shard."""
        return self.store.loads._narrowed(caller_of(client), lease.lease_id, shard)

    def locate(
        self, client: Client, lease: Lease, *, verify: bool = False
    ) -> AsyncGenerator[Located | NotInPlace | int, None]:
        """Of all blocks of the lease."""
        return self.store.loads.locate(caller_of(client), lease.lease_id, None, Span(), verify=verify)

    def lookup(
        self, client: Client, keys: Sequence[bytes], *, shard: Shard = WHOLE, layout: Layout = LAYOUT, ttl_s: float = 30
    ) -> Lease | None:
        return at_once(self.store.lookups.lookup(caller_of(client), layout.fingerprint, shard, keys, ttl_s)).lease

    def hits(self, keys: Sequence[bytes], *, shard: Shard = WHOLE, layout: Layout = LAYOUT) -> int:
        return at_once(self.store.lookups.lookup(CALLER, layout.fingerprint, shard, keys, 0)).blocks

    async def load(self, lease: Lease, blocks: range | None = None, layers: range | None = None) -> list[bytes]:
        """The requested layers of the requested blocks: per layer all blocks' bytes, concatenated."""
        blocks = range(len(lease.rows)) if blocks is None else blocks
        layers = range(lease.shard.layers) if layers is None else layers
        found = dict.fromkeys(layers, b"")
        async with contextlib.aclosing(self.frames(lease, blocks, layers)) as frames:
            async for layer, payload in frames:
                found[layer] += payload
        return list(found.values())

    def frames(self, lease: Lease, blocks: range, layers: range) -> AsyncGenerator[tuple[int, bytes], None]:
        def encode(part: Part) -> tuple[int, bytes]:
            return part.layer, b"".join(part.runs)

        return self.reads.run(CALLER, lease, blocks, layers, encode)

    async def settle(self) -> None:
        """Wait until everything that runs in the background has ended."""
        if self.write_behind is not None:
            await self.write_behind.idle()
        await until(lambda: not self.unsettled())

    def unsettled(self) -> str:
        """How space, table and records disagree; empty if they agree."""
        tiers = [TierName.DRAM, TierName.SSD] if self.ssd else [TierName.DRAM]
        blocks = self.blocks
        for tier in tiers:
            extents = self.extents(tier)
            in_use = list(extents.values())
            if tier == TierName.DRAM:
                in_use += self.uploading()
            used = self.block_lifecycle.tiers[tier].used_bytes
            if used != sum(extent.size_bytes for extent in in_use):
                return f"{tier}: {used} bytes are in use, and the table knows of {sum(e.size_bytes for e in in_use)}"
            if self.index.load(tier).damaged:
                return f"{tier}: records that were dropped are still being removed"
            recorded = self.records(tier)
            known = {blocks.object_key_of(row): extent for row, extent in extents.items() if blocks.live[row]}
            if recorded != known:
                return f"{tier}: records and table differ in {recorded.items() ^ known.items()}"
        return ""

    def uploading(self) -> list[Extent]:
        """The extents of open saves."""
        return [place.extent for upload in self.uploads.open for place in upload.places]


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that does not wait, such as a lookup of few keys."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")


def header_of(*chains: BlockChain, shard: Shard | None = WHOLE, layout: Layout = LAYOUT) -> SaveHeader:
    """The header of a save of these chains."""
    saved = [SaveChain(chain.parent, chain.keys, chain.token_counts[-1]) for chain in chains]
    return SaveHeader(layout.fingerprint, shard, saved)


def some_chain(blocks: int, *, seed: int = 0, tail_tokens: int = 0, layout: Layout = LAYOUT) -> BlockChain:
    """A chain of so many full blocks, and of a last one with `tail_tokens`."""
    tokens = np.random.default_rng(seed).integers(0, 50_000, blocks * layout.block_tokens + tail_tokens)
    return block_chain(layout, tokens, with_partial=True)


def some_images(chain: BlockChain, *, seed: int = 0, shard: Shard = WHOLE, layout: Layout = LAYOUT) -> list[bytes]:
    """Random contents for each block of a chain."""
    random = np.random.default_rng(seed)
    return [random.bytes(block_geometry(layout, shard, count).payload_bytes) for count in chain.token_counts]


def layer_of(image: bytes, layer: int, *, shard: Shard = WHOLE) -> bytes:
    size = len(image) // shard.layers
    return image[layer * size : (layer + 1) * size]


def layers_of(images: Iterable[bytes], *, shard: Shard = WHOLE) -> list[bytes]:
    """The bytes that a load of these blocks returns: layer by layer, all blocks of each."""
    images = list(images)
    return [b"".join(layer_of(image, layer, shard=shard) for image in images) for layer in range(shard.layers)]


class Sent:
    """A `PartSender` that sends all parts at once."""

    def __init__(self, unit_bytes: int = UNIT_BYTES) -> None:
        self.unit_bytes = unit_bytes
        self.parts: list[Part] = []
        self.sent_bytes = 0

    def when_joined(self, call: Callable[[], None] | None) -> None:
        if call is not None:
            call()

    def put(self, parts: Sequence[Part], *, is_last: bool) -> None:
        self.parts += parts
        self.sent_bytes += sum(len(run) for part in parts for run in part.runs)

    async def until_sent(self, size_bytes: int) -> None:
        assert self.sent_bytes >= size_bytes

    async def until_taken(self) -> None:
        pass

    async def stop(self) -> None:
        pass


def frames_of(
    layout: Layout, shard: Shard, chain: BlockChain, images: Sequence[bytes], *, frame_bytes: int = 5000
) -> list[Frame]:
    """A save's frames in order. Because of the odd size they begin and end inside blocks."""
    frames = []
    starts = np.cumsum([0, *(block_geometry(layout, shard, count).slice_bytes(0) for count in chain.token_counts)])
    for layer, data in enumerate(layers_of(images, shard=shard)):
        for start in range(0, len(data), frame_bytes):
            block = int(np.searchsorted(starts, start, "right")) - 1
            payload = memoryview(data)[start : start + frame_bytes]
            frames.append(Frame(layer, block, start - int(starts[block]), payload))
    return frames


def checksums_of(shard: Shard, images: Sequence[bytes]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    slices = [layer_of(image, layer, shard=shard) for image in images for layer in range(shard.layers)]
    return np.array([checksum(data) for data in slices], np.uint64)


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Run the event loop until `condition` holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        await asyncio.sleep(0.001)


async def on_ssd(opened: OpenStore, client: Client, chain: BlockChain, **more: Any) -> list[bytes]:
    """Saves blocks that are only on SSD. Returns the images."""
    layout = more.get("layout", LAYOUT)
    images = some_images(chain, shard=Shard.whole(layout), layout=layout)
    outcome = await opened.save(client, chain, images, shard=Shard.whole(layout), on_ssd=True, **more)
    assert not outcome.refused
    await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)
    return images
