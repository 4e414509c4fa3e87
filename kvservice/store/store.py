"""The store's assembly: which part gets which other part, and their common start and stop.

The public parts have the operations of clients and operators. The first argument of an operation is its caller. Call
everything on the event loop's thread, except `Status.facts`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from kvservice.blocks import BlockTable, TierName
from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.index.block_index import BlockIndex
from kvservice.policy import Placement
from kvservice.policy.items import Conditions
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.hints.exchange import HintExchange, HintLimits
from kvservice.store.hints.placement import WindowPromotion
from kvservice.store.layouts import Layouts
from kvservice.store.leases import Leases
from kvservice.store.lookups import Lookups
from kvservice.store.miss_reasons import MissReasons
from kvservice.store.mover.active_policy import ActivePolicy
from kvservice.store.mover.evictor import Evictor, Watermarks
from kvservice.store.mover.item_ranking import ItemRanking
from kvservice.store.mover.learned_counts import LearnedCounts
from kvservice.store.mover.promoter import Promoter
from kvservice.store.mover.read_ahead import ReadAhead
from kvservice.store.mover.relocation import Relocation, relocate
from kvservice.store.mover.requested_moves import RequestedMoves
from kvservice.store.mover.shadow_run import ShadowRun
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.operations.drain import Drain
from kvservice.store.operations.explain import Explain
from kvservice.store.operations.gauges import Gauges
from kvservice.store.operations.listings import Listings
from kvservice.store.operations.lookup_counts import LookupCounts
from kvservice.store.operations.operators import Operators
from kvservice.store.operations.pins import Pins
from kvservice.store.operations.policies import Policies
from kvservice.store.operations.requests import Requests
from kvservice.store.operations.scrub import Scrub
from kvservice.store.operations.trace import TraceRecorder
from kvservice.store.sessions.sessions import SessionLimits, Sessions
from kvservice.store.status import Status
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice.store.tickets import Tickets
from kvservice.store.transfers.admission import Admission
from kvservice.store.transfers.in_place_reads import InPlaceReads
from kvservice.store.transfers.in_place_uploads import InPlaceUploads
from kvservice.store.transfers.loads import Loads
from kvservice.store.transfers.reads import Reads
from kvservice.store.transfers.saves import Saves
from kvservice.store.transfers.upload import Uploads
from kvservice.store.transfers.verification import Verification
from kvservice.tiers.base import DurableTier, Tier
from kvservice.tiers.dram import DramTier
from kvservice_api.errors import KVError

log = logging.getLogger(__name__)

_SSD_BYTES_PER_S = float(2**30)  # Until it is measured.


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """The limits of the store, besides the tiers' capacities. Times in seconds."""

    clients_max: int = 1024
    leases_per_client_max: int = 4096
    leased_blocks_per_client_max: int = 1 << 18
    lease_ttl_max_s: float = 300.0
    frame_bytes: int = 1 << 20
    transfer_slots: int = 4
    writes_in_flight: int = 4  # Into each drive of the SSD tier, and into each tier below it.
    reads_in_flight: int = 8  # For each drive of the SSD tier.
    ssd_drives: int = 1
    read_bytes: int = 4 << 20
    write_bytes: int = 4 << 20
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
        self.limits = limits
        self.clock = clock
        self.store_id = index.store_id
        self.tier_names = tuple(blocks.tiers)
        self.boot_epoch = secrets.randbits(63) | 1
        self._blocks = blocks
        self._dram = dram
        self._index = index
        self._counters = counters
        self._tasks = tasks = Tasks()
        self._loop_budget = loop_budget = LoopBudget()
        history = MissReasons(clock, 0) if history is None else history
        assert index.secret is not None, "a daemon opened it"

        # Blocks, and their places

        tiers: dict[TierName, Tier] = dict(zip(blocks.tiers, (dram, *slower.values()), strict=True))
        self._lifecycle = lifecycle = BlockLifecycle(blocks, tiers, index, counters, tasks, history, clock)
        self.layouts = Layouts(index, tasks)
        self._used_share = 1 - watermarks[blocks.first_tier].high  # Else a policy always fills what is to be kept free.
        self._ssd_bytes = tiers[blocks.tiers[1]].capacity_bytes if slower else 0
        self._first_policy = policy
        self._policy = ActivePolicy(
            blocks,
            self._conditions,
            index.block_tokens,
            clock,
            counters,
            tasks,
            LearnedCounts(None) if learned is None else learned,
        )
        self._evictor = Evictor(
            lifecycle,
            self._policy,
            clock,
            tasks,
            loop_budget,
            watermarks={tier: watermarks[tier] for tier in tiers},
            wait_s=limits.reserve_wait_s,
        )
        self._writers = self._write_behinds(slower)
        self._write_behind = self._writers.get(blocks.first_tier)
        self._promoter: Promoter | None = None
        if self._write_behind is not None:
            self._promoter = Promoter(
                lifecycle,
                self._evictor,
                dram,
                clock,
                counters,
                tasks,
                loop_budget,
                write_behind=self._write_behind,
                reads_in_flight=limits.reads_in_flight,
                piece_bytes=limits.read_bytes,
            )
        self.moves = RequestedMoves(blocks, lifecycle, self._promoter, self._policy, clock, loop_budget)

        # Clients, leases and lookups

        self.leases = leases = Leases(
            lifecycle,
            clock,
            counters,
            tasks,
            loop_budget,
            clients_max=limits.clients_max,
            per_client_max=limits.leases_per_client_max,
            blocks_per_client_max=limits.leased_blocks_per_client_max,
            ttl_max_s=limits.lease_ttl_max_s,
        )
        leases.on_begin, leases.on_end = self._policy.leased, self._policy.released
        self._requests = requests = Requests(blocks, clock, limits.requests_remembered)
        self._trace = trace = TraceRecorder(blocks, lambda: index.layouts, leases, clock, loop_budget)
        self.tickets = Tickets(leases, blocks, requests, self._promoter, clock, loop_budget, boot_epoch=self.boot_epoch)
        # Transfers

        admission = Admission(
            clock,
            loads_max=limits.loads_max,
            saves_max=limits.saves_max,
            slots=limits.transfer_slots,
            idle_s=limits.transfer_idle_s,
            frame_bytes=limits.frame_bytes,
        )
        self._reads = Reads(
            lifecycle,
            dram,
            self._promoter,
            clock,
            counters,
            executor,
            loop_budget,
            slots=limits.transfer_slots,
            frame_bytes=limits.frame_bytes,
        )
        verification = Verification(
            lifecycle,
            dram,
            clock,
            counters,
            tasks,
            executor,
            is_idle=lambda: not (leases.count or self._uploads.claims.object_count),
        )
        in_place_reads = InPlaceReads(lifecycle, dram, self._promoter, clock, counters, verification)
        self.loads = Loads(blocks, leases, requests, admission, self._reads, in_place_reads, loop_budget)
        self._uploads = uploads = Uploads(
            lifecycle,
            self._evictor,
            dram,
            self._write_behind,
            verification,
            clock,
            counters,
            loop_budget,
            admission,
            wait_s=limits.upload_wait_s,
            secret=index.secret.key,
        )
        self._in_place_uploads = in_place = InPlaceUploads(uploads, dram, tasks, offered=limits.writes_in_place)
        self.drain = drain = Drain(blocks, uploads.claims, admission, self._write_behind, tasks, clock)
        self.saves = Saves(index, leases, admission, drain, uploads, in_place, trace, history)
        self._explain = explain = Explain(blocks, index, history, uploads.claims, clock, self._policy)
        lookup_counts = LookupCounts(blocks, index.layouts, explain, counters)
        self.lookups = Lookups(
            blocks, index, lifecycle, leases, self._policy, requests, trace, clock, lookup_counts, loop_budget
        )

        # Sessions and hints

        self.sessions = sessions = Sessions(
            index, lifecycle, clock, counters, tasks, loop_budget, trace, limits.session
        )
        self.hints = hints = HintExchange(
            blocks,
            lifecycle.tails,
            dram,
            sessions,
            leases,
            self._policy,
            clock,
            counters,
            tasks,
            loop_budget,
            limits.hints,
        )

        # Operators and metrics

        self.pins = Pins(
            lifecycle,
            self._write_behind,
            clock,
            ttl_max_s=limits.pin_ttl_max_s,
            fraction_max=limits.pin_fraction_max,
        )
        self.policies = Policies(self._policy, blocks, counters, "lru" if policy is None else policy.name)
        self.scrub = Scrub(lifecycle, dram, clock, counters, executor, bytes_per_second=limits.scrub_bytes_per_second)
        listings = Listings(blocks, index.layouts, sessions, clock, self.boot_epoch)
        self.operators = Operators(
            blocks,
            index,
            lifecycle,
            counters,
            sessions,
            listings,
            explain,
            requests,
            trace,
            leases,
            hints,
            loop_budget,
        )
        self.status = Status(
            blocks,
            dram,
            slower,
            self._writers,
            index,
            clock,
            leases=leases,
            claims=uploads.claims,
            in_place_uploads=in_place,
            sessions=sessions,
            hints=hints,
            requests=requests,
            trace=trace,
            drain=drain,
        )
        self.gauges = Gauges(
            blocks,
            index.layouts,
            history,
            self._policy,
            self._promoter,
            self._writers,
            admission,
            uploads,
            drain,
            clock,
        )

    def _write_behinds(self, slower: Mapping[TierName, DurableTier]) -> dict[TierName, WriteBehind]:
        """One into each of these tiers, by the tier that it copies from: the tier above."""
        blocks = self._blocks
        writers: dict[TierName, WriteBehind] = {}
        limits, following = self.limits, None
        for name, target in reversed(list(slower.items())):
            above = blocks.tiers[blocks.position(name) - 1]
            writers[above] = following = WriteBehind(
                self._lifecycle,
                self._evictor,
                self._dram,
                self.clock,
                self._counters,
                self._tasks,
                self._loop_budget,
                ranking=self._policy,
                above=above,
                target=target,
                following=following,
                writes_in_flight=limits.writes_in_flight * (limits.ssd_drives if above == blocks.first_tier else 1),
                piece_bytes=self.limits.write_bytes,
            )
        return writers

    # What policies are given

    def _conditions(self) -> Conditions:
        return Conditions(int(self._dram.capacity_bytes * self._used_share), self._ssd_bytes, _SSD_BYTES_PER_S)

    def _read_ahead(self, items: ItemRanking) -> ReadAhead:
        return ReadAhead(
            items,
            self._blocks,
            self._dram,
            self._promoter,
            self.clock,
            self._counters,
            self._tasks,
            self._loop_budget,
            bytes_per_s_max=self.limits.hints.bytes_per_s_max,
        )

    def _shadow_run(self, policy: Placement) -> ShadowRun:
        return ShadowRun(
            self._blocks,
            policy,
            self._conditions(),
            self._index.block_tokens,
            lambda: self._promoter.bytes_per_s if self._promoter is not None else 0.0,
            self.clock,
            self._loop_budget,
        )

    # Start and stop

    async def relocate(self, tier: TierName) -> Relocation:
        """Move the blocks of a tier that shrinks into its new capacity. Before `start`. Raises StorageFailed."""
        return await relocate(self._lifecycle, tier)

    def start(self) -> None:
        """Begin the background work: eviction, write-behind, lease expiry, recency."""
        self._dram.start()
        self._evictor.start(self._write_behind)
        self._in_place_uploads.start()
        for writer in self._writers.values():
            writer.start()
        window = WindowPromotion(
            self._blocks,
            self._promoter,
            self._evictor,
            self.clock,
            self._counters,
            self._tasks,
            bytes_per_s_max=self.limits.hints.bytes_per_s_max,
        )
        self._policy.start(self._evictor, window, self._read_ahead, self._shadow_run, self._write_behind)
        if self._first_policy is not None:
            self._policy.use(self._first_policy)
        self.leases.start()
        self._tasks.start(self._flush_forever(), "recency flush")
        self.sessions.start()
        self.hints.start()

    def begin_stop(self) -> None:
        """Refuse saves permanently. Blocks that are only in DRAM stay there, and the next start finds them."""
        self.drain.begin_stop()
        self._trace.stop()

    async def stop(self) -> None:
        """Finish short work, write recency, stop the rest. No upload or load may run any more."""
        await self._flush_recency()
        await self.sessions.stop()
        await self._policy.keep_learned()
        await self._tasks.stop()
        self._policy.close()

    async def _flush_forever(self) -> None:
        while True:
            await self.clock.sleep(self.limits.recency_flush_s)
            await self._flush_recency()

    async def _flush_recency(self) -> None:
        try:
            await self._lifecycle.flush_recency()
        except KVError as error:
            log.warning("use times were not written: %s", error.message)
