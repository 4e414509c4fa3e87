"""Explains where a block is, and why a request was a miss, from the block table, the history and the requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum, auto
from typing import NamedTuple

import numpy as np

from kvservice.blocks import NO_ROW, BlockTable, TierName
from kvservice.clock import Clock
from kvservice.index.block_index import BlockIndex, Emptied
from kvservice.store.caller import Caller
from kvservice.store.miss_reasons import MissEvent, MissReasons, Reason
from kvservice.store.mover.active_policy import ActivePolicy
from kvservice.store.mover.ranking import Valuation
from kvservice.store.operations.listings import BlockFacts, begin_with, block_facts
from kvservice.store.operations.requests import FirstMiss, LookupRecord, ReportRecord, RequestRecord
from kvservice.store.sessions.sessions import SessionHistory
from kvservice.store.transfers.admission import Claims
from kvservice_api.errors import BlockNotFound, InvalidRequest
from kvservice_api.layout import LayerGroup, Layout, Rotary


class Arrival(Enum):
    """How a copy got into a tier."""

    SAVED = auto()
    PROMOTED = auto()
    HINTED = auto()  # Promoted because of a hint.
    WRITTEN_BEHIND = auto()
    KEPT = auto()  # It was stored when the daemon started.


class TierPlace(NamedTuple):
    """A copy of an object. `since_ms` is 0 if it was stored before the daemon's start."""

    tier: TierName
    arrival: Arrival
    since_ms: int


class Worth(NamedTuple):
    """What a block is worth in each tier to the policy of that name; no values if the policy does not know it."""

    policy: str
    values: Sequence[Valuation]


class Miss(Enum):
    """Why a block is a miss."""

    NEVER_STORED = auto()  # In the time that the history covers.
    DROPPED_AT_SAVE = auto()
    EVICTED = auto()
    EXPIRED = auto()
    DISCARDED = auto()
    QUARANTINED = auto()
    OTHER_LAYOUT = auto()
    LOST_IN_RESTART = auto()
    NEVER_STORED_OR_LOST = auto()  # A restart emptied DRAM, and its former content is not known.
    IN_PART = auto()  # Only other shards of it are stored.
    BEING_SAVED = auto()


MISS_REASONS = tuple(miss.name.lower() for miss in Miss)
_MISS_OF = {
    Reason.REFUSED: Miss.DROPPED_AT_SAVE,
    Reason.ABANDONED: Miss.DROPPED_AT_SAVE,
    Reason.EVICTED: Miss.EVICTED,
    Reason.EVICTED_ON_REQUEST: Miss.EVICTED,
    Reason.DISCARDED: Miss.DISCARDED,
    Reason.QUARANTINED: Miss.QUARANTINED,
    Reason.LOST: Miss.LOST_IN_RESTART,
    Reason.EXPIRED: Miss.EXPIRED,
}
assert set(_MISS_OF) == set(Reason)
_EVICTIONS = (Reason.EVICTED, Reason.EVICTED_ON_REQUEST)


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a block was a miss, at one time. `event` is its last event in the history, if any."""

    key: bytes
    why: Miss
    event: MissEvent | None
    remembers_since_ms: int
    dram_emptied: Emptied | None
    stored_since_ms: int = 0  # For a request's miss: when the block was stored after it; else 0.


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """A layout of the same model with stored blocks, and the fields in which it differs: (stored, requested)."""

    layout: Layout
    differs: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ExplainedBlock:
    """A block's stored shards with their places; or why it is a miss, if it has none."""

    shards: Sequence[tuple[BlockFacts, Sequence[TierPlace]]]
    events: Sequence[MissEvent]
    missing: Missing | None
    remembers_since_ms: int
    worth: Worth = field(default_factory=lambda: Worth("", ()))  # To the policy: of the first shard.


@dataclass(frozen=True, slots=True)
class ExplainedLookup:
    record: LookupRecord
    layout: Layout
    missing: Missing | None  # The first missing block; None if all were stored.
    other_layouts: Sequence[OtherLayout]


@dataclass(frozen=True, slots=True)
class ExplainedSession:
    """`missing` is why the first unusable slice is a miss; None if all are usable.

    `left_dram` is the first usable slice that DRAM has no copy of, with the eviction from there, if that is known.
    """

    history: SessionHistory
    missing: Missing | None
    worth: Worth  # Of the last usable slice, which stands for the end of the history.
    left_dram: tuple[bytes, MissEvent | None] | None


@dataclass(frozen=True, slots=True)
class ExplainedRequest:
    """The record of a request; `lookups_more` and `reports_more` were counted, not kept."""

    lookups: Sequence[ExplainedLookup]
    lookups_more: int
    reports: Sequence[ReportRecord]
    reports_more: int


class Explain:
    def __init__(
        self,
        blocks: BlockTable,
        index: BlockIndex,
        history: MissReasons,
        claims: Claims,
        clock: Clock,
        policy: ActivePolicy,
    ) -> None:
        self._blocks = blocks
        self._index = index
        self._history = history
        self._claims = claims
        self._clock = clock
        self._policy = policy

    @property
    def remembers_since_ms(self) -> int:
        return self._history.remembers_since_ms

    @property
    def dram_emptied(self) -> Emptied | None:
        return self._index.dram_emptied

    def block(self, caller: Caller, key: bytes) -> ExplainedBlock:
        """The block's places and its events."""
        rows, now_ms = self.rows(caller, key), self._clock.wall_ms()
        shards = [
            (block_facts(self._blocks, self._index.layouts, row, now_ms), self.places(caller, row)) for row in rows
        ]
        events, missing = self.events(caller, key), None if rows else self.missing(caller, key)
        # Without a history it is the time of this call; the same value for both uses.
        since_ms = self.remembers_since_ms if missing is None else missing.remembers_since_ms
        return ExplainedBlock(shards, events, missing, since_ms)

    async def remembered_key(self, caller: Caller, prefix: str) -> bytes:
        """The key of the only block in the history whose key begins with these hexadecimal digits.

        Raises BlockNotFound; InvalidRequest for no such digits, or if there are several.
        """
        known = self._history.keys.copy()
        keys = sorted({bytes(key) for key in known[await begin_with(known, prefix)].tolist()})
        if not keys:
            raise BlockNotFound(f"the history remembers no block whose key begins with {prefix}", key=prefix)
        if len(keys) > 1:
            names = ", ".join(key.hex() for key in keys[:3])
            raise InvalidRequest(f"more than one key in the history begins with {prefix}: {names}", field="key_prefix")
        return keys[0]

    async def valued_block(self, caller: Caller, key: bytes) -> ExplainedBlock:
        """The same, with the block's worth to the policy."""
        found = self.block(caller, key)
        return replace(found, worth=await self.worth(caller, key)) if found.shards else found

    async def worth(self, caller: Caller, key: bytes) -> Worth:
        """What a block is worth to the present policy."""
        rows = self.rows(caller, key)
        return Worth(self._policy.name, await self._policy.explain(rows[0]) if rows else ())

    async def session(self, caller: Caller, history: SessionHistory) -> ExplainedSession:
        """How much of a session is stored where, and why not more."""
        keys = history.session.manifest.slices["key"]
        missing = left_dram = None
        worth = Worth(self._policy.name, ())
        if history.usable < len(keys):
            missing = self.missing(caller, keys[history.usable].tobytes())
        if history.usable:
            usable = keys[: history.usable].tolist()
            rows = self._blocks.rows_of_keys(usable)
            outside = np.flatnonzero(~self._blocks.lie_in(rows, self._blocks.first_tier))
            if len(outside):
                left_dram = usable[outside[0]], self._eviction(usable[outside[0]])
            worth = await self.worth(caller, usable[-1])
        return ExplainedSession(history, missing, worth, left_dram)

    def _eviction(self, key: bytes) -> MissEvent | None:
        """When and why the block left DRAM last."""
        events = (event for event in self._history.of(key) if event.tier == self._blocks.first_tier)
        return next((event for event in events if event.reason in _EVICTIONS), None)

    def rows(self, caller: Caller, key: bytes) -> list[int]:
        """The rows of a block's shards; empty if it is not stored."""
        return list(self._blocks.shards_of(int(self._blocks.rows_of_keys([key])[0])))

    def events(self, caller: Caller, key: bytes) -> list[MissEvent]:
        """The events of a block, the newest first."""
        return self._history.of(key)

    def places(self, caller: Caller, row: int) -> list[TierPlace]:
        """The places of an object, since when, and how it got there."""
        blocks = self._blocks
        found = []
        for tier in blocks.tiers_of(row):
            since_ms = int(blocks.since_ms(tier)[row])
            if not since_ms:
                arrival = Arrival.KEPT
            elif tier != blocks.first_tier:
                arrival = Arrival.WRITTEN_BEHIND
            elif since_ms == blocks.stored_at_ms[row]:
                arrival = Arrival.SAVED
            else:
                arrival = Arrival.HINTED if blocks.hinted[row] else Arrival.PROMOTED
            found.append(TierPlace(tier, arrival, since_ms))
        return found

    def missing(self, caller: Caller, key: bytes, until_ms: int | None = None) -> Missing:
        """Why the block is missing; with `until_ms`, why it was missing at that time."""
        event = self._history.last_copy_gone(key, until_ms)
        if event is None and until_ms is None and self._claims.waiting_for(key):
            why = Miss.BEING_SAVED
        else:
            why = self._why(event)
        return Missing(key, why, event, self._history.remembers_since_ms, self._index.dram_emptied)

    def _why(self, event: MissEvent | None) -> Miss:
        """Why a block is missing whose last copy was dropped by `event`; None: by none in the history."""
        if event is None:
            return Miss.NEVER_STORED if self._index.dram_emptied is None else Miss.NEVER_STORED_OR_LOST
        if event.reason is Reason.EVICTED and event.pin_ended_ms:
            return Miss.EXPIRED  # It was evicted because its pin had ended.
        return _MISS_OF[event.reason]

    def why_missed(self, miss: FirstMiss, until_ms: int | None = None) -> tuple[Miss, MissEvent | None]:
        """Why a lookup ended at this block, at a time or now. Takes some microseconds."""
        event = self._history.last_copy_gone(miss.key, until_ms)
        if miss.is_partial:
            return Miss.IN_PART, event
        if miss.other_layout_ids and event is None:
            return Miss.OTHER_LAYOUT, None
        return self._why(event), event

    def lookups(self, caller: Caller, request: RequestRecord) -> list[ExplainedLookup]:
        return [self._lookup(caller, record) for record in request.lookups]

    def _lookup(self, caller: Caller, record: LookupRecord) -> ExplainedLookup:
        layout = self._index.layouts[record.layout_id]
        other_ids = record.miss.other_layout_ids if record.miss is not None else ()
        others = [OtherLayout(other, differences(other, layout)) for other in self._layouts(other_ids)]
        if record.miss is None:
            return ExplainedLookup(record, layout, None, others)
        why, event = self.why_missed(record.miss, record.at_ms)
        row = int(self._blocks.rows_of_keys([record.miss.key])[0])
        since_ms = int(self._blocks.stored_at_ms[row]) if row != NO_ROW else 0
        emptied = self._index.dram_emptied
        missing = Missing(record.miss.key, why, event, self._history.remembers_since_ms, emptied, since_ms)
        return ExplainedLookup(record, layout, missing, others)

    def _layouts(self, layout_ids: Sequence[int]) -> list[Layout]:
        return [self._index.layouts[layout_id] for layout_id in layout_ids]


def differences(theirs: Layout, asked: Layout) -> dict[str, tuple[str, str]]:
    """The fields in which two layouts differ, as text."""
    found: dict[str, tuple[str, str]] = {}
    for name in ("model_id", "model_revision", "block_tokens", "rotated"):
        one, other = getattr(theirs, name), getattr(asked, name)
        if one != other:
            found[name] = (str(one), str(other))
    if len(theirs.groups) != len(asked.groups):
        return found | {"groups": (str(len(theirs.groups)), str(len(asked.groups)))}
    for number, (one, other) in enumerate(zip(theirs.groups, asked.groups, strict=True)):
        prefix = f"groups[{number}]." if len(asked.groups) > 1 else ""
        found |= {prefix + name: values for name, values in _group_differences(one, other).items()}
    return found


def _group_differences(one: LayerGroup, other: LayerGroup) -> dict[str, tuple[str, str]]:
    pairs = {field.name: (getattr(one, field.name), getattr(other, field.name)) for field in fields(LayerGroup)}
    mine, theirs = pairs.pop("rotary")
    pairs |= {f"rotary.{part.name}": (getattr(mine, part.name), getattr(theirs, part.name)) for part in fields(Rotary)}
    return {name: (str(value), str(wanted)) for name, (value, wanted) in pairs.items() if value != wanted}
