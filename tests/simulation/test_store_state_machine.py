"""A real store beside a plain model of it: for every order of events, both give the same answers.

The store is the daemon's own, with LMDB, a shared-memory arena, SSD files and threads. Two sizes:
with ample space no block may be missing; under pressure only blocks that the policy evicted.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from kvservice.blocks import TierName
from kvservice.store.mover.evictor import Watermarks
from kvservice.store.transfers.save_request import SaveOutcome
from kvservice_api.errors import (
    BlockNotFound,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PinsFull,
    TicketExpired,
    TicketSpent,
    TierFull,
    UploadCorrupted,
)
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from tests.simulation.store_beside_model import (
    CHAINS,
    SHARDS,
    TAILS,
    HeldLease,
    HeldTicket,
    OpenLoad,
    OpenSave,
    StoreBesideModel,
    image_of,
)
from tests.stores import CALLER, KIB, MIB, at_once, caller_of, checksums_of, frames_of


class StoreMachine(StoreBesideModel):
    """The rules."""

    @initialize(stored=st.lists(st.tuples(st.integers(0, len(CHAINS) - 1), st.booleans()), max_size=3))
    def first_start(self, stored: list[tuple[int, bool]]) -> None:
        self.do(self._open())
        for chain, on_ssd in stored:
            self.save(chain=chain, first=0, count=6, shard=SHARDS[0], on_ssd=on_ssd, client=0)

    # The rules choose from these. Nothing here, and no precondition, depends on the progress of background work, so
    # that hypothesis can repeat a failed example.

    chains = st.integers(0, len(CHAINS) - 1)
    counts = st.integers(1, 6)
    firsts = st.integers(0, 4)
    shards = st.sampled_from(SHARDS[:1] * 4 + SHARDS)
    tiers = st.sampled_from([TierName.DRAM, TierName.SSD])
    numbers = st.integers(0, 7)

    def part(self, chain: int, first: int, count: int) -> tuple[Layout, BlockChain]:
        layout, whole = CHAINS[chain]
        first = min(first, len(whole) - 1)
        return layout, whole[first : first + count]

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

    @rule(tail=st.integers(0, len(TAILS) - 1), shard=shards, on_ssd=st.booleans())
    def save_a_tail(self, tail: int, shard: Shard, on_ssd: bool) -> None:
        layout, chain = TAILS[tail]
        version = self.new_version()
        outcome = self.do(self._save(self.client(0), layout, chain, shard, version, on_ssd=on_ssd))
        self.note_save(chain, shard, version, outcome)

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
        checksums[-1] ^= np.uint64(1)  # The checksum of the last block's last layer.

        async def work() -> SaveOutcome:
            async with self.opened.begin_save(self.client(0), part, shard=shard, layout=layout) as upload:
                for frame in frames_of(layout, shard, part, images):
                    upload.write(frame)
                return await upload.commit(checksums, on_ssd=False)

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
        upload = self.opened.begin_save(self.client(client), part, shard=shard, layout=layout)
        self.do(upload.__aenter__())
        frames = frames_of(layout, shard, part, images)
        for frame in frames[: len(frames) // 2]:
            upload.write(frame)
        frames = frames[len(frames) // 2 :]
        self.saves.append(OpenSave(upload, self.client(client), layout, shard, part, version, frames))

    @rule(number=numbers, commit=st.booleans())
    def end_a_save(self, number: int, commit: bool) -> None:
        if not self.saves:
            return
        save = self.saves.pop(number % len(self.saves))
        named = zip(save.chain.keys, save.chain.token_counts, strict=True)
        images = [image_of(save.layout, *one, save.version, save.shard) for one in named]

        async def work() -> SaveOutcome:
            for frame in save.frames:
                save.upload.write(frame)
            outcome = await save.upload.commit(checksums_of(save.shard, images), on_ssd=False)
            await save.upload.__aexit__(None, None, None)
            return outcome

        if commit:
            self.note_save(save.chain, save.shard, save.version, self.do(work()))
        else:
            self.do(save.upload.__aexit__(None, None, None))

    # Lookups and loads

    @rule(chain=chains, first=firsts, count=counts, shard=shards, ttl_s=st.sampled_from([0, 5, 50, 50]), client=numbers)
    def lookup(self, chain: int, first: int, count: int, shard: Shard, ttl_s: int, client: int) -> None:
        layout, part = self.part(chain, first, count)
        hit = at_once(
            self.store.lookups.lookup(caller_of(self.client(client)), layout.fingerprint, shard, part.keys, ttl_s)
        )
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
            self.opened.leases.renew(caller_of(held.client), held.lease.lease_id, ttl_s)
            held.ends_at_s = self.files.clock.monotonic_s() + ttl_s
        else:
            self.opened.leases.begin_release(caller_of(held.client), held.lease.lease_id)
            self.leases.remove(held)

    @rule(number=numbers, ttl_s=st.sampled_from([5, 50]), adoptions=st.integers(1, 3))
    def export_a_lease(self, number: int, ttl_s: int, adoptions: int) -> None:
        if not self.leases:
            return
        held = self.leases[number % len(self.leases)]
        ticket = self.do(self._export(held, ttl_s, adoptions))
        self.tickets.append(HeldTicket(ticket, held, self.files.clock.monotonic_s() + ttl_s, adoptions))

    async def _export(self, held: HeldLease, ttl_s: int, adoptions: int) -> bytes:
        return self.opened.tickets.export(caller_of(held.client), held.lease.lease_id, ttl_s, adoptions)[0]

    @rule(number=numbers, shard=shards, ttl_s=st.sampled_from([5, 50]), client=numbers)
    def adopt_a_ticket(self, number: int, shard: Shard, ttl_s: int, client: int) -> None:
        if not self.tickets:
            return
        held = self.tickets[number % len(self.tickets)]
        exported, rank = held.exported, self.client(client)
        if not exported.shard.covers(shard):
            with pytest.raises(InvalidRequest):
                self.do(self._adopt(held, shard, rank, ttl_s))
            return
        lease = self.do(self._adopt(held, shard, rank, ttl_s))
        ends_at_s = self.files.clock.monotonic_s() + ttl_s
        assert len(lease.rows) == len(exported.chain), "a rank sees another length than the scheduler"
        places = {place: extent for place, extent in exported.places.items() if place[0] in lease.held_rows}
        versions = exported.versions
        self.leases.append(HeldLease(lease, rank, exported.layout, shard, exported.chain, ends_at_s, versions, places))
        held.adoptions_left -= 1
        if not held.adoptions_left:
            self.tickets.remove(held)
            with pytest.raises(TicketSpent):
                self.do(self._adopt(held, shard, rank, ttl_s))

    @rule(seconds=st.sampled_from([1, 10, 100]))
    def time_passes(self, seconds: int) -> None:
        self.files.clock.advance(seconds=seconds)
        now_s = self.files.clock.monotonic_s()
        for held in self.leases:
            if held.ends_at_s <= now_s:
                with pytest.raises(LeaseExpired):
                    self.opened.leases.get(caller_of(held.client), held.lease.lease_id)
        self.leases = [held for held in self.leases if held.ends_at_s > now_s]
        for ticket in self.tickets:
            if ticket.ends_at_s <= now_s:
                with pytest.raises(TicketExpired):
                    self.do(self._adopt(ticket, None, self.client(0), 50))
        self.tickets = [ticket for ticket in self.tickets if ticket.ends_at_s > now_s]
        self.opened.leases.expire()
        assert self.opened.leases.count == len(self.leases) + len(self.tickets)

    @rule(number=numbers)
    def a_client_goes(self, number: int) -> None:
        gone = self.client(number)
        self.opened.store.leases.detach(CALLER, gone)
        self.clients = [client for client in self.clients if client is not gone]
        self.clients.append(self.opened.store.leases.attach(CALLER, "another"))
        self.leases = [held for held in self.leases if held.client is not gone]
        over = [save for save in self.saves if save.client is gone]
        self.saves = [save for save in self.saves if save.client is not gone]
        assert len(self.opened.uploading()) == sum(len(save.upload.places) for save in self.saves)
        for save in over:
            self.do(save.upload.__aexit__(None, None, None))

    # Moves and drops

    @rule(chain=chains, first=firsts, count=counts, tier=tiers)
    def evict(self, chain: int, first: int, count: int, tier: TierName) -> None:
        _, part = self.part(chain, first, count)
        self.do(self._evict(part, tier))

    @rule(tail=st.integers(0, len(TAILS) - 1), act=st.sampled_from(["discard", "dram", "ssd"]))
    def drop_a_tail(self, tail: int, act: str) -> None:
        self.do(self._act(act, TAILS[tail][1]))

    @rule(chain=chains, first=firsts, count=counts, whole_layout=st.sampled_from([False, False, True]))
    def discard(self, chain: int, first: int, count: int, whole_layout: bool) -> None:
        layout, part = self.part(chain, first, count)
        keys = {key for other, whole in CHAINS + TAILS if other is layout for key in whole.keys}

        async def work() -> None:
            self.reconcile()  # In the same iteration of the event loop; otherwise the policy may evict between the two.
            gone = [name for name in self.versions if name[0] in (keys if whole_layout else part.keys)]
            if not whole_layout:
                missing = len(set(part.keys) - {key for key, _ in gone})
                assert await self._discard(part) == (len(gone), missing)
                return
            discarding = self.store.operators.discard_layout(CALLER, layout.fingerprint)
            self.go(gone)
            assert await discarding == len(gone)
            self.gone(gone)
            for name in gone:
                self.pins.pop(name, None)

        self.do(work())

    @rule(chain=chains, first=firsts, count=counts, wait=st.booleans())
    def prefetch(self, chain: int, first: int, count: int, wait: bool) -> None:
        _, part = self.part(chain, first, count)
        outcome = self.do(self.store.moves.prefetch(CALLER, part.keys, within_s=1.0, wait=wait))
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
                until_ms = self.do(self.opened.store.pins.pin(CALLER, part.keys, ttl_s * 1000)).until_ms
            else:
                self.do(self.opened.store.pins.unpin(CALLER, part.keys))
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
            self.do(self.opened.block_lifecycle.flush_recency())
        else:
            assert self.do(self._scrub()) == 0

    # Concurrent operations

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
        if act != "up":  # For blocks of both operations, either order is possible.
            for key in set(part.keys) & set(other_part.keys):
                for name in [(key, each) for each in SHARDS]:
                    found = before.get(name, set()) | self.versions.get(name, set())
                    self.versions.pop(name, None)
                    if found and self.opened.residency(*name):
                        self.versions[name] = found
                    elif found:  # The policy may have evicted it meanwhile, and its record may still be there.
                        self.doubtful.setdefault(name, set()).update(found)

    # Restarts and crashes

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
        """Kill the store some iterations of the event loop after a save and another operation began."""
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
        """Blocks that are visible at the kill survive; after a power cut, those on SSD."""
        survivors = self.visible()
        if power_cut:
            survivors = {name for name in survivors if TierName.SSD in self.opened.residency(*name)}
        self.go(list(set(self.versions) - survivors))
        for name in survivors - set(self.versions):  # Blocks that were saved just before.
            self.versions[name] = set(self.doubtful[name])
        await self.opened.kill()
        await self._end_all()
        if power_cut:
            self.files.lose_power()


class AmpleStore(StoreMachine):
    dram_bytes = 4 * MIB
    ssd_bytes = 8 * MIB
    watermarks = Watermarks(0.0, 0.0)
    ample = True


class StoreUnderPressure(StoreMachine):
    """Space for a fifth of the blocks in DRAM, and for half of them on SSD."""

    dram_bytes = 280 * KIB
    ssd_bytes = 560 * KIB
    watermarks = Watermarks(0.1, 0.2)
    ample = False


FAST = settings(
    max_examples=10, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
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
