"""The values that the store's verbs take and return.

Listeners and metrics import these, `Caller` and the facade (``store/store.py``), and nothing else of the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvservice.blocks import TierName
from kvservice.index.session_records import Manifest as Manifest
from kvservice.placement.shadow import Found as Found
from kvservice.policy.base import Hint as Hint
from kvservice.store.hints.exchange import HintStream as HintStream
from kvservice.store.hints.exchange import Nearness as Nearness
from kvservice.store.hints.exchange import QueuedReadiness as QueuedReadiness
from kvservice.store.hints.queue_mirror import HintSubject as HintSubject
from kvservice.store.leases import Client as Client
from kvservice.store.leases import Lease as Lease
from kvservice.store.miss_reasons import MissEvent as MissEvent
from kvservice.store.mover.shadow_run import ShadowFacts as ShadowFacts
from kvservice.store.operations.drain import DrainProgress as DrainProgress
from kvservice.store.operations.explain import MISS_REASONS as MISS_REASONS
from kvservice.store.operations.explain import ExplainedBlock as ExplainedBlock
from kvservice.store.operations.explain import ExplainedLookup as ExplainedLookup
from kvservice.store.operations.explain import ExplainedRequest as ExplainedRequest
from kvservice.store.operations.explain import ExplainedSession as ExplainedSession
from kvservice.store.operations.explain import Missing as Missing
from kvservice.store.operations.explain import OtherLayout as OtherLayout
from kvservice.store.operations.explain import TierPlace as TierPlace
from kvservice.store.operations.explain import Worth as Worth
from kvservice.store.operations.gauges import STATES as STATES
from kvservice.store.operations.gauges import StoreGauges as StoreGauges
from kvservice.store.operations.listings import BlockFacts as BlockFacts
from kvservice.store.operations.operators import DISCARD_KEYS_MAX as DISCARD_KEYS_MAX
from kvservice.store.operations.pins import PIN_KEYS_MAX as PIN_KEYS_MAX
from kvservice.store.operations.pins import PinOutcome as PinOutcome
from kvservice.store.operations.pins import UnpinOutcome as UnpinOutcome
from kvservice.store.operations.policies import PolicyFacts as PolicyFacts
from kvservice.store.operations.requests import LoadRecord as LoadRecord
from kvservice.store.operations.requests import ReportRecord as ReportRecord
from kvservice.store.operations.scrub import ScrubProgress as ScrubProgress
from kvservice.store.operations.trace import TraceStep as TraceStep
from kvservice.store.prefix_match import TAILS_MAX as TAILS_MAX
from kvservice.store.prefix_match import Run as Run
from kvservice.store.prefix_match import Tail as Tail
from kvservice.store.sessions.manifests import KEEP_RANGES_MAX as KEEP_RANGES_MAX
from kvservice.store.sessions.manifests import SessionAppend as SessionAppend
from kvservice.store.sessions.manifests import StoredSession as StoredSession
from kvservice.store.sessions.sessions import POSITIONS_MAX as POSITIONS_MAX
from kvservice.store.sessions.sessions import SessionHistory as SessionHistory
from kvservice.store.transfers.admission import SAVE_BLOCKS_MAX as SAVE_BLOCKS_MAX
from kvservice.store.transfers.admission import SAVE_SLICES_MAX as SAVE_SLICES_MAX
from kvservice.store.transfers.admission import Incoming as Incoming
from kvservice.store.transfers.in_place_reads import Located as Located
from kvservice.store.transfers.in_place_reads import NotInPlace as NotInPlace
from kvservice.store.transfers.reads import Part as Part
from kvservice.store.transfers.reads import Span as Span
from kvservice.store.transfers.upload import Place as Place
from kvservice.store.transfers.upload import SaveOutcome as SaveOutcome
from kvservice_api.layout import Shard


class SaveChain(NamedTuple):
    """Consecutive blocks of one chain, all full except the last (`last_block_tokens` 0: full too)."""

    parent_key: bytes
    keys: Sequence[bytes]
    last_block_tokens: int


class SaveHeader(NamedTuple):
    """The blocks of a save: those of its chains, one after the other. Without a shard, whole blocks."""

    fingerprint: bytes
    shard: Shard | None
    chains: Sequence[SaveChain]


class Hit(NamedTuple):
    """The answer to a lookup. `runs` are over the leading hits; `ttl_s` is the granted time of the lease; `tails`
    continue the last hit.
    """

    blocks: int
    runs: list[Run]
    lease: Lease | None
    ttl_s: float = 0.0
    tails: Sequence[Tail] = ()


class Adopted(NamedTuple):
    """An adopted lease, its granted time, the tiers of its blocks, and the token count of each."""

    lease: Lease
    ttl_s: float
    runs: list[Run]
    token_counts: list[int]


class PrefetchOutcome(NamedTuple):
    missing: int
    in_dram: int
    promoted: int
    failed: int


class EvictOutcome(NamedTuple):
    evicted: int
    held: int
    missing: int


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
    """Plain numbers at one time."""

    store_id: bytes
    started_at_ms: int
    tiers: Sequence[TierFacts]
    index_map_bytes: dict[TierName, int]  # Of each tier's index.
    index_used_bytes: dict[TierName, int]
    blocks: int
    layouts: int
    clients: int
    leases: int
    uploads: int
    sessions: int
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
