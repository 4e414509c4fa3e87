"""A store and a plain model of its contents and running operations, and checks that the two agree."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant

from kvservice.blocks import Extent, TierName
from kvservice.store.leases import Client, Lease
from kvservice.store.mover.evictor import Watermarks
from kvservice.store.prefix_match import TAILS_MAX
from kvservice.store.store import StoreLimits
from kvservice.store.transfers.save_request import SaveOutcome
from kvservice.store.transfers.upload import Upload
from kvservice_api.errors import TicketForeign
from kvservice_api.frames import Frame
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard
from tests.stores import CALLER, LAYOUT, StoreFiles, at_once, caller_of, until

T = TypeVar("T")

# Slices of 64 KiB and more start on pages, smaller ones do not.
LARGE = Layout(model_id="large", dtype="float32", layers=2, kv_heads=2, k_head_dim=256, v_head_dim=256, block_tokens=16)


def _chain(layout: Layout, *parts: tuple[int, int]) -> BlockChain:
    """A chain of parts, each (seed, tokens): chains with the same first parts share their first blocks."""
    tokens = np.concatenate([np.random.default_rng(seed).integers(0, 50_000, count) for seed, count in parts])
    return block_chain(layout, tokens, with_partial=True)


CHAINS = (
    (LAYOUT, _chain(LAYOUT, (1, 48), (2, 32))),
    (LAYOUT, _chain(LAYOUT, (1, 48), (3, 37))),  # Differs after three blocks, and ends with a partial block.
    (LAYOUT, _chain(LAYOUT, (4, 70))),
    (LARGE, _chain(LARGE, (5, 48))),
)
# Single partial blocks: six that continue the third block of the first chains, and two short prompts.
TAILS = (
    *((LAYOUT, _chain(LAYOUT, (1, 48), (20 + number, 1 + 2 * number))[3:]) for number in range(6)),
    (LAYOUT, _chain(LAYOUT, (30, 9))),
    (LAYOUT, _chain(LAYOUT, (31, 9))),
)
PARTIAL = {
    chain.keys[-1]: (chain[-1:].parent, chain.token_counts[-1])
    for layout, chain in CHAINS + TAILS
    if chain.token_counts[-1] < layout.block_tokens
}
SHARDS = (Shard(0, 2, 0, 2), Shard(0, 2, 0, 1), Shard(0, 2, 1, 2), Shard(0, 1, 0, 2), Shard(1, 2, 0, 2))

Object = tuple[bytes, Shard]  # Block key and shard.


@cache
def cell(layout: Layout, key: bytes, tokens: int, version: int, layer: int, head: int) -> tuple[bytes, bytes]:
    """Keys and values of one head in one layer of a block."""
    seed = hashlib.sha256(key + bytes([version % 256, version // 256, layer, head])).digest()
    random = np.random.default_rng(np.frombuffer(seed, np.uint64))
    size = layout.groups[0].dtype_bytes * tokens
    return random.bytes(size * layout.k_head_dim), random.bytes(size * layout.v_head_dim)


def image_of(layout: Layout, key: bytes, tokens: int, version: int, shard: Shard) -> bytes:
    """All slices of a block, in the form in which the shard's rank saves them."""
    layers = range(shard.layer_begin, shard.layer_end)
    return b"".join(slice_of(layout, key, tokens, [version] * shard.heads, layer, shard) for layer in layers)


def slice_of(layout: Layout, key: bytes, tokens: int, versions: Sequence[int], layer: int, shard: Shard) -> bytes:
    heads = range(shard.head_begin, shard.head_end)
    cells = [cell(layout, key, tokens, version, layer, head) for version, head in zip(versions, heads, strict=True)]
    return b"".join(k for k, _ in cells) + b"".join(v for _, v in cells)


@dataclass
class OpenSave:
    """A save over several steps."""

    upload: Upload
    client: Client
    layout: Layout
    shard: Shard
    chain: BlockChain
    version: int
    frames: list[Frame]


@dataclass(eq=False)
class HeldLease:
    lease: Lease
    client: Client
    layout: Layout
    shard: Shard
    chain: BlockChain
    ends_at_s: float
    versions: dict[Object, set[int]]  # What the store had of these keys when it granted the lease.
    places: dict[tuple[int, TierName], Extent] = field(default_factory=dict)


@dataclass(eq=False)
class HeldTicket:
    ticket: bytes
    exported: HeldLease
    ends_at_s: float
    adoptions_left: int


@dataclass
class OpenLoad:
    """A load over several steps."""

    held: HeldLease
    blocks: range
    frames: Any
    received: dict[int, bytes]


class StoreBesideModel(RuleBasedStateMachine):
    """The store, the model, and the operations on both. Subclasses add the rules, and set the sizes of the tiers."""

    dram_bytes: ClassVar[int]
    ssd_bytes: ClassVar[int]
    watermarks: ClassVar[Watermarks]
    ample: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="kvservice-test-", dir="/dev/shm"))
        limits = StoreLimits(
            reserve_wait_s=1.0, upload_wait_s=0.02, frame_bytes=7000, leases_per_client_max=64, pin_fraction_max=0.9
        )
        self.files = StoreFiles(
            self.folder, dram_bytes=self.dram_bytes, ssd_bytes=self.ssd_bytes, ssd_files=2,
            watermarks=self.watermarks, limits=limits,
        )  # fmt: skip
        # The model
        # The visible objects, and which of the saved contents each may have.
        self.versions: dict[Object, set[int]] = {}
        self.doubtful: dict[Object, set[int]] = {}  # Objects that a crash may make visible again.
        self.pins: dict[Object, int] = {}  # The ends of pins, by the wall clock.
        self.last_version = 0
        self.evictions_seen = 0
        self.clients: list[Client] = []
        self.saves: list[OpenSave] = []
        self.leases: list[HeldLease] = []
        self.tickets: list[HeldTicket] = []
        self.loads: list[OpenLoad] = []

    async def _open(self) -> None:
        self.opened = self.files.open()
        self.store = self.opened.store
        self.found_at_start = self.visible()  # Before the mover begins to evict.
        await until(lambda: self.opened.published() is not None)
        for layout in (LAYOUT, LARGE):
            await self.store.layouts.open(CALLER, layout)
        self.clients = [self.opened.store.leases.attach(CALLER, f"client {number}") for number in range(2)]
        self.evictions_seen = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run one coroutine on the store's event loop. Fails if it takes longer than two minutes."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def teardown(self) -> None:
        try:
            if hasattr(self, "opened"):
                self.do(self._end_all())
                if sys.exc_info()[0] is None:  # Otherwise it would hide the earlier error.
                    self.settle()
                    self.check()
                self.do(self.opened.close())
        finally:
            self.loop.close()
            self.files.remove()
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _end_all(self) -> None:
        for load in self.loads:
            await load.frames.aclose()
        for save in self.saves:
            await save.upload.__aexit__(None, None, None)
        self.loads, self.saves = [], []

    async def _adopt(self, held: HeldTicket, shard: Shard | None, client: Client, ttl_s: float) -> Lease:
        fingerprint = held.exported.layout.fingerprint
        return (await self.store.tickets.adopt(caller_of(client), held.ticket, fingerprint, shard, ttl_s)).lease

    def new_version(self) -> int:
        self.last_version += 1
        return self.last_version

    def settle(self) -> None:
        """When nothing runs, table, records and space agree."""
        self.do(self.opened.settle())
        self.reconcile()
        self.doubtful.clear()

    def open_again(self) -> None:
        before, self.leases, self.tickets = self.tickets, [], []
        self.do(self._open())
        for held in before:
            with pytest.raises(TicketForeign):
                self.do(self._adopt(held, None, self.client(0), 50))
        found = self.found_at_start
        assert found >= set(self.versions), "a restart lost stored blocks"
        for name in found - set(self.versions):
            self.versions[name] = self.doubtful[name]  # KeyError: it was never saved, or was gone for good.
            self.pins[name] = self.pinned_until_ms(name)  # It returns as it was, pinned or not.
        self.doubtful = {}
        assert self.do(self._scrub()) == 0, "a restart brought back a block with other bytes"

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "opened"):
            return
        self.reconcile()
        for tier in (TierName.DRAM, TierName.SSD):
            space = self.opened.block_lifecycle.tiers[tier]
            extents = [*self.opened.extents(tier).values(), *(self.opened.uploading() if tier == TierName.DRAM else [])]
            assert sum(extent.size_bytes for extent in extents) <= space.used_bytes <= space.capacity_bytes
            for one, following in pairwise(sorted(extents)):
                apart = one.offset_bytes + one.size_bytes <= following.offset_bytes
                assert apart or one.segment != following.segment, "two blocks share bytes"
            arrays = np.array(extents, np.int64).reshape(-1, 3).T
            assert space.holds(*arrays).all()
        for name in self.versions:
            now_ms = self.files.clock.wall_ms()
            until_ms, expected_ms = self.pinned_until_ms(name), self.pins.get(name, 0)
            assert until_ms == expected_ms or max(until_ms, expected_ms) <= now_ms, "a pin is not what it was"
        resident = {name: tiers for name in self.visible() if (tiers := self.opened.residency(*name))}
        assert self.opened.published() == resident, "the directory that clients on this host read has other blocks"
        for held in self.leases:
            for row in held.lease.held_rows.tolist():
                for tier in (TierName.DRAM, TierName.SSD):
                    extent = self.opened.blocks.extent(row, tier)
                    first = held.places.setdefault((row, tier), extent) if extent else held.places.get((row, tier))
                    assert extent == first, "a leased block was moved"

    @invariant()
    def check_tails(self) -> None:
        """A parent's tails are the newest four of its stored partial blocks; other blocks have none."""
        if not hasattr(self, "opened"):
            return
        self.reconcile()
        stored = {key for key, _ in self.versions if key in PARTIAL}
        assert len(self.opened.block_lifecycle.tails) == len({PARTIAL[key][0] for key in stored})
        for shard, parent in product(SHARDS, {parent for parent, _ in PARTIAL.values()}):
            asked = self.store.lookups.lookup(CALLER, LAYOUT.fingerprint, shard, [], 0, parent_key=parent)
            found = [key for key, count in at_once(asked).tails if PARTIAL[key] == (parent, count)]
            usable = {key for key in stored if PARTIAL[key][0] == parent and self.covered(key, shard)}
            assert len(found) == min(len(usable), TAILS_MAX) and usable.issuperset(found)
            times = [self.stored_at_ms(key) for key in found]
            assert times == sorted(times, reverse=True), "an older tail is before a newer one"
            assert all(self.stored_at_ms(key) <= times[-1] for key in usable - set(found)), "a newer tail is left out"

    def stored_at_ms(self, key: bytes) -> int:
        blocks = self.opened.blocks
        return max(int(blocks.stored_at_ms[row]) for row in blocks.shards_of(int(blocks.rows_of_keys([key])[0])))

    def reconcile(self) -> None:
        """The visible blocks are those of the model, except those that the policy evicted."""
        visible = self.visible()
        assert visible <= set(self.versions), "something is visible that was not saved, or is gone"
        lost = set(self.versions) - visible
        counters = self.opened.counters
        evictions = counters.lost_unwritten_blocks + counters.evicted_ssd_blocks
        if self.ample:
            assert not lost
        assert len(lost) <= evictions - self.evictions_seen, "a block is gone that was not evicted"
        self.evictions_seen = evictions
        now_ms = self.files.clock.wall_ms()
        assert not any(self.pins.get(name, 0) > now_ms for name in lost), "a pinned block was evicted"
        self.go(list(lost))

    def visible(self) -> set[Object]:
        blocks = self.opened.blocks
        return {(blocks.key_of(row), blocks.shard_of(row)) for row in blocks.live_rows().tolist()}

    def pinned_until_ms(self, name: Object) -> int:
        row = self.opened.blocks.row_of(*name)
        return int(self.opened.blocks.pinned_until_ms[row])

    def client(self, number: int) -> Client:
        return self.clients[number % len(self.clients)]

    def covered_by_one(self, key: bytes, wanted: Shard) -> bool:
        return any(shard.covers(wanted) for found, shard in self.versions if found == key)

    def covered(self, key: bytes, wanted: Shard) -> bool:
        """Whether every head of every layer is in some stored shard."""
        shards = [shard for found, shard in self.versions if found == key]
        cells = (
            Shard(layer, layer + 1, head, head + 1)
            for layer in range(wanted.layer_begin, wanted.layer_end)
            for head in range(wanted.head_begin, wanted.head_end)
        )
        return all(any(shard.covers(cell) for shard in shards) for cell in cells)

    def tiers_of(self, key: bytes, wanted: Shard) -> set[TierName]:
        """The tiers of the rows that have all of `wanted`."""
        found: set[TierName] = set()
        for name in self.visible():
            if name[0] == key and name[1].covers(wanted):
                found |= self.opened.residency(*name)
        return found

    def being_saved(self, chain: BlockChain, shard: Shard) -> set[bytes]:
        """The chain's blocks that open saves upload, without blocks that were stored when the save began."""
        saves = [save for save in self.saves if save.shard == shard]
        brought = {save.chain.keys[place.position] for save in saves for place in save.upload.places}
        return brought & set(chain.keys)

    def note_save(self, chain: BlockChain, shard: Shard, version: int, outcome: SaveOutcome) -> None:
        assert sorted([*outcome.stored, *outcome.already_stored, *outcome.refused]) == list(range(len(chain)))
        for at in outcome.stored:
            name = (chain.keys[at], shard)
            self.versions[name] = {version}
            self.doubtful.pop(name, None)  # An earlier record was deleted before this one was written.
        for at in outcome.refused:
            name = (chain.keys[at], shard)
            if name not in self.versions and name in self.visible():
                self.versions[name] = {version}  # SSD had no space: the block is only in DRAM.

    def check_load(self, load: OpenLoad) -> None:
        held = load.held
        for layer, received in load.received.items():
            in_model = held.shard.layer_begin + layer
            position = 0
            for block in load.blocks:
                key, tokens = held.chain.keys[block], held.chain.token_counts[block]
                versions = [self.version_sets(held, key, in_model, head) for head in self.heads(held.shard)]
                size = len(slice_of(held.layout, key, tokens, [0] * held.shard.heads, in_model, held.shard))
                piece = received[position : position + size]
                position += size
                k_size = tokens * held.layout.groups[0].dtype_bytes * held.layout.k_head_dim
                v_size = tokens * held.layout.groups[0].dtype_bytes * held.layout.v_head_dim
                for number, head in enumerate(self.heads(held.shard)):
                    k = piece[number * k_size : (number + 1) * k_size]
                    v_start = held.shard.heads * k_size + number * v_size
                    v = piece[v_start : v_start + v_size]
                    allowed = [cell(held.layout, key, tokens, version, in_model, head) for version in versions[number]]
                    assert (k, v) in allowed, "other bytes came back than were saved"
            assert position == len(received)

    def heads(self, shard: Shard) -> range:
        return range(shard.head_begin, shard.head_end)

    def version_sets(self, held: HeldLease, key: bytes, layer: int, head: int) -> set[int]:
        wanted = Shard(layer, layer + 1, head, head + 1)
        return set().union(*(v for (k, shard), v in held.versions.items() if k == key and shard.covers(wanted)))

    async def _save(
        self, client: Client, layout: Layout, chain: BlockChain, shard: Shard, version: int, *, on_ssd: bool = False
    ) -> SaveOutcome:
        named = zip(chain.keys, chain.token_counts, strict=True)
        images = [image_of(layout, key, tokens, version, shard) for key, tokens in named]
        return await self.opened.save(client, chain, images, shard=shard, layout=layout, on_ssd=on_ssd)

    async def _receive(self, load: OpenLoad, frames_max: int | None) -> None:
        count = 0
        async for layer, payload in load.frames:
            load.received[layer] += payload
            count += 1
            if count == frames_max:
                return

    async def _act(self, act: str, chain: BlockChain) -> object:
        if act == "discard":
            return await self._discard(chain)
        if act == "up":
            return await self.store.moves.prefetch(CALLER, chain.keys, within_s=0.0, wait=True)
        await self._evict(chain, TierName(act))
        return None

    async def _scrub(self) -> int:
        return [progress async for progress in self.opened.scrub.run(CALLER, [TierName.DRAM, TierName.SSD], 1 << 50)][
            -1
        ].damaged

    async def _discard(self, chain: BlockChain) -> tuple[int, int]:
        gone = [name for name in self.versions if name[0] in chain.keys]
        self.go(gone)
        answer = await self.store.operators.discard(CALLER, chain.keys)
        self.gone(gone)
        return answer

    async def _evict(self, chain: BlockChain, tier: TierName) -> None:
        """Copies that nothing holds are evicted; a block without a copy is gone."""
        self.reconcile()
        blocks = self.opened.blocks
        rows = [row for first in set(blocks.rows_of_keys(chain.keys).tolist()) for row in blocks.shards_of(first)]
        copies = [row for row in rows if blocks.is_resident(row, tier)]
        free = [row for row in copies if not blocks.leases[row] and not blocks.holds[row]]
        leaving = [row for row in free if not self.pin_keeps((blocks.key_of(row), blocks.shard_of(row)), tier)]
        names = [(blocks.key_of(row), blocks.shard_of(row)) for row in leaving]
        gone = [name for name in names if self.opened.residency(*name) == {tier}]
        self.go(gone)
        outcome = await self.store.moves.evict(CALLER, chain.keys, tier)
        assert (outcome.evicted, outcome.held) == (len(leaving), len(copies) - len(leaving))
        self.gone(gone)

    def pin_keeps(self, name: Object, tier: TierName) -> bool:
        """A pinned block's copy on SSD stays, and so does a copy that is only in DRAM."""
        if self.pins.get(name, 0) <= self.files.clock.wall_ms():
            return False
        return tier == TierName.SSD or TierName.SSD not in self.opened.residency(*name)

    def go(self, names: list[Object]) -> None:
        """They are invisible; until their records are deleted, a crash may make them visible again."""
        for name in names:
            self.pins.pop(name, None)
            self.doubtful.setdefault(name, set()).update(self.versions.pop(name))

    def gone(self, names: list[Object]) -> None:
        for name in names:
            self.doubtful.pop(name, None)
