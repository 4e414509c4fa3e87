"""The values that the store's verbs take and return.

Listeners and metrics import these, `Caller` and `BlockStore`, and nothing else of the store.
"""

from __future__ import annotations

from kvservice.index.session_records import SLICE as SLICE
from kvservice.index.session_records import Manifest as Manifest
from kvservice.placement.shadow import Found as Found
from kvservice.policy.base import Hint as Hint
from kvservice.store.hints.queue_mirror import HintSubject as HintSubject
from kvservice.store.hints.stream import HintStream as HintStream
from kvservice.store.hints.stream import Nearness as Nearness
from kvservice.store.hints.stream import QueuedReadiness as QueuedReadiness
from kvservice.store.leases import Client as Client
from kvservice.store.leases import Lease as Lease
from kvservice.store.lookups import Hit as Hit
from kvservice.store.miss_reasons import MissEvent as MissEvent
from kvservice.store.mover.requested_moves import EvictOutcome as EvictOutcome
from kvservice.store.mover.requested_moves import PrefetchOutcome as PrefetchOutcome
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
from kvservice.store.operations.listings import LayoutFacts as LayoutFacts
from kvservice.store.operations.operators import DISCARD_KEYS_MAX as DISCARD_KEYS_MAX
from kvservice.store.operations.operators import ClientFacts as ClientFacts
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
from kvservice.store.sessions.manifests import SessionContent as SessionContent
from kvservice.store.sessions.manifests import StoredSession as StoredSession
from kvservice.store.sessions.sessions import POSITIONS_MAX as POSITIONS_MAX
from kvservice.store.sessions.sessions import SessionHistory as SessionHistory
from kvservice.store.status import SharedArena as SharedArena
from kvservice.store.status import StoreFacts as StoreFacts
from kvservice.store.status import TierFacts as TierFacts
from kvservice.store.tickets import Adopted as Adopted
from kvservice.store.transfers.admission import SAVE_BLOCKS_MAX as SAVE_BLOCKS_MAX
from kvservice.store.transfers.admission import SAVE_SLICES_MAX as SAVE_SLICES_MAX
from kvservice.store.transfers.admission import Incoming as Incoming
from kvservice.store.transfers.filled_uploads import FilledUpload as FilledUpload
from kvservice.store.transfers.in_place_reads import Located as Located
from kvservice.store.transfers.in_place_reads import NotInPlace as NotInPlace
from kvservice.store.transfers.leased_bytes import LayerSlice as LayerSlice
from kvservice.store.transfers.leased_bytes import Part as Part
from kvservice.store.transfers.reads import DamagedSlice as DamagedSlice
from kvservice.store.transfers.reads import Span as Span
from kvservice.store.transfers.received_bytes import ReceivedBytes as ReceivedBytes
from kvservice.store.transfers.save_request import Place as Place
from kvservice.store.transfers.save_request import SaveOutcome as SaveOutcome
from kvservice.store.transfers.saves import SaveChain as SaveChain
from kvservice.store.transfers.saves import SaveHeader as SaveHeader
