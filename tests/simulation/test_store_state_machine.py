"""A real store beside a plain model of it: whatever the order of events, both tell the same.

The store is the daemon's own, with LMDB, a shared-memory arena, SSD files and threads. Two sizes:
with ample space nothing may ever be missing; under pressure only what the policy evicted.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvservice.blocks import Extent, TierName
from kvservice.store.block_store import StoreLimits
from kvservice.store.ingest import Ingest, SaveOutcome
from kvservice.store.leases import Client, Lease
from kvservice.store.room import Watermarks
from kvservice_api.errors import BlockNotFound, LeaseExpired, Overloaded, PinsFull, TierFull, UploadCorrupted
from kvservice_api.frames import Frame
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard
from tests.stores import KIB, LAYOUT, MIB, StoreFiles, checksums_of, frames_of, until

T = TypeVar("T")

# Slices of 64 KiB and more start on pages, smaller ones do not.
LARGE = Layout(model_id="large", dtype="float32", layers=2, kv_heads=2, k_head_dim=256, v_head_dim=256, block_tokens=16)


def _chain(layout: Layout, *parts: tuple[int, int]) -> BlockChain:
    """A chain of parts, each (seed, tokens): chains with the same first parts share their first blocks."""
    tokens = np.concatenate([np.random.default_rng(seed).integers(0, 50_000, count) for seed, count in parts])
    return block_chain(layout, tokens, with_partial=True)


CHAINS = (
    (LAYOUT, _chain(LAYOUT, (1, 48), (2, 32))),
    (LAYOUT, _chain(LAYOUT, (1, 48), (3, 37))),  # Goes another way after three blocks, and ends in part of one.
    (LAYOUT, _chain(LAYOUT, (4, 70))),
    (LARGE, _chain(LARGE, (5, 48))),
)
SHARDS = (Shard(0, 2, 0, 2), Shard(0, 2, 0, 1), Shard(0, 2, 1, 2), Shard(0, 1, 0, 2), Shard(1, 2, 0, 2))

Object = tuple[bytes, Shard]  # Block key and shard.


@cache
def cell(layout: Layout, key: bytes, tokens: int, version: int, layer: int, head: int) -> tuple[bytes, bytes]:
    """Keys and values of one head in one layer of a block."""
    seed = hashlib.sha256(key + bytes([version % 256, version // 256, layer, head])).digest()
    random = np.random.default_rng(np.frombuffer(seed, np.uint64))
    size = layout.dtype_bytes * tokens
    return random.bytes(size * layout.k_head_dim), random.bytes(size * layout.v_head_dim)


def image_of(layout: Layout, key: bytes, tokens: int, version: int, shard: Shard) -> bytes:
    """All slices of a block, as the shard's owner would save them."""
    layers = range(shard.layer_begin, shard.layer_end)
    return b"".join(slice_of(layout, key, tokens, [version] * shard.heads, layer, shard) for layer in layers)


def slice_of(layout: Layout, key: bytes, tokens: int, versions: Sequence[int], layer: int, shard: Shard) -> bytes:
    heads = range(shard.head_begin, shard.head_end)
    cells = [cell(layout, key, tokens, version, layer, head) for version, head in zip(versions, heads, strict=True)]
    return b"".join(k for k, _ in cells) + b"".join(v for _, v in cells)


@dataclass
class OpenSave:
    """A save that goes on over several steps."""

    ingest: Ingest
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
    versions: dict[Object, set[int]]  # What the store held of these keys at the time of the grant.
    places: dict[tuple[int, TierName], Extent] = field(default_factory=dict)


@dataclass
class OpenLoad:
    """A load that goes on over several steps."""

    held: HeldLease
    blocks: range
    frames: Any
    received: dict[int, bytes]


class StoreMachine(RuleBasedStateMachine):
    """The rules. Subclasses say how much space there is."""

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
        self.versions: dict[Object, set[int]] = {}  # What is visible, and which of the saved contents it may have.
        self.doubtful: dict[Object, set[int]] = {}  # What a crash may bring back, or not.
        self.pins: dict[Object, int] = {}  # When they end, by the wall clock.
        self.last_version = 0
        self.evictions_seen = 0
        self.clients: list[Client] = []
        self.saves: list[OpenSave] = []
        self.leases: list[HeldLease] = []
        self.loads: list[OpenLoad] = []

    @initialize(stored=st.lists(st.tuples(st.integers(0, len(CHAINS) - 1), st.booleans()), max_size=3))
    def first_start(self, stored: list[tuple[int, bool]]) -> None:
        self.do(self._open())
        for chain, on_ssd in stored:
            self.save(chain=chain, first=0, count=6, shard=SHARDS[0], on_ssd=on_ssd, client=0)

    async def _open(self) -> None:
        self.opened = self.files.open()
        self.store = self.opened.store
        self.found_at_start = self.visible()  # Before the mover begins to evict.
        await until(lambda: self.opened.published() is not None)
        for layout in (LAYOUT, LARGE):
            await self.store.open_layout(layout)
        self.clients = [self.store.leases.attach(f"client {number}") for number in range(2)]
        self.evictions_seen = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """One step of the store's event loop's life. None may take long, whatever is going on."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 15))

    def teardown(self) -> None:
        try:
            if hasattr(self, "opened"):
                self.do(self._end_all())
                if sys.exc_info()[0] is None:  # Else it would hide what went wrong before.
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
            await save.ingest.__aexit__(None, None, None)
        self.loads, self.saves = [], []

    # What rules choose from. Nothing here, and no precondition, depends on how far background work has
    # come: hypothesis wants to run a failed example again.

    chains = st.integers(0, len(CHAINS) - 1)
    counts = st.integers(1, 6)
    firsts = st.integers(0, 4)
    shards = st.sampled_from(SHARDS[:1] * 4 + SHARDS)
    tiers = st.sampled_from(list(TierName))
    numbers = st.integers(0, 7)

    def part(self, chain: int, first: int, count: int) -> tuple[Layout, BlockChain]:
        layout, whole = CHAINS[chain]
        first = min(first, len(whole) - 1)
        return layout, whole[first : first + count]

    def new_version(self) -> int:
        self.last_version += 1
        return self.last_version

    # Saving

    @rule(chain=chains, first=firsts, count=counts, shard=shards, on_ssd=st.booleans(), client=numbers)
    def save(self, chain: int, first: int, count: int, shard: Shard, on_ssd: bool, client: int) -> None:
        layout, part = self.part(chain, first, count)
        busy = self.being_saved(part, shard)
        stored_before = {key for key in part.keys if self.covered_by_one(key, shard)}
        version = self.new_version()
        outcome = self.do(self._save(self.client(client), layout, part, shard, version, on_ssd=on_ssd))
        self.note_save(part, shard, version, outcome)
        if self.ample:
            assert {part.keys[at] for at in outcome.already_stored} == stored_before
            assert {part.keys[at] for at in outcome.refused} == busy - stored_before
            if on_ssd:
                assert all(TierName.SSD in self.tiers_of(key, shard) for key in set(part.keys) - busy)
        for error in outcome.refused.values():
            assert isinstance(error, Overloaded | TierFull | BlockNotFound)

    @rule(chain=chains, count=counts, shard=shards)
    def two_clients_save_the_same(self, chain: int, count: int, shard: Shard) -> None:
        layout, part = self.part(chain, 0, count)
        first, second = self.new_version(), self.new_version()

        async def both() -> tuple[SaveOutcome, SaveOutcome]:
            return await asyncio.gather(
                self._save(self.client(0), layout, part, shard, first),
                self._save(self.client(1), layout, part, shard, second),
            )

        mine, others = self.do(both())
        assert not set(mine.stored) & set(others.stored), "a block was stored twice"
        self.note_save(part, shard, first, mine)
        self.note_save(part, shard, second, others)

    @rule(chain=chains, first=firsts, count=counts, shard=shards)
    def save_with_a_wrong_checksum(self, chain: int, first: int, count: int, shard: Shard) -> None:
        layout, part = self.part(chain, first, count)
        version = self.new_version()
        images = [image_of(layout, *named, version, shard) for named in zip(part.keys, part.token_counts, strict=True)]
        checksums = checksums_of(shard, images)
        checksums[-1] ^= np.uint64(1)  # Of the last block's last layer.

        async def work() -> SaveOutcome:
            async with self.opened.begin_save(self.client(0), part, shard=shard, layout=layout) as ingest:
                for frame in frames_of(layout, shard, part, images):
                    ingest.write(frame)
                return await ingest.commit(checksums, on_ssd=False)

        outcome = self.do(work())
        self.note_save(part, shard, version, outcome)
        last = len(part) - 1
        if last not in outcome.already_stored and self.ample and not self.being_saved(part, shard):
            assert isinstance(outcome.refused[last], UploadCorrupted)

    @rule(chain=chains, first=firsts, count=counts, shard=shards, client=numbers)
    def begin_a_save(self, chain: int, first: int, count: int, shard: Shard, client: int) -> None:
        layout, part = self.part(chain, first, count)
        version = self.new_version()
        images = [image_of(layout, *named, version, shard) for named in zip(part.keys, part.token_counts, strict=True)]
        ingest = self.opened.begin_save(self.client(client), part, shard=shard, layout=layout)
        self.do(ingest.__aenter__())
        frames = frames_of(layout, shard, part, images)
        for frame in frames[: len(frames) // 2]:
            ingest.write(frame)
        frames = frames[len(frames) // 2 :]
        self.saves.append(OpenSave(ingest, self.client(client), layout, shard, part, version, frames))

    @rule(number=numbers, commit=st.booleans())
    def end_a_save(self, number: int, commit: bool) -> None:
        if not self.saves:
            return
        save = self.saves.pop(number % len(self.saves))
        named = zip(save.chain.keys, save.chain.token_counts, strict=True)
        images = [image_of(save.layout, *one, save.version, save.shard) for one in named]

        async def work() -> SaveOutcome:
            for frame in save.frames:
                save.ingest.write(frame)
            outcome = await save.ingest.commit(checksums_of(save.shard, images), on_ssd=False)
            await save.ingest.__aexit__(None, None, None)
            return outcome

        if commit:
            self.note_save(save.chain, save.shard, save.version, self.do(work()))
        else:
            self.do(save.ingest.__aexit__(None, None, None))

    # Finding and loading

    @rule(chain=chains, first=firsts, count=counts, shard=shards, ttl_s=st.sampled_from([0, 5, 50, 50]), client=numbers)
    def lookup(self, chain: int, first: int, count: int, shard: Shard, ttl_s: int, client: int) -> None:
        layout, part = self.part(chain, first, count)
        hit = self.store.lookup(self.client(client).client_id, layout.fingerprint, shard, part.keys, ttl_s)
        self.reconcile()
        expected = next((at for at, key in enumerate(part.keys) if not self.covered(key, shard)), len(part))
        assert hit.blocks == expected == sum(count for count, *_ in hit.runs)
        assert (hit.lease is not None) == (ttl_s > 0 and hit.blocks > 0)
        if hit.lease is not None:
            versions = {name: set(found) for name, found in self.versions.items() if name[0] in part.keys}
            ends_at_s = self.files.clock.monotonic_s() + ttl_s
            chain_held = part[: hit.blocks]
            self.leases.append(
                HeldLease(hit.lease, self.client(client), layout, shard, chain_held, ends_at_s, versions)
            )

    @rule(number=numbers, first=firsts, last_layer=st.booleans(), steps=st.sampled_from(["all", "one", "some"]))
    def load(self, number: int, first: int, last_layer: bool, steps: str) -> None:
        if not self.leases:
            return
        held = self.leases[number % len(self.leases)]
        blocks = range(min(first, len(held.chain) - 1), len(held.chain))
        layers = range(held.shard.layers - 1 if last_layer else 0, held.shard.layers)
        received: dict[int, bytes] = dict.fromkeys(layers, b"")
        load = OpenLoad(held, blocks, self.opened.frames(held.lease, blocks, layers), received)
        self.do(self._receive(load, None if steps == "all" else 1))
        if steps == "all":
            self.check_load(load)
        elif steps == "one":
            self.do(load.frames.aclose())
        else:
            self.loads.append(load)

    @rule(number=numbers)
    def finish_a_load(self, number: int) -> None:
        if not self.loads:
            return
        load = self.loads.pop(number % len(self.loads))
        self.do(self._receive(load, None))
        self.check_load(load)

    # Leases

    @rule(number=numbers, ttl_s=st.sampled_from([0, 5, 50]))
    def renew_or_release(self, number: int, ttl_s: int) -> None:
        if not self.leases:
            return
        held = self.leases[number % len(self.leases)]
        if ttl_s:
            self.store.leases.renew(held.client.client_id, held.lease.lease_id, ttl_s)
            held.ends_at_s = self.files.clock.monotonic_s() + ttl_s
        else:
            self.store.leases.release(held.client.client_id, held.lease.lease_id)
            self.leases.remove(held)

    @rule(seconds=st.sampled_from([1, 10, 100]))
    def time_passes(self, seconds: int) -> None:
        self.files.clock.advance(seconds=seconds)
        now_s = self.files.clock.monotonic_s()
        for held in self.leases:
            if held.ends_at_s <= now_s:
                with pytest.raises(LeaseExpired):
                    self.store.leases.get(held.client.client_id, held.lease.lease_id)
        self.leases = [held for held in self.leases if held.ends_at_s > now_s]
        self.store.leases.expire()
        assert self.store.leases.count == len(self.leases)

    @rule(number=numbers)
    def a_client_goes(self, number: int) -> None:
        gone = self.client(number)
        self.store.leases.detach(gone)
        self.clients = [client for client in self.clients if client is not gone]
        self.clients.append(self.store.leases.attach("another"))
        self.leases = [held for held in self.leases if held.client is not gone]
        over = [save for save in self.saves if save.client is gone]
        self.saves = [save for save in self.saves if save.client is not gone]
        assert len(self.opened.uploads()) == sum(len(save.ingest._uploads) for save in self.saves)
        for save in over:
            self.do(save.ingest.__aexit__(None, None, None))

    # Moving and dropping

    @rule(chain=chains, first=firsts, count=counts, tier=tiers)
    def evict(self, chain: int, first: int, count: int, tier: TierName) -> None:
        _, part = self.part(chain, first, count)
        self.do(self._evict(part, tier))

    @rule(chain=chains, first=firsts, count=counts, whole_layout=st.sampled_from([False, False, True]))
    def discard(self, chain: int, first: int, count: int, whole_layout: bool) -> None:
        layout, part = self.part(chain, first, count)
        keys = {key for other, whole in CHAINS if other is layout for key in whole.keys}

        async def work() -> None:
            self.reconcile()  # In the same turn of the event loop: else the policy evicts between the two.
            gone = [name for name in self.versions if name[0] in (keys if whole_layout else part.keys)]
            if not whole_layout:
                missing = len(set(part.keys) - {key for key, _ in gone})
                assert await self._discard(part) == (len(gone), missing)
                return
            discarding = self.store.discard_layout(layout.fingerprint)
            self.go(gone)
            assert await discarding == len(gone)
            self.gone(gone)
            for name in gone:
                self.pins.pop(name, None)

        self.do(work())

    @rule(chain=chains, first=firsts, count=counts, wait=st.booleans())
    def prefetch(self, chain: int, first: int, count: int, wait: bool) -> None:
        _, part = self.part(chain, first, count)
        outcome = self.do(self.store.prefetch(part.keys, within_s=1.0, wait=wait))
        self.reconcile()
        if self.ample and wait:
            objects = [name for name in self.versions if name[0] in part.keys]
            assert outcome.failed == 0 and outcome.in_dram + outcome.promoted == len(objects)
            assert all(TierName.DRAM in self.opened.residency(*name) for name in objects)

    @rule(chain=chains, first=firsts, count=counts, ttl_s=st.sampled_from([0, 5, 50, 500]))
    def pin_or_unpin(self, chain: int, first: int, count: int, ttl_s: int) -> None:
        _, part = self.part(chain, first, count)
        until_ms = 0
        try:
            if ttl_s:
                until_ms = self.do(self.store.pins.pin(part.keys, ttl_s * 1000)).until_ms
            else:
                self.do(self.store.pins.unpin(part.keys))
        except PinsFull:
            assert not self.ample
            return
        self.reconcile()
        self.pins |= {name: until_ms for name in self.versions if name[0] in part.keys}

    @rule(what=st.sampled_from(["settle", "recency", "scrub"]))
    def upkeep(self, what: str) -> None:
        if what == "settle":
            self.settle()
        elif what == "recency":
            self.do(self.store.residency.flush_recency())
        else:
            assert self.do(self._scrub()) == 0

    # At one time

    @rule(chain=chains, count=counts, shard=shards, other=chains, act=st.sampled_from(["discard", "dram", "ssd", "up"]))
    def save_while_others_act(self, chain: int, count: int, shard: Shard, other: int, act: str) -> None:
        layout, part = self.part(chain, 0, count)
        _, other_part = self.part(other, 0, 6)
        version = self.new_version()
        before = {name: set(found) for name, found in self.versions.items()}

        async def both() -> SaveOutcome:
            outcome, _ = await asyncio.gather(
                self._save(self.client(0), layout, part, shard, version), self._act(act, other_part)
            )
            return outcome

        outcome = self.do(both())
        self.note_save(part, shard, version, outcome)
        if act != "up":  # What both touched may have come before or after.
            for key in set(part.keys) & set(other_part.keys):
                for name in [(key, each) for each in SHARDS]:
                    found = before.get(name, set()) | self.versions.get(name, set())
                    self.versions.pop(name, None)
                    if found and self.opened.residency(*name):
                        self.versions[name] = found
                    elif found:  # The policy may have evicted it meanwhile, and its record may still be there.
                        self.doubtful.setdefault(name, set()).update(found)

    # Life and death

    def settle(self) -> None:
        """Once nothing runs, table, records and space say the same."""
        self.do(self.opened.settle())
        self.reconcile()
        self.doubtful.clear()

    @rule(how=st.sampled_from(["crash", "power cut", "clean"]))
    def restart(self, how: str) -> None:
        if how == "clean":
            self.do(self._end_all())
            self.settle()
            self.do(self.opened.close())
        else:
            self.do(self._crash(how == "power cut"))
        self.open_again()

    @rule(
        chain=chains,
        count=counts,
        shard=shards,
        on_ssd=st.booleans(),
        other=chains,
        act=st.sampled_from(["discard", "dram", "ssd", "up"]),
        turns=st.integers(0, 40),
        power_cut=st.booleans(),
    )
    def crash_meanwhile(
        self, chain: int, count: int, shard: Shard, on_ssd: bool, other: int, act: str, turns: int, power_cut: bool
    ) -> None:
        """Die some turns of the event loop after a save and something else began."""
        layout, part = self.part(chain, 0, count)
        _, other_part = self.part(other, 0, 6)
        self.reconcile()
        version = self.new_version()
        saved = {(key, shard): {version, *self.versions.get((key, shard), ())} for key in part.keys}

        async def work() -> None:
            running = [
                asyncio.ensure_future(self._save(self.client(0), layout, part, shard, version, on_ssd=on_ssd)),
                asyncio.ensure_future(self._act(act, other_part)),
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in running:
                if task.done():
                    task.result()
                task.cancel()
            for name, found in saved.items():
                self.doubtful.setdefault(name, set()).update(found)
            await self._crash(power_cut)
            await asyncio.gather(*running, return_exceptions=True)

        self.do(work())
        self.open_again()

    async def _crash(self, power_cut: bool) -> None:
        """What is visible in the last moment survives; on SSD, where the power is cut."""
        survivors = self.visible()
        if power_cut:
            survivors = {name for name in survivors if TierName.SSD in self.opened.residency(*name)}
        self.go(list(set(self.versions) - survivors))
        for name in survivors - set(self.versions):  # Saved just now.
            self.versions[name] = set(self.doubtful[name])
        await self.opened.kill()
        await self._end_all()
        if power_cut:
            self.files.lose_power()

    def open_again(self) -> None:
        self.leases = []
        self.do(self._open())
        found = self.found_at_start
        assert found >= set(self.versions), "a restart lost what was there"
        for name in found - set(self.versions):
            self.versions[name] = self.doubtful[name]  # KeyError: it was never saved, or was gone for good.
            self.pins[name] = self.pinned_until_ms(name)  # It comes back as it was, pinned or not.
        self.doubtful = {}
        assert self.do(self._scrub()) == 0, "a restart brought back a block with other bytes"

    # Invariants

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "opened"):
            return
        self.reconcile()
        for tier in TierName:
            space = self.store.residency.tiers[tier]
            extents = [*self.opened.extents(tier).values(), *(self.opened.uploads() if tier is TierName.DRAM else [])]
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
        assert self.opened.published() == resident, "clients on this host are told something else"
        for held in self.leases:
            for row in held.lease.held_rows.tolist():
                for tier in TierName:
                    extent = self.store.blocks.extent(row, tier)
                    first = held.places.setdefault((row, tier), extent) if extent else held.places.get((row, tier))
                    assert extent == first, "a leased block was moved"

    def reconcile(self) -> None:
        """What is visible is what the model says, but for what the policy evicted."""
        visible = self.visible()
        assert visible <= set(self.versions), "something is visible that was not saved, or is gone"
        lost = set(self.versions) - visible
        counters = self.store.counters
        evictions = counters.lost_unwritten_blocks + counters.evicted_ssd_blocks
        if self.ample:
            assert not lost
        assert len(lost) <= evictions - self.evictions_seen, "a block is gone that nobody evicted"
        self.evictions_seen = evictions
        now_ms = self.files.clock.wall_ms()
        assert not any(self.pins.get(name, 0) > now_ms for name in lost), "a pinned block was evicted"
        self.go(list(lost))

    # What rules are made of

    def visible(self) -> set[Object]:
        blocks = self.store.blocks
        return {(blocks.key_of(row), blocks.shard_of(row)) for row in blocks.live_rows().tolist()}

    def pinned_until_ms(self, name: Object) -> int:
        row = self.store.blocks.row_of(*name)
        return int(self.store.blocks.pinned_until_ms[row])

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
        """Where the rows lie that have all of `wanted`."""
        found: set[TierName] = set()
        for name in self.visible():
            if name[0] == key and name[1].covers(wanted):
                found |= self.opened.residency(*name)
        return found

    def being_saved(self, chain: BlockChain, shard: Shard) -> set[bytes]:
        """Of the chain, what open saves bring. Blocks that were stored when a save began are not among them."""
        saves = [save for save in self.saves if save.shard == shard]
        brought = {save.chain.keys[at] for save in saves for at in save.ingest._uploads}
        return brought & set(chain.keys)

    def note_save(self, chain: BlockChain, shard: Shard, version: int, outcome: SaveOutcome) -> None:
        assert sorted([*outcome.stored, *outcome.already_stored, *outcome.refused]) == list(range(len(chain)))
        for at in outcome.stored:
            name = (chain.keys[at], shard)
            self.versions[name] = {version}
            self.doubtful.pop(name, None)  # The record of an earlier one went before this one came.
        for at in outcome.refused:
            name = (chain.keys[at], shard)
            if name not in self.versions and name in self.visible():
                self.versions[name] = {version}  # SSD was asked for and had no space: it is in DRAM all the same.

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
                k_size = tokens * held.layout.dtype_bytes * held.layout.k_head_dim
                v_size = tokens * held.layout.dtype_bytes * held.layout.v_head_dim
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
            return await self.store.prefetch(chain.keys, within_s=0.0, wait=True)
        await self._evict(chain, TierName(act))
        return None

    async def _scrub(self) -> int:
        return [progress async for progress in self.store.scrub.run(list(TierName), 1 << 50)][-1].damaged

    async def _discard(self, chain: BlockChain) -> tuple[int, int]:
        gone = [name for name in self.versions if name[0] in chain.keys]
        self.go(gone)
        answer = await self.store.discard(chain.keys)
        self.gone(gone)
        return answer

    async def _evict(self, chain: BlockChain, tier: TierName) -> None:
        """Copies that nothing holds leave; a block whose last copy leaves is gone."""
        self.reconcile()
        blocks = self.store.blocks
        rows = [row for first in set(blocks.rows_of_keys(chain.keys).tolist()) for row in blocks.shards_of(first)]
        copies = [row for row in rows if blocks.is_resident(row, tier)]
        free = [row for row in copies if not blocks.leases[row] and not blocks.holds[row]]
        leaving = [row for row in free if not self.pin_keeps((blocks.key_of(row), blocks.shard_of(row)), tier)]
        names = [(blocks.key_of(row), blocks.shard_of(row)) for row in leaving]
        gone = [name for name in names if self.opened.residency(*name) == {tier}]
        self.go(gone)
        outcome = await self.store.evict(chain.keys, tier)
        assert (outcome.evicted, outcome.held) == (len(leaving), len(copies) - len(leaving))
        self.gone(gone)

    def pin_keeps(self, name: Object, tier: TierName) -> bool:
        """A pinned block's copy on SSD stays, and so does one that only DRAM has."""
        if self.pins.get(name, 0) <= self.files.clock.wall_ms():
            return False
        return tier is TierName.SSD or TierName.SSD not in self.opened.residency(*name)

    def go(self, names: list[Object]) -> None:
        """They are invisible, and a crash may bring them back until their records are gone."""
        for name in names:
            self.pins.pop(name, None)
            self.doubtful.setdefault(name, set()).update(self.versions.pop(name))

    def gone(self, names: list[Object]) -> None:
        for name in names:
            self.doubtful.pop(name, None)


class AmpleStore(StoreMachine):
    dram_bytes = 4 * MIB
    ssd_bytes = 8 * MIB
    watermarks = Watermarks(0.0, 0.0)
    ample = True


class StoreUnderPressure(StoreMachine):
    """Room for a fifth of the blocks in DRAM, for half of them on SSD."""

    dram_bytes = 280 * KIB
    ssd_bytes = 560 * KIB
    watermarks = Watermarks(0.1, 0.2)
    ample = False


FAST = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
DEEP = settings(FAST, max_examples=600, stateful_step_count=80)

TestAmpleStore = AmpleStore.TestCase
TestAmpleStore.settings = FAST
TestStoreUnderPressure = StoreUnderPressure.TestCase
TestStoreUnderPressure.settings = FAST


@pytest.mark.slow
class TestAmpleStoreDeeply(AmpleStore.TestCase):  # type: ignore[misc, valid-type]
    settings = DEEP


@pytest.mark.slow
class TestStoreUnderPressureDeeply(StoreUnderPressure.TestCase):  # type: ignore[misc, valid-type]
    settings = DEEP
