"""The store's facade: the clients' verbs. The operators' verbs are in ``operations/operators.py``.

The first argument of a verb is its caller. Call everything on the event loop's thread, except `BlockStore.facts`. The
parts that implement the verbs are private.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence, Sized
from concurrent.futures import Executor
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, BlockTable, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.index.block_index import BlockIndex
from kvservice.policy import Placement
from kvservice.policy.items import Conditions
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.hints.exchange import HintExchange, HintLimits, HintStream
from kvservice.store.hints.placement import WindowPromotion
from kvservice.store.leases import Client, Lease, Leases
from kvservice.store.miss_reasons import MissReasons, Reason
from kvservice.store.mover.active_policy import ActivePolicy
from kvservice.store.mover.evictor import Evictor, Watermarks
from kvservice.store.mover.learned_counts import LearnedCounts
from kvservice.store.mover.promoter import Promoter
from kvservice.store.mover.read_ahead import ReadAhead
from kvservice.store.mover.shadow_run import ShadowRun
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.operations.drain import Drain
from kvservice.store.operations.explain import Explain
from kvservice.store.operations.gauges import Gauges, StoreGauges
from kvservice.store.operations.listings import Listings
from kvservice.store.operations.lookup_counts import LookupCounts
from kvservice.store.operations.operators import Operators
from kvservice.store.operations.pins import Pins
from kvservice.store.operations.policies import Policies
from kvservice.store.operations.requests import Requests
from kvservice.store.operations.scrub import Scrub
from kvservice.store.operations.trace import TraceRecorder
from kvservice.store.prefix_match import PrefixMatch, match_prefix, match_tails, narrowed, runs_of
from kvservice.store.sessions.sessions import SessionLimits, Sessions
from kvservice.store.tasks import LoopBudget, Tasks, parts_of
from kvservice.store.tickets import Tickets
from kvservice.store.transfers.admission import Admission
from kvservice.store.transfers.in_place_reads import InPlaceReads
from kvservice.store.transfers.in_place_uploads import InPlaceUploads
from kvservice.store.transfers.reads import Reads
from kvservice.store.transfers.upload import SaveRequest, Uploads
from kvservice.store.transfers.upload import Upload as Upload
from kvservice.store.types import (
    Adopted,
    EvictOutcome,
    Hit,
    Incoming,
    Located,
    NotInPlace,
    Part,
    Place,
    PrefetchOutcome,
    ReportRecord,
    SaveHeader,
    SaveOutcome,
    SessionAppend,
    SessionHistory,
    SharedArena,
    Span,
    StoredSession,
    StoreFacts,
    TierFacts,
)
from kvservice.tiers.base import DurableTier, Tier
from kvservice.tiers.dram import DramTier
from kvservice_api.errors import Draining, InvalidRequest, KVError, Overloaded, UnknownLayout
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Layout, Shard

log = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=Sized)

_EXPIRE_EVERY_S = 0.25
_SSD_BYTES_PER_S = float(2**30)  # Until it is measured.
_LOOKUP_PART = 512


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """The limits of the store, besides the tiers' capacities. Times in seconds."""

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
    hints: HintLimits = field(default_factory=HintLimits)
    writes_in_place: bool = True
    keys_max: int = 16_384
    loads_max: int = 256
    saves_max: int = 256
    transfer_idle_s: float = 60.0


class BlockStore:
    def __init__(
        self,
        blocks: BlockTable,
        dram: DramTier,
        slower: Mapping[TierName, DurableTier],
        index: BlockIndex,
        policy: Placement | None,
        clock: Clock,
        counters: Counters,
        executor: Executor,
        *,
        limits: StoreLimits,
        watermarks: dict[TierName, Watermarks],
        history: MissReasons | None = None,
        learned: LearnedCounts | None = None,
    ) -> None:
        """`slower` are the tiers below DRAM, from the fastest to the slowest; `blocks` has the same tiers.

        Without a policy, single blocks are ranked by recency.
        """
        self._blocks = blocks
        self._dram = dram
        self._slower = slower
        self._index = index
        self._clock = clock
        self._counters = counters
        self.limits = limits
        self._history = MissReasons(clock, 0) if history is None else history
        self._admission = Admission(
            clock,
            loads_max=limits.loads_max,
            saves_max=limits.saves_max,
            slots=limits.transfer_slots,
            idle_s=limits.transfer_idle_s,
            frame_bytes=limits.frame_bytes,
        )
        self._tasks = Tasks()
        self._loop_budget = LoopBudget()
        tiers: dict[TierName, Tier] = dict(zip(blocks.tiers, (dram, *slower.values()), strict=True))
        self._lifecycle = BlockLifecycle(blocks, tiers, index, counters, self._tasks, self._history, clock)
        used_share = 1 - watermarks[blocks.first_tier].high  # Else a policy always fills what is to be kept free.
        ssd_bytes = tiers[blocks.tiers[1]].capacity_bytes if slower else 0
        self._first_policy = policy
        self._conditions: Callable[[], Conditions] = lambda: Conditions(
            int(dram.capacity_bytes * used_share), ssd_bytes, _SSD_BYTES_PER_S
        )
        self._policy = ActivePolicy(
            blocks,
            self._conditions,
            self._block_tokens_of,
            clock,
            counters,
            self._tasks,
            LearnedCounts(None) if learned is None else learned,
        )
        self._evictor = Evictor(
            self._lifecycle,
            self._policy,
            clock,
            self._tasks,
            watermarks={tier: watermarks[tier] for tier in tiers},
            wait_s=limits.reserve_wait_s,
        )
        shared = (self._lifecycle, self._evictor, dram, clock, counters, self._tasks, self._loop_budget)
        self._writers: dict[TierName, WriteBehind] = {}  # By the tier that each copies from.
        following: WriteBehind | None = None
        for name, target in reversed(list(slower.items())):
            above = blocks.tiers[blocks.position(name) - 1]
            self._writers[above] = following = WriteBehind(
                *shared,
                ranking=self._policy,
                above=above,
                target=target,
                following=following,
                writes_in_flight=limits.writes_in_flight,
            )
        self._write_behind = following  # From the first tier.
        self._promoter: Promoter | None = None
        if following is not None:
            self._promoter = Promoter(*shared, write_behind=following, reads_in_flight=limits.reads_in_flight)
        self._leases = Leases(
            self._lifecycle,
            clock,
            counters,
            self._tasks,
            self._loop_budget,
            clients_max=limits.clients_max,
            per_client_max=limits.leases_per_client_max,
            blocks_per_client_max=limits.leased_blocks_per_client_max,
        )
        self._leases.on_begin, self._leases.on_end = self._policy.leased, self._policy.released
        assert index.secret is not None and index.key_generations is not None, "a daemon opened it"
        self._key_generations = index.key_generations
        self._uploads = Uploads(
            self._lifecycle,
            self._evictor,
            dram,
            self._write_behind,
            clock,
            counters,
            self._loop_budget,
            self._admission,
            wait_s=limits.upload_wait_s,
            secret=index.secret.key,
        )
        self._reads = Reads(
            self._lifecycle,
            dram,
            self._promoter,
            clock,
            counters,
            executor,
            self._loop_budget,
            slots=limits.transfer_slots,
            frame_bytes=limits.frame_bytes,
        )
        self._in_place_reads = InPlaceReads(self._lifecycle, dram, self._promoter, clock, counters, executor)
        self._in_place_uploads = InPlaceUploads(self._uploads, dram, self._tasks, offered=limits.writes_in_place)
        self._scrub = Scrub(
            self._lifecycle, dram, clock, counters, executor, bytes_per_second=limits.scrub_bytes_per_second
        )
        self._pins = Pins(
            self._lifecycle,
            self._write_behind,
            clock,
            ttl_max_s=limits.pin_ttl_max_s,
            fraction_max=limits.pin_fraction_max,
        )
        self._requests = Requests(blocks, clock, limits.requests_remembered)
        self.boot_epoch = secrets.randbits(63) | 1
        self._tickets = Tickets(
            self._leases, blocks, self._requests, clock, self._loop_budget, boot_epoch=self.boot_epoch
        )
        self._explain = Explain(blocks, index, self._history, self._uploads.claims, clock, self._policy)
        self._lookup_counts = LookupCounts(blocks, index.layouts, self._explain, clock, counters)
        self._drain = Drain(blocks, self._uploads.claims, self._admission, self._write_behind, self._tasks, clock)
        self._gauges = Gauges(
            blocks, index.layouts, self._history, self._policy, self._promoter, self._writers, self._admission,
            self._uploads, self._drain, clock,
        )  # fmt: skip
        self._sessions = Sessions(index, self._lifecycle, clock, counters, self._tasks, self._layout, limits.session)
        self._hints = HintExchange(
            blocks,
            self._lifecycle.tails,
            dram,
            self._sessions,
            self._leases,
            self._policy,
            clock,
            counters,
            self._tasks,
            self._loop_budget,
            limits.hints,
        )
        self._trace = TraceRecorder(blocks, lambda: index.layouts, self._leases, clock, self._loop_budget)
        self.operators = Operators(
            blocks,
            index,
            self._lifecycle,
            counters,
            self._sessions,
            Listings(blocks, index.layouts, self._sessions, clock, self.boot_epoch),
            self._explain,
            self._requests,
            self._layout,
            self._pins,
            self._scrub,
            self._drain,
            self._trace,
            Policies(self._policy, blocks, counters, "lru" if policy is None else policy.name),
        )
        self._started_at_ms = clock.wall_ms()

    def start(self) -> None:
        """Begin the background work: eviction, write-behind, lease expiry, recency."""
        self._dram.start()
        self._evictor.start(self._write_behind)
        self._in_place_uploads.start()
        for writer in self._writers.values():
            writer.start()
        self._start_policy()
        self._tasks.start(self._expire_forever(), "lease expiry")
        self._tasks.start(self._flush_forever(), "recency flush")
        self._sessions.start()
        self._hints.start()

    def _start_policy(self) -> None:
        blocks, clock, counters = self._blocks, self._clock, self._counters
        bytes_per_s_max = self.limits.hints.bytes_per_s_max
        window = WindowPromotion(
            blocks, self._promoter, self._evictor, clock, counters, self._tasks, bytes_per_s_max=bytes_per_s_max
        )
        self._policy.start(
            self._evictor,
            window,
            lambda items: ReadAhead(
                items,
                blocks,
                self._dram,
                self._promoter,
                clock,
                counters,
                self._tasks,
                self._loop_budget,
                bytes_per_s_max=bytes_per_s_max,
            ),
            lambda policy: ShadowRun(
                blocks,
                policy,
                self._conditions(),
                self._block_tokens_of,
                lambda: self._promoter.bytes_per_s if self._promoter is not None else 0.0,
                clock,
                self._loop_budget,
            ),
            self._write_behind,
        )
        if self._first_policy is not None:
            self._policy.use(self._first_policy)

    async def stop(self) -> None:
        """Finish short work, write recency, stop the rest. No upload or load may run any more."""
        try:
            await self._lifecycle.flush_recency()
        except KVError as error:
            log.warning("use times were not written: %s", error.message)
        await self._sessions.stop()
        await self._policy.keep_learned()
        await self._tasks.stop()
        self._policy.close()

    @property
    def draining(self) -> bool:
        """Whether saves are refused."""
        return self._drain.is_draining

    @property
    def state_name(self) -> str:
        """The daemon's state: one of `STATES`. May be called from any thread."""
        return self._drain.state_name

    # Facts: plain values

    def is_attached(self, client_id: bytes) -> bool:
        return self._leases.is_attached(client_id)

    def wall_ms(self) -> int:
        """Now, by the store's clock."""
        return self._clock.wall_ms()

    @property
    def store_id(self) -> bytes:
        return self._index.store_id

    @property
    def tier_names(self) -> tuple[TierName, ...]:
        return tuple(self._lifecycle.tiers)

    @property
    def arena(self) -> SharedArena:
        """The arena, for clients on this host."""
        arena = self._dram.arena
        return SharedArena(
            not_shared_because=arena.not_shared_because,
            directory=str(arena.directory.absolute()),
            arena_id=arena.arena_id,
            capacity_bytes=arena.capacity_bytes,
            is_writable=not self._in_place_uploads.refused_because,
        )

    def facts(self) -> StoreFacts:
        """The values for the metrics. May be called from any thread."""
        index, set_aside = self._index, self._in_place_uploads.set_aside
        return StoreFacts(
            store_id=index.store_id,
            started_at_ms=self._started_at_ms,
            tiers=[self._tier_facts(name, tier) for name, tier in self._lifecycle.tiers.items()],
            index_map_bytes=index.map_sizes,
            index_used_bytes=index.used_sizes,
            blocks=self._blocks.live_count,
            layouts=len(index.layouts),
            clients=self._leases.client_count,
            leases=self._leases.count,
            uploads=self._uploads.claims.object_count,
            sessions=self._sessions.count,
            hint_streams=self._hints.stream_count,
            queued_requests=self._hints.queued_count,
            set_aside_bytes=sum(extent.size_bytes for extent in set_aside),
            set_aside_extents=len(set_aside),
            recordings=self._trace.stream_count,
            reported=dict(self._requests.reported),
        )

    def gauges(self) -> StoreGauges:
        """The values for the metrics that take a scan of all blocks. May be called from any thread."""
        return self._gauges.read()

    def _tier_facts(self, name: TierName, tier: Tier) -> TierFacts:
        is_dram = tier is self._dram
        position = self._blocks.position(name)
        writer = self._writers.get(self._blocks.tiers[position - 1]) if position else None
        return TierFacts(
            name=name,
            capacity_bytes=tier.capacity_bytes,
            configured_bytes=self._dram.configured_bytes if is_dram else tier.capacity_bytes,
            used_bytes=tier.used_bytes,
            refusing_because=tier.refusing_because or (writer.failing_because if writer is not None else ""),
            short_because=self._dram.short_because if is_dram else "",
            is_direct=self._slower[name].is_direct if name in self._slower else False,
        )

    def block_counts(self) -> dict[TierName, int]:
        """How many stored objects have a copy in each tier. Call it on the event loop, because it reads all rows."""
        blocks = self._blocks
        live = blocks.live[: blocks.row_end]
        return {tier: int((blocks.resident(tier) & live).sum()) for tier in self.tier_names}

    # Clients and layouts

    def attach(self, caller: Caller, name: str) -> Client:
        """A new client; detach it at its end. Raises InvalidRequest, Overloaded."""
        return self._leases.attach(caller, name)

    def detach(self, caller: Caller, client: Client) -> None:
        """End the client's leases and its other resources."""
        self._leases.detach(caller, client)

    async def open_layout(self, caller: Caller, layout: Layout) -> bool:
        """Open a layout. True if it is new."""
        if self._index.layout_id(layout.fingerprint) is not None:
            return False
        await self._index.put_layout(layout)
        return True

    def generation(self, caller: Caller, fingerprint: bytes) -> int:
        """The key generation of a layout for the caller's tenant. Raises UnknownLayout."""
        self._layout(fingerprint)
        return self._key_generations.of(caller.tenant.number, fingerprint)

    async def begin_generation(self, caller: Caller, fingerprint: bytes) -> int:
        """Begin a key generation; it is durable on return. Raises UnknownLayout, StorageFailed."""
        self._layout(fingerprint)
        begun = self._tasks.start_quietly(
            self._key_generations.begin(caller.tenant.number, fingerprint), "key generation"
        )
        return await asyncio.shield(begun)  # The caller's deadline must not interrupt it.

    def _block_tokens_of(self, layout_id: int) -> int:
        return self._index.layouts[layout_id].block_tokens

    def _layout(self, fingerprint: bytes) -> tuple[int, Layout]:
        layout_id = self._index.layout_id(fingerprint)
        if layout_id is None:
            raise UnknownLayout(
                f"no layout with fingerprint {fingerprint.hex() or '(empty)'} was opened here: call OpenLayout"
            )
        return layout_id, self._index.layouts[layout_id]

    # Lookups

    async def lookup(
        self,
        caller: Caller,
        fingerprint: bytes,
        shard: Shard | None,
        keys: Sequence[bytes],
        lease_ttl_s: float,
        request_id: str = "",
        parent_key: bytes = b"",
    ) -> Hit:
        """How many leading blocks are stored; leases them if `lease_ttl_s` is not 0. Waits only if there are many keys.

        With a `request_id`, the lookup and its result are noted for `explain`. With the `parent_key` of the first key,
        the answer has the tails of the last hit. Raises InvalidRequest, UnknownLayout, UnknownClient, Overloaded.
        """
        began_s = self._clock.monotonic_s()
        self._requests.check_id(request_id)
        if len(parent_key) not in (0, KEY_BYTES):
            raise InvalidRequest(f"parent_key has {len(parent_key)} bytes, not {KEY_BYTES}", field="parent_key")
        layout_id, layout = self._layout(fingerprint)
        wanted = Shard.whole(layout) if shard is None else shard.check(layout)
        found, held = PrefixMatch(), []
        parts = range(0, len(keys), _LOOKUP_PART)
        try:
            for start in parts:
                if len(parts) > 1:
                    await self._loop_budget.slot()
                part = keys[start : start + _LOOKUP_PART]
                more = match_prefix(self._blocks, part, layout_id, wanted)
                self._lifecycle.hold(more.held)  # The hits stay in place until all of them are leased.
                held.append(more.held)
                found.extend(more)
                if len(more.rows) < len(part):
                    break
            if len(parts) > 1:
                await self._loop_budget.slot()
            client = self._leases.client(caller) if lease_ttl_s else None
            hit = self._hit(client, layout, wanted, found, lease_ttl_s)
            self._note_lookup(request_id, caller, layout_id, wanted, keys, hit)
            if parent_key:
                newest_first = self._lifecycle.tails.newest_first(keys[hit.blocks - 1] if hit.blocks else parent_key)
                tails = match_tails(self._blocks, newest_first, caller.tenant, layout_id, wanted)
                hit = hit._replace(tails=tails)
            self._lookup_counts.note(layout_id, keys, found.rows, hit.runs, began_s)
            return hit
        finally:
            for rows in held:
                self._lifecycle.unhold(rows)

    def _hit(self, client: Client | None, layout: Layout, wanted: Shard, found: PrefixMatch, lease_ttl_s: float) -> Hit:
        lease, ttl_s = None, 0.0
        if len(found.rows):
            self._blocks.touch(found.held, self._clock.wall_ms())
            self._blocks.hits[found.held] += 1
            if client is not None:
                self._blocks.note_user(found.held, client.number)
                self._policy.looked_up(found.rows)
                ttl_s = min(lease_ttl_s, self.limits.lease_ttl_max_s)
                lease = self._leases.grant(client, layout, wanted, found.rows, found.parts, found.held, ttl_s)
        return Hit(len(found.rows), runs_of(self._blocks, found.rows), lease, ttl_s)

    def _note_lookup(
        self, request_id: str, caller: Caller, layout_id: int, wanted: Shard, keys: Sequence[bytes], hit: Hit
    ) -> None:
        self._trace.looked_up(caller, layout_id, keys, hit.lease, request_id)
        if request_id and keys:
            who = self._leases.name_of(caller.client)
            self._requests.note_lookup(
                request_id, self._index.layouts, layout_id, wanted, who, keys, hit.runs, hit.lease
            )

    # Leases

    async def _narrowed_lease(self, caller: Caller, lease_id: int, shard: Shard | None) -> Lease:
        """The caller's lease; with a shard, narrowed to that shard.

        Raises UnknownClient, LeaseExpired, LeaseNotYours, InvalidRequest.
        """
        lease = self._leases.get(caller, lease_id)
        if shard is None or shard == lease.shard:
            return lease
        part = await narrowed(self._blocks, lease, shard, self._loop_budget)
        self._leases.get(caller, lease_id)  # The lease may have ended meanwhile.
        return part

    def export_lease(self, caller: Caller, lease_id: int, ttl_s: float, adoptions: int) -> tuple[bytes, float]:
        """A ticket for the lease's blocks, and the seconds for which it holds them. Raises as `Tickets.export`.

        A ticket is made for a load that is about to come: blocks that DRAM lacks are promoted from now on.
        """
        ttl_s = self._granted(ttl_s, "ttl_ms is 0", "ttl_ms")
        ticket = self._tickets.export(caller, lease_id, ttl_s, adoptions)
        rows = self._leases.get(caller, lease_id).held_rows
        missing = rows[~self._blocks.lie_in(rows, self._blocks.first_tier)].tolist()
        if missing and self._promoter is not None:
            self._promoter.prefetch(missing, within_s=0.0)
        return ticket, ttl_s

    async def adopt(
        self, caller: Caller, ticket: bytes, fingerprint: bytes, shard: Shard | None, lease_ttl_s: float
    ) -> Adopted:
        """A lease of the caller's own on the blocks of a ticket. Raises as `Tickets.adopt`."""
        ttl_s = self._granted(lease_ttl_s, "lease_ttl_ms is 0", "lease_ttl_ms")
        lease = await self._tickets.adopt(caller, ticket, fingerprint, shard, ttl_s)
        return Adopted(lease, ttl_s, runs_of(self._blocks, lease.rows), self._blocks.token_count[lease.rows].tolist())

    def renew(self, caller: Caller, lease_id: int, ttl_s: float) -> float:
        """Make the lease end `ttl_s` from now, or after the longest allowed time. Returns the granted seconds.

        Raises InvalidRequest, UnknownClient, LeaseExpired, LeaseNotYours.
        """
        ttl_s = self._granted(ttl_s, "ttl_ms is 0; to end a lease, release it", "ttl_ms")
        self._leases.renew(caller, lease_id, ttl_s)
        return ttl_s

    def _granted(self, ttl_s: float, where_zero: str, field: str) -> float:
        if not ttl_s:
            raise InvalidRequest(where_zero, field=field)
        return min(ttl_s, self.limits.lease_ttl_max_s)

    async def release(self, caller: Caller, lease_id: int) -> None:
        """End a lease, and return once ended leases hold nothing any more. Raises LeaseNotYours."""
        self._leases.release(caller, lease_id)
        await self._leases.drain_ended()

    # Loading

    async def load(
        self,
        caller: Caller,
        lease_id: int,
        shard: Shard | None,
        blocks: Span,
        layers: Span,
        encode: Callable[[Part], F],
        send: Callable[[F], Awaitable[None]],
    ) -> None:
        """Send leased blocks, layer by layer, as frames that `encode` makes on a thread; `send` awaits the client.

        Raises InvalidRequest, UnknownClient, LeaseExpired, LeaseNotYours, Overloaded, ChecksumMismatch, StorageFailed;
        DeadlineExceeded if the client reads nothing for too long. Bytes that were sent before are right.
        """
        lease = await self._narrowed_lease(caller, lease_id, shard)
        which, parts = blocks.within(len(lease.rows), "block"), layers.within(lease.shard.layers, "layer")
        with self._requests.load(caller, lease, which, parts) as record, self._admission.loads.entered():
            async with aclosing(self._reads.run(caller, lease, which, parts, encode)) as frames:
                async for frame in frames:
                    await self._admission.taken(send(frame))
                    record.sent_bytes += len(frame)

    async def locate(
        self, caller: Caller, lease_id: int, shard: Shard | None, blocks: Span, *, verify: bool
    ) -> AsyncGenerator[Located | NotInPlace | int, None]:
        """The places of leased blocks in the arena, then the number of layers that are ready, until all are.

        The blocks stay in place until this is closed. Raises InvalidRequest, UnknownClient, LeaseExpired,
        LeaseNotYours, NotShared, Overloaded, ChecksumMismatch, StorageFailed.
        """
        lease = await self._narrowed_lease(caller, lease_id, shard)
        which, layers = blocks.within(len(lease.rows), "block"), range(lease.shard.layers)
        with (
            self._requests.load(caller, lease, which, layers, in_place=True) as record,
            self._admission.in_place_loads.entered(),
        ):
            async with aclosing(self._in_place_reads.run(caller, lease, which, verify=verify)) as steps:
                async for step in steps:
                    if isinstance(step, NotInPlace):
                        record.ends_as = "not_in_place"
                    elif isinstance(step, int):
                        record.ends_as = "done" if step == len(layers) else ""
                    yield step

    # Saving

    def incoming(self, caller: Caller, messages: AsyncIterator[T]) -> Incoming[T]:
        """The messages of a save, each within the time that a client may be idle."""
        return self._admission.incoming(messages)

    def save(self, caller: Caller, header: SaveHeader) -> Upload:
        """One save, for use with ``async with``: entering claims the blocks and waits for space; leaving without a
        commit abandons it.

        Raises Overloaded, Draining, UnknownLayout, UnknownClient, InvalidRequest; entering it IncompleteSave.
        """
        try:
            self._admission.saves.check()
        except Overloaded as error:
            raise self._refused(_keys_of(header), error) from None
        client, request = self._save_request(caller, header)
        return self._uploads.begin(caller, client, request)

    async def reserve(
        self, caller: Caller, reservation_id: int, header: SaveHeader, *, on_ssd: bool
    ) -> tuple[list[Place], dict[int, KVError]]:
        """Claim blocks that the client writes into the arena itself: their places, and why others were refused.

        Raises as `save`; NotShared, NoWriterLock.
        """
        client, request = self._save_request(caller, header)
        return await self._in_place_uploads.reserve(caller, reservation_id, client, request, on_ssd=on_ssd)

    async def commit(self, caller: Caller, reservation_id: int, checksums: NDArray[np.uint64]) -> SaveOutcome:
        """Make blocks visible that were written in place. `checksums`: u64, one per slice of the reserved blocks, in
        order.

        Raises UnknownClient, ReservationEnded, ReservationNotYours, InvalidRequest.
        """
        return await self._in_place_uploads.commit(caller, reservation_id, self._leases.client(caller), checksums)

    def abandon(self, caller: Caller, reservation_id: int) -> None:
        """The client writes no more, and abandons the blocks. Raises UnknownClient, ReservationNotYours."""
        self._in_place_uploads.abandon(caller, reservation_id, self._leases.client(caller))

    def _save_request(self, caller: Caller, header: SaveHeader) -> tuple[Client, SaveRequest]:
        """The client, and the blocks of its save. Raises Draining, UnknownLayout, UnknownClient, InvalidRequest."""
        fingerprint, shard, chains = header
        keys = _keys_of(header)
        if self.draining:
            raise self._refused(keys, Draining(f"the daemon is {self._drain.state_name} and accepts no new saves"))
        layout_id, layout = self._layout(fingerprint)
        client = self._leases.client(caller)
        part = Shard.whole(layout) if shard is None else shard.check(layout)
        self._admission.check_save(len(keys), part.layers)
        parents: list[bytes] = []
        counts: list[int] = []
        for chain in chains:
            if len(chain.parent_key) != KEY_BYTES:
                size = len(chain.parent_key)
                raise InvalidRequest(f"parent_key has {size} bytes, not {KEY_BYTES}", field="parent_key")
            if len(set(chain.keys)) != len(chain.keys):
                raise InvalidRequest("a key appears twice in one save", field="keys")
            self._trace.saved(caller, layout_id, *chain)
            parents += [chain.parent_key, *chain.keys[:-1]]
            full = len(chain.keys) - 1
            counts += [*[layout.block_tokens] * full, chain.last_block_tokens or layout.block_tokens]
        return client, SaveRequest(layout_id, layout, part, parents, keys, counts)

    def _refused(self, keys: Sequence[bytes], error: KVError) -> KVError:
        """The error with which a save of these blocks is refused; the history notes it."""
        self._history.note_keys(keys, Reason.REFUSED, error.reason)
        return error

    def report(self, caller: Caller, request_id: str, report: ReportRecord) -> None:
        """Note an engine's report of a request. Raises InvalidRequest."""
        self._requests.note_report(caller, request_id, report)
        self._policy.computed(report.computed_bytes_per_s)
        self._trace.reported(request_id, report)

    # Hints, moving and dropping

    def hints(self, caller: Caller) -> AbstractContextManager[HintStream]:
        """A stream of the client's hints. Replaces the client's earlier one. Raises UnknownClient."""
        return self._hints.open(caller)

    async def keys_of_sessions(self, caller: Caller, names: Sequence[tuple[bytes, str]]) -> tuple[list[bytes], int]:
        """All keys of these sessions, pairs of a fingerprint and an id, and how many sessions do not exist."""
        keys: list[bytes] = []
        missing = 0
        for name in names:
            await self._loop_budget.slot()
            manifest = self._sessions.peek(caller, *name)
            missing += manifest is None
            keys += [] if manifest is None else manifest.slices["key"].tolist()
        return keys, missing

    async def prefetch(self, caller: Caller, keys: Sequence[bytes], *, within_s: float, wait: bool) -> PrefetchOutcome:
        """Promote blocks to DRAM ahead of their load."""
        blocks = self._blocks
        wanted: list[int] = []
        missing = in_dram = 0
        for part in parts_of(list(dict.fromkeys(keys))):
            await self._loop_budget.slot()
            first = blocks.rows_of_keys(part)
            rows = [row for start in first.tolist() for row in blocks.shards_of(start)]
            is_absent = ~blocks.lie_in(np.array(rows, np.int64), blocks.first_tier)
            missing += int((first == NO_ROW).sum())
            in_dram += len(rows) - int(is_absent.sum())
            wanted += itertools.compress(rows, is_absent)
        if self._promoter is None or not wanted:
            return PrefetchOutcome(missing, in_dram, 0, len(wanted))
        await self._promoter.promote(wanted, within_s=within_s, wait=wait)
        if not wait:
            return PrefetchOutcome(missing, in_dram, len(wanted), 0)
        promoted = int(blocks.lie_in(np.array(wanted), blocks.first_tier).sum())
        return PrefetchOutcome(missing, in_dram, promoted, len(wanted) - promoted)

    async def evict(self, caller: Caller, keys: Sequence[bytes], tier: TierName) -> EvictOutcome:
        """Drop copies from one tier. Leased, busy and pinned copies stay."""
        blocks = self._blocks
        evicted = held = missing = 0
        for part in parts_of(list(dict.fromkeys(keys))):
            rows: list[int] = []
            for first in blocks.rows_of_keys(part).tolist():
                copies = [row for row in blocks.shards_of(first) if blocks.is_resident(row, tier)]
                missing += not copies
                now_ms = self._clock.wall_ms()
                free = [
                    row for row in copies if self._lifecycle.is_free(row) and not blocks.pin_keeps(row, tier, now_ms)
                ]
                held += len(copies) - len(free)
                rows += free
            if tier == blocks.first_tier:
                self._policy.evicted(np.array(rows, np.int64))
            await self._lifecycle.evict(rows, tier)
            evicted += len(rows)
        return EvictOutcome(evicted, held, missing)

    # Sessions

    async def append_turn(
        self, caller: Caller, fingerprint: bytes, session_id: str, expected_revision: int, turn: SessionAppend
    ) -> StoredSession:
        """Add a turn; revision 0 begins the session. Returns once it is on disk.

        Raises InvalidRequest, UnknownLayout, SessionNotFound, SessionChanged, SessionsFull, StorageFailed, IndexFull.
        """
        stored = await self._sessions.append(caller, fingerprint, session_id, expected_revision, turn)
        self._trace.appended(turn)
        return self._sessions.stored(stored)

    async def truncate_session(
        self,
        caller: Caller,
        fingerprint: bytes,
        session_id: str,
        expected_revision: int,
        keep: Sequence[tuple[int, int]],
    ) -> StoredSession:
        """Keep only these token ranges, (first, count) each. Raises as `append_turn`."""
        return self._sessions.stored(
            await self._sessions.truncate(caller, fingerprint, session_id, expected_revision, keep)
        )

    async def fork_session(
        self, caller: Caller, fingerprint: bytes, session_id: str, new_id: str, expected_revision: int
    ) -> StoredSession:
        """A copy under `new_id`; `expected_revision` 0 accepts any revision. Raises as `append_turn`."""
        return self._sessions.stored(
            await self._sessions.fork(caller, fingerprint, session_id, new_id, expected_revision)
        )

    async def end_session(self, caller: Caller, fingerprint: bytes, session_id: str) -> bool:
        """Delete a session. False if there was none."""
        return await self._sessions.end(caller, fingerprint, session_id)

    def session(self, caller: Caller, fingerprint: bytes, session_id: str, shard: Shard | None) -> SessionHistory:
        """A session, and how much of it is usable; counts as a use. Raises UnknownLayout, SessionNotFound."""
        _, layout = self._layout(fingerprint)
        wanted = Shard.whole(layout) if shard is None else shard.check(layout)
        return self._sessions.history(self._sessions.get(caller, fingerprint, session_id), wanted)

    # The daemon's end

    def begin_stop(self) -> None:
        """Refuse saves permanently. Blocks that are only in DRAM stay there, and the next start finds them."""
        self._drain.begin_stop()
        self._trace.stop()

    async def quiet(self) -> None:
        """Wait until no load and no save runs."""
        await self._drain.quiet()

    # Time

    async def _expire_forever(self) -> None:
        while True:
            await self._clock.sleep(_EXPIRE_EVERY_S)
            while self._leases.expire():
                await self._loop_budget.slot()

    async def _flush_forever(self) -> None:
        while True:
            await self._clock.sleep(self.limits.recency_flush_s)
            try:
                await self._lifecycle.flush_recency()
            except KVError as error:
                log.warning("use times were not written: %s", error.message)


def _keys_of(header: SaveHeader) -> list[bytes]:
    return [key for chain in header.chains for key in chain.keys]
