"""The store as its users see it: layouts, lookups, leases, loads, saves, and what operators ask.

Everything is called on the event loop's thread. Keys in, rows inside, bytes out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from kvservice.blocks import NO_ROW, BlockTable, Rows, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.index.block_index import BlockIndex
from kvservice.index.session_records import Manifest
from kvservice.policy.base import Policy
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.leases import Client, Lease, Leases
from kvservice.store.loop_budget import LoopBudget
from kvservice.store.miss_reasons import MissReasons, Reason
from kvservice.store.mover.evictor import Evictor, Watermarks
from kvservice.store.mover.promoter import Promoter
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.operations.drain import Drain
from kvservice.store.operations.explain import Explain
from kvservice.store.operations.pins import Pins
from kvservice.store.operations.requests import Requests
from kvservice.store.operations.scrub import Scrub
from kvservice.store.prefix_match import Found, find, narrowed
from kvservice.store.sessions.sessions import SessionLimits, Sessions
from kvservice.store.tasks import Tasks
from kvservice.store.tickets import Tickets
from kvservice.store.transfers.in_place_reads import Locates
from kvservice.store.transfers.in_place_uploads import Reservations
from kvservice.store.transfers.reads import Loads
from kvservice.store.transfers.upload import Ingest, Ingests, SaveRequest
from kvservice.tiers.base import Tier
from kvservice.tiers.dram import DramTier
from kvservice.tiers.ssd import SsdTier
from kvservice_api.errors import Draining, InvalidRequest, KVError, UnknownLayout
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Layout, Shard

log = logging.getLogger(__name__)

T = TypeVar("T")

_EXPIRE_EVERY_S = 0.25
_PART = 256
_LOOKUP_PART = 512


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What bounds the store, besides the tiers' capacities. Times in seconds."""

    clients_max: int = 1024
    leases_per_client_max: int = 4096
    leased_blocks_per_client_max: int = 1 << 18
    lease_ttl_max_s: float = 300.0
    frame_bytes: int = 1 << 20
    transfer_slots: int = 4
    writes_in_flight: int = 4
    reads_in_flight: int = 4
    reserve_wait_s: float = 5.0
    upload_wait_s: float = 10.0
    recency_flush_s: float = 60.0
    scrub_bytes_per_second: int = 200 << 20
    pin_ttl_max_s: float = 30 * 86400.0
    pin_fraction_max: float = 0.5
    requests_remembered: int = 4096
    session: SessionLimits = field(default_factory=SessionLimits)
    writes_in_place: bool = True


class Hit(NamedTuple):
    """The answer to a lookup. `runs` are (count, in DRAM, on SSD) over the leading hits."""

    blocks: int
    runs: list[tuple[int, bool, bool]]
    lease: Lease | None


class PrefetchOutcome(NamedTuple):
    missing: int
    in_dram: int
    promoted: int
    failed: int


class EvictOutcome(NamedTuple):
    evicted: int
    held: int
    missing: int


class BlockStore:
    def __init__(
        self,
        blocks: BlockTable,
        dram: DramTier,
        ssd: SsdTier | None,
        index: BlockIndex,
        policy: Policy[BlockTable],
        clock: Clock,
        counters: Counters,
        executor: Executor,
        *,
        limits: StoreLimits,
        watermarks: dict[TierName, Watermarks],
        history: MissReasons | None = None,
    ) -> None:
        self.blocks = blocks
        self.dram = dram
        self.ssd = ssd
        self.index = index
        self.clock = clock
        self.counters = counters
        self.limits = limits
        self.history = MissReasons(clock, 0) if history is None else history
        self.tasks = Tasks()
        self.loop_budget = LoopBudget()
        tiers: dict[TierName, Tier] = {TierName.DRAM: dram}
        if ssd is not None:
            tiers[TierName.SSD] = ssd
        self.lifecycle = BlockLifecycle(blocks, tiers, index, counters, self.tasks, self.history)
        self.evictor = Evictor(
            self.lifecycle,
            policy,
            clock,
            self.tasks,
            watermarks={tier: watermarks[tier] for tier in tiers},
            wait_s=limits.reserve_wait_s,
        )
        self.write_behind: WriteBehind | None = None
        self.promoter: Promoter | None = None
        if ssd is not None:
            shared = (self.lifecycle, self.evictor, dram, ssd, policy, clock, counters, self.tasks, self.loop_budget)
            self.write_behind = WriteBehind(*shared, writes_in_flight=limits.writes_in_flight)
            self.promoter = Promoter(*shared, reads_in_flight=limits.reads_in_flight)
        self.leases = Leases(
            self.lifecycle,
            clock,
            counters,
            self.tasks,
            self.loop_budget,
            clients_max=limits.clients_max,
            per_client_max=limits.leases_per_client_max,
            blocks_per_client_max=limits.leased_blocks_per_client_max,
        )
        assert index.secret is not None, "a daemon opened it"
        self.ingests = Ingests(
            self.lifecycle,
            self.evictor,
            dram,
            self.write_behind,
            clock,
            counters,
            self.loop_budget,
            wait_s=limits.upload_wait_s,
            secret=index.secret.key,
        )
        self.loads = Loads(
            self.lifecycle,
            dram,
            ssd,
            self.promoter,
            counters,
            executor,
            self.loop_budget,
            slots=limits.transfer_slots,
            frame_bytes=limits.frame_bytes,
        )
        self.locates = Locates(self.lifecycle, dram, self.promoter, counters, executor)
        self.reservations = Reservations(self.ingests, dram, self.tasks, offered=limits.writes_in_place)
        self.scrub = Scrub(
            self.lifecycle, dram, ssd, clock, counters, executor, bytes_per_second=limits.scrub_bytes_per_second
        )
        self.pins = Pins(
            self.lifecycle,
            self.write_behind,
            clock,
            ttl_max_s=limits.pin_ttl_max_s,
            fraction_max=limits.pin_fraction_max,
        )
        self.requests = Requests(blocks, clock, limits.requests_remembered)
        self.boot_epoch = secrets.randbits(63) | 1
        self.tickets = Tickets(self.leases, blocks, self.requests, clock, self.loop_budget, boot_epoch=self.boot_epoch)
        self.explain = Explain(blocks, index, self.history, self.ingests)
        self.drain = Drain(blocks, self.ingests, self.loads, self.locates, self.write_behind, self.tasks)
        self.sessions = Sessions(index, self.lifecycle, clock, counters, self.tasks, self.layout, limits.session)

    def start(self) -> None:
        """Begin the background work: room, write-behind, lease expiry, recency."""
        self.evictor.start(self.write_behind)
        self.reservations.start()
        if self.write_behind is not None:
            self.write_behind.start()
        self.tasks.start(self._expire_forever(), "lease expiry")
        self.tasks.start(self._flush_forever(), "recency flush")
        self.sessions.start()

    async def stop(self) -> None:
        """Finish what is quick, write recency, stop the rest. No upload or load may run any more."""
        try:
            await self.lifecycle.flush_recency()
        except KVError as error:
            log.warning("use times were not written: %s", error.message)
        await self.sessions.stop()
        await self.tasks.stop()

    @property
    def draining(self) -> bool:
        """Whether no save may begin."""
        return self.drain.is_draining

    # Layouts

    async def open_layout(self, caller: Caller, layout: Layout) -> bool:
        """Make a layout known. True where it was not."""
        if self.index.layout_id(layout.fingerprint) is not None:
            return False
        await self.index.put_layout(layout)
        return True

    def layout(self, fingerprint: bytes) -> tuple[int, Layout]:
        layout_id = self.index.layout_id(fingerprint)
        if layout_id is None:
            raise UnknownLayout(
                f"no layout with fingerprint {fingerprint.hex() or '(empty)'} was opened here: call OpenLayout"
            )
        return layout_id, self.index.layouts[layout_id]

    # Finding

    def lookup(
        self,
        caller: Caller,
        fingerprint: bytes,
        shard: Shard | None,
        keys: Sequence[bytes],
        lease_ttl_s: float,
        request_id: str = "",
    ) -> Hit:
        """How many leading blocks are stored; leases them where `lease_ttl_s` is not 0. Not for thousands of keys.

        With a `request_id` it is remembered for a while what was asked and found.
        """
        self.requests.check_id(request_id)
        layout_id, layout = self.layout(fingerprint)
        wanted = Shard.whole(layout) if shard is None else shard.check(layout)
        client = self.leases.client(caller) if lease_ttl_s else None
        found = find(self.blocks, keys, layout_id, wanted)
        hit = self._hit(client, layout, wanted, len(keys), found, lease_ttl_s)
        self._note_lookup(request_id, caller, layout_id, wanted, keys, hit)
        return hit

    async def lookup_chunked(
        self,
        caller: Caller,
        fingerprint: bytes,
        shard: Shard | None,
        keys: Sequence[bytes],
        lease_ttl_s: float,
        request_id: str = "",
    ) -> Hit:
        """`lookup`, of any number of keys. What it has found stays where it is until the answer leases all of it."""
        if len(keys) <= _LOOKUP_PART:
            return self.lookup(caller, fingerprint, shard, keys, lease_ttl_s, request_id)
        self.requests.check_id(request_id)
        layout_id, layout = self.layout(fingerprint)
        wanted = Shard.whole(layout) if shard is None else shard.check(layout)
        found, held = Found(), []
        try:
            for start in range(0, len(keys), _LOOKUP_PART):
                await self.loop_budget.slot()
                part = keys[start : start + _LOOKUP_PART]
                more = find(self.blocks, part, layout_id, wanted)
                self.lifecycle.hold(more.held)
                held.append(more.held)
                found.extend(more)
                if len(more.rows) < len(part):
                    break
            await self.loop_budget.slot()
            client = self.leases.client(caller) if lease_ttl_s else None  # It may have gone meanwhile.
            hit = self._hit(client, layout, wanted, len(keys), found, lease_ttl_s)
            self._note_lookup(request_id, caller, layout_id, wanted, keys, hit)
            return hit
        finally:
            for rows in held:
                self.lifecycle.unhold(rows)

    def _hit(
        self, client: Client | None, layout: Layout, wanted: Shard, asked: int, found: Found, lease_ttl_s: float
    ) -> Hit:
        self.counters.lookup_blocks_asked += asked
        self.counters.lookup_blocks_hit += len(found.rows)
        lease = None
        if len(found.rows):
            self.blocks.touch(found.held, self.clock.wall_ms())
            self.blocks.hits[found.held] += 1
            if client is not None:
                ttl_s = min(lease_ttl_s, self.limits.lease_ttl_max_s)
                lease = self.leases.grant(client, layout, wanted, found.rows, found.parts, found.held, ttl_s)
        return Hit(len(found.rows), self._runs(found.rows), lease)

    def _note_lookup(
        self, request_id: str, caller: Caller, layout_id: int, wanted: Shard, keys: Sequence[bytes], hit: Hit
    ) -> None:
        if request_id:
            who = self.leases.name_of(caller.client)
            self.requests.note_lookup(request_id, self.index.layouts, layout_id, wanted, who, keys, hit.runs, hit.lease)

    def session_history(
        self, caller: Caller, fingerprint: bytes, session_id: str, shard: Shard | None
    ) -> tuple[Manifest, int, list[tuple[int, bool, bool]]]:
        """A session, how many of its leading slices are stored, and where these lie, as in `Hit`."""
        _, layout = self.layout(fingerprint)
        wanted = Shard.whole(layout) if shard is None else shard.check(layout)
        manifest = self.sessions.get(caller, fingerprint, session_id)
        usable, runs = self.usable_history(caller, manifest, wanted)
        return manifest, usable, runs

    def usable_history(
        self, caller: Caller, manifest: Manifest, wanted: Shard
    ) -> tuple[int, list[tuple[int, bool, bool]]]:
        """How many leading slices of a session are stored, and where these lie, as in `Hit`."""
        rows = find(self.blocks, manifest.slices["key"].tolist(), manifest.layout_id, wanted).rows
        usable = self.sessions.usable_slices(manifest, rows)
        return usable, self._runs(rows[:usable])

    def _runs(self, rows: Rows) -> list[tuple[int, bool, bool]]:
        if not len(rows):
            return []
        dram = self.blocks.dram_offset[rows] >= 0
        ssd = self.blocks.ssd_offset[rows] >= 0
        changes = np.flatnonzero((dram[1:] != dram[:-1]) | (ssd[1:] != ssd[:-1])) + 1
        starts = [0, *changes.tolist()]
        ends = [*changes.tolist(), len(rows)]
        return [(end - start, bool(dram[start]), bool(ssd[start])) for start, end in zip(starts, ends, strict=True)]

    async def lease(self, caller: Caller, lease_id: int, shard: Shard | None) -> Lease:
        """The caller's lease; with a shard, as one of that shard within the lease's.

        Raises UnknownClient, LeaseExpired, LeaseNotYours, InvalidRequest.
        """
        part = await narrowed(self.blocks, self.leases.get(caller, lease_id), shard, self.loop_budget)
        self.leases.get(caller, lease_id)  # It may have ended meanwhile.
        return part

    async def adopt(
        self, caller: Caller, ticket: bytes, fingerprint: bytes, shard: Shard | None, lease_ttl_s: float
    ) -> Hit:
        """A lease of the caller's own on the blocks of a ticket. Raises as `Tickets.adopt`."""
        ttl_s = min(lease_ttl_s, self.limits.lease_ttl_max_s)
        lease = await self.tickets.adopt(caller, ticket, fingerprint, shard, ttl_s)
        return Hit(len(lease.rows), self._runs(lease.rows), lease)

    async def release(self, caller: Caller, lease_id: int) -> None:
        """End a lease, and return once nothing is held by leases that have ended."""
        self.leases.release(caller, lease_id)
        await self.leases.drain_ended()

    def list_rows(
        self, caller: Caller, start: int, count: int, *, layout_id: int | None, tiers: Sequence[TierName]
    ) -> Rows:
        """The first `count` rows from `start` on of stored blocks: of that layout, where one is given, and with a
        copy in each of `tiers`."""
        blocks = self.blocks
        shown = blocks.live[start : blocks.row_end].copy()
        if layout_id is not None:
            shown &= blocks.layout_id[start : blocks.row_end] == layout_id
        for tier in tiers:
            shown &= blocks.resident(tier)[start:]
        return np.flatnonzero(shown)[:count] + start

    # Saving

    def begin_save(
        self,
        caller: Caller,
        fingerprint: bytes,
        shard: Shard | None,
        parent_key: bytes,
        keys: Sequence[bytes],
        last_block_tokens: int,
    ) -> Ingest:
        """An upload, to be used as ``async with``. Raises Draining once the daemon is stopping."""
        client, request = self.save_request(caller, fingerprint, shard, parent_key, keys, last_block_tokens)
        return self.ingests.begin(caller, client, request)

    def save_request(
        self,
        caller: Caller,
        fingerprint: bytes,
        shard: Shard | None,
        parent_key: bytes,
        keys: Sequence[bytes],
        last_block_tokens: int,
    ) -> tuple[Client, SaveRequest]:
        """Who saves what. Raises Draining, UnknownLayout, UnknownClient, InvalidRequest."""
        if self.draining:
            raise self.record_refused(caller, keys, Draining(f"the daemon is {self.drain.word} and takes no new saves"))
        layout_id, layout = self.layout(fingerprint)
        client = self.leases.client(caller)
        if len(parent_key) != KEY_BYTES:
            raise InvalidRequest(f"parent_key has {len(parent_key)} bytes, not {KEY_BYTES}", field="parent_key")
        last = last_block_tokens or layout.block_tokens
        counts = [*[layout.block_tokens] * (len(keys) - 1), last]
        part = Shard.whole(layout) if shard is None else shard.check(layout)
        return client, SaveRequest(layout_id, layout, part, parent_key, keys, counts)

    def record_refused(self, caller: Caller, keys: Sequence[bytes], error: KVError) -> KVError:
        """The error with which a save of these blocks ends before it has begun; it is remembered."""
        self.history.note_keys(keys, Reason.REFUSED, error.reason)
        return error

    # Moving and dropping

    async def prefetch(self, caller: Caller, keys: Sequence[bytes], *, within_s: float, wait: bool) -> PrefetchOutcome:
        """Copy blocks up to DRAM ahead of their load."""
        blocks = self.blocks
        wanted: list[int] = []
        missing = in_dram = 0
        for part in _parts_of(list(dict.fromkeys(keys))):
            await self.loop_budget.slot()
            first = blocks.rows_of_keys(part)
            rows = [row for start in first.tolist() for row in blocks.shards_of(start)]
            absent = [row for row in rows if not blocks.is_resident(row, TierName.DRAM)]
            missing += int((first == NO_ROW).sum())
            in_dram += len(rows) - len(absent)
            wanted += absent
        if self.promoter is None or not wanted:
            return PrefetchOutcome(missing, in_dram, 0, len(wanted))
        begin = self.promoter.begin(wanted, within_s=within_s)
        if not wait:
            self.tasks.start(begin, "prefetch")
            return PrefetchOutcome(missing, in_dram, len(wanted), 0)
        landings = await begin
        for landing in landings.values():
            await landing.done.wait()
        promoted = sum(blocks.is_resident(row, TierName.DRAM) for row in wanted)
        return PrefetchOutcome(missing, in_dram, promoted, len(wanted) - promoted)

    async def evict(self, caller: Caller, keys: Sequence[bytes], tier: TierName) -> EvictOutcome:
        """Drop copies from one tier. What is leased, busy or kept by a pin stays."""
        blocks = self.blocks
        evicted = held = missing = 0
        for part in _parts_of(list(dict.fromkeys(keys))):
            rows: list[int] = []
            for first in blocks.rows_of_keys(part).tolist():
                copies = [row for row in blocks.shards_of(first) if blocks.is_resident(row, tier)]
                missing += not copies
                now_ms = self.clock.wall_ms()
                free = [
                    row for row in copies if self.lifecycle.is_free(row) and not blocks.pin_keeps(row, tier, now_ms)
                ]
                held += len(copies) - len(free)
                rows += free
            await self.lifecycle.evict(rows, tier)
            evicted += len(rows)
        return EvictOutcome(evicted, held, missing)

    async def discard(self, caller: Caller, keys: Sequence[bytes]) -> tuple[int, int]:
        """Forget blocks everywhere, pinned or not: how many objects, and how many keys had none."""
        discarded = missing = 0
        for part in _parts_of(list(dict.fromkeys(keys))):
            first = self.blocks.rows_of_keys(part)
            rows = [row for start in first.tolist() for row in self.blocks.shards_of(start)]
            await self._discard(rows)
            discarded += len(rows)
            missing += int((first == NO_ROW).sum())
        return discarded, missing

    async def discard_layout(self, caller: Caller, fingerprint: bytes | None) -> int:
        """Forget all blocks of a layout, or all blocks there are."""
        blocks = self.blocks
        rows = blocks.live_rows()
        if fingerprint is not None:
            rows = rows[blocks.layout_id[rows] == self.layout(fingerprint)[0]]
        marks = blocks.generation[rows]
        discarded = 0
        for part in _parts_of(range(len(rows))):
            there = rows[part][blocks.live[rows[part]] & (blocks.generation[rows[part]] == marks[part])]
            await self._discard(there.tolist())
            discarded += len(there)
        return discarded

    async def _discard(self, rows: list[int]) -> None:
        await self.lifecycle.discard(rows)
        self.counters.discarded_blocks += len(rows)

    # Time

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            while self.leases.expire():
                await self.loop_budget.slot()

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(self.limits.recency_flush_s)
            try:
                await self.lifecycle.flush_recency()
            except KVError as error:
                log.warning("use times were not written: %s", error.message)


def _parts_of(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """What one turn of the event loop can take, again and again."""
    for start in range(0, len(items), _PART):
        yield items[start : start + _PART]
