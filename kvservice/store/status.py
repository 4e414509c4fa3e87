"""The values that metrics, operators and clients read about the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvservice.blocks import BlockTable, TierName
from kvservice.clock import Clock
from kvservice.index.block_index import BlockIndex
from kvservice.store.hints.exchange import HintExchange
from kvservice.store.leases import Leases
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.operations.drain import Drain
from kvservice.store.operations.requests import Requests
from kvservice.store.operations.trace import TraceRecorder
from kvservice.store.sessions.sessions import Sessions
from kvservice.store.transfers.admission import Claims
from kvservice.store.transfers.in_place_uploads import InPlaceUploads
from kvservice.tiers.base import DurableTier
from kvservice.tiers.dram import DramTier


@dataclass(frozen=True, slots=True)
class TierFacts:
    """One tier, and its index. Sizes in bytes; `refusing_because` and `short_because` are empty without a problem."""

    name: TierName
    capacity_bytes: int
    configured_bytes: int  # The configured size; `short_because` says why the tier is smaller.
    used_bytes: int
    refusing_because: str
    short_because: str
    is_direct: bool  # Whether I/O bypasses the page cache.


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """Plain values at one time."""

    store_id: bytes
    started_at_ms: int
    is_draining: bool  # Whether saves are refused.
    tiers: Sequence[TierFacts]
    index_map_bytes: dict[TierName, int]  # Of each tier's index.
    index_used_bytes: dict[TierName, int]
    blocks: int
    layouts: int
    layouts_max: int
    clients: int
    clients_max: int
    leases: int
    uploads: int
    sessions: int
    sessions_max: int
    hint_streams: int
    queued_requests: int  # In the queues that hints describe.
    set_aside_bytes: int
    set_aside_extents: int
    recordings: int
    reported: dict[tuple[str, str], int]  # (plan, outcome) -> number of reported requests.


@dataclass(frozen=True, slots=True)
class SharedArena:
    """The arena, for clients on this host. `not_shared_because` is empty if they may map it."""

    not_shared_because: str
    directory: str
    arena_id: bytes
    capacity_bytes: int
    is_writable: bool


class Status:
    def __init__(
        self,
        blocks: BlockTable,
        dram: DramTier,
        slower: Mapping[TierName, DurableTier],
        writers: Mapping[TierName, WriteBehind],
        index: BlockIndex,
        clock: Clock,
        *,
        leases: Leases,
        claims: Claims,
        in_place_uploads: InPlaceUploads,
        sessions: Sessions,
        hints: HintExchange,
        requests: Requests,
        trace: TraceRecorder,
        drain: Drain,
    ) -> None:
        """`writers` are by the tier that each copies from."""
        self._blocks = blocks
        self._dram = dram
        self._slower = slower
        self._writers = writers
        self._index = index
        self._leases = leases
        self._claims = claims
        self._in_place_uploads = in_place_uploads
        self._sessions = sessions
        self._hints = hints
        self._requests = requests
        self._trace = trace
        self._drain = drain
        self._started_at_ms = clock.wall_ms()

    def facts(self) -> StoreFacts:
        """The values for the metrics. May be called from any thread."""
        index, set_aside = self._index, self._in_place_uploads.set_aside
        return StoreFacts(
            store_id=index.store_id,
            started_at_ms=self._started_at_ms,
            is_draining=self._drain.is_draining,
            tiers=[self._dram_facts(), *(self._durable_facts(name, tier) for name, tier in self._slower.items())],
            index_map_bytes=index.map_sizes,
            index_used_bytes=index.used_sizes,
            blocks=self._blocks.live_count,
            layouts=len(index.layouts),
            layouts_max=index.layout_entries.count_max,
            clients=self._leases.client_count,
            clients_max=self._leases.clients_max,
            leases=self._leases.count,
            uploads=self._claims.object_count,
            sessions=self._sessions.count,
            sessions_max=self._sessions.limits.sessions_max,
            hint_streams=self._hints.stream_count,
            queued_requests=self._hints.queued_count,
            set_aside_bytes=sum(extent.size_bytes for extent in set_aside),
            set_aside_extents=len(set_aside),
            recordings=self._trace.stream_count,
            reported=dict(self._requests.reported),
        )

    def _dram_facts(self) -> TierFacts:
        dram = self._dram
        return TierFacts(
            name=self._blocks.first_tier,
            capacity_bytes=dram.capacity_bytes,
            configured_bytes=dram.configured_bytes,
            used_bytes=dram.used_bytes,
            refusing_because=dram.refusing_because,
            short_because=dram.short_because,
            is_direct=False,
        )

    def _durable_facts(self, name: TierName, tier: DurableTier) -> TierFacts:
        writer = self._writers[self._blocks.tiers[self._blocks.position(name) - 1]]
        return TierFacts(
            name=name,
            capacity_bytes=tier.capacity_bytes,
            configured_bytes=tier.capacity_bytes,
            used_bytes=tier.used_bytes,
            refusing_because=tier.refusing_because or writer.failing_because,
            short_because="",
            is_direct=tier.is_direct,
        )

    def block_counts(self) -> dict[TierName, int]:
        """How many stored objects have a copy in each tier. Call it on the event loop, because it reads all rows."""
        blocks = self._blocks
        live = blocks.live[: blocks.row_end]
        return {tier: int((blocks.resident(tier) & live).sum()) for tier in blocks.tiers}

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
