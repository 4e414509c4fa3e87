"""The record of the last requests with an id: for `explain`.

The engine defines a request and its id. A request may make several lookups, for example one per rank, and several loads
per lease. The engine's report arrives after them, or alone: if the daemon was away, the request made no lookup.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvservice.blocks import BlockTable
from kvservice.clock import Clock
from kvservice.store.caller import Caller
from kvservice.store.leases import Lease
from kvservice_api.errors import InvalidRequest, KVError, RequestNotFound
from kvservice_api.layout import Layout, Shard

_ID_BYTES_MAX = 200
_LOOKUPS_MAX, _LOADS_MAX = 64, 16  # Per request, and per lookup; later ones are only counted.
_REPORTS_MAX = 64  # Of one request.
_SUCCESSORS_MAX = 256  # Per lookup; loads of later leases are not noted.


@dataclass(slots=True)
class LoadRecord:
    """`outcome` is "running", "done", "cancelled", "not_in_place", or the reason of an error. Counts are of blocks."""

    began_ms: int
    blocks: int
    layers: int
    from_dram: int
    from_ssd: int
    path: str  # "stream", "in_place", "cuda_ipc" or "bulk".
    sent_bytes: int = 0
    took_ms: float = 0.0
    outcome: str = "running"
    ends_as: str = ""  # Regardless of how the call ends: a client that reads in place cancels it after reading.


class FirstMiss(NamedTuple):
    """The block at which a lookup ended."""

    key: bytes
    is_partial: bool  # Other shards of it were stored.
    other_layout_ids: Sequence[int]  # Layouts of the same model with blocks, if the lookup's layout had none.


@dataclass(slots=True)
class LookupRecord:
    at_ms: int
    layout_id: int
    shard: Shard
    client: str
    asked: int
    hit: int
    in_dram: int  # Hits in DRAM, also those in both tiers.
    on_ssd: int  # Hits that are only on SSD.
    miss: FirstMiss | None = None  # None if all blocks were stored.
    loads: list[LoadRecord] = field(default_factory=list)
    loads_more: int = 0
    lease_id: int = 0
    successor_ids: list[int] = field(default_factory=list)  # Leases and tickets that were derived from that lease.


@dataclass(frozen=True, slots=True)
class ReportRecord:
    """An engine's report of a request. The store reads five fields, and keeps the message for `explain`."""

    report_id: int  # A repeated id is the same report; 0 means no id.
    began_ms: int
    plan: str  # "load", "recompute", "mixed", or "none".
    outcome: str  # "done", "miss", "failed_over" or "breaker_open".
    message: Any  # `RequestReport`, as the listener received and checked it. The store does not read it.
    computed_bytes_per_s: float = 0.0  # KV that the engine computes, as it estimated; 0 if that is not known.


@dataclass(slots=True)
class RequestRecord:
    lookups: list[LookupRecord] = field(default_factory=list)
    lookups_more: int = 0
    reports: list[ReportRecord] = field(default_factory=list)
    reports_more: int = 0


def first_miss(
    blocks: BlockTable, layouts: Mapping[int, Layout], layout_id: int, keys: Sequence[bytes], hit: int
) -> FirstMiss | None:
    """The first block that a lookup of `keys` did not find, after `hit` that it found. None if it found all."""
    if hit == len(keys):
        return None
    stored = blocks.live_of_layout
    others: tuple[int, ...] = ()
    if not hit and not stored[layout_id]:
        model = layouts[layout_id].model_id
        others = tuple(other for other, layout in layouts.items() if layout.model_id == model and stored[other])
    return FirstMiss(keys[hit], blocks.has_key(keys[hit]), others)


class Requests:
    """The last `requests_max` requests, by id. 0 keeps none."""

    def __init__(self, blocks: BlockTable, clock: Clock, requests_max: int) -> None:
        self._blocks = blocks
        self._clock = clock
        self._requests_max = requests_max
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()
        self._by_lease: dict[int, LookupRecord] = {}
        self.reported: Counter[tuple[str, str]] = Counter()  # (plan, outcome) -> number of reports since the start.

    @staticmethod
    def check_id(request_id: str) -> None:
        """Raises InvalidRequest."""
        if len(request_id.encode()) > _ID_BYTES_MAX:
            raise InvalidRequest(f"request_id is longer than {_ID_BYTES_MAX} bytes", field="request_id")

    def get(self, caller: Caller, request_id: str) -> RequestRecord:
        """Raises RequestNotFound."""
        if request_id not in self._records:
            raise RequestNotFound(
                f"no request with the id {request_id!r} is among the last {self._requests_max} remembered "
                "since the daemon's start",
                request_id=request_id,
            )
        return self._records[request_id]

    def note_lookup(
        self,
        request_id: str,
        layouts: Mapping[int, Layout],
        layout_id: int,
        shard: Shard,
        client: str,
        keys: Sequence[bytes],
        runs: Sequence[tuple[int, bool, bool]],
        lease: Lease | None,
    ) -> None:
        """Note a lookup. `runs` are those of the answer."""
        if not self._requests_max:
            return
        hit = sum(count for count, _, _ in runs)
        in_dram = sum(count for count, dram, _ in runs if dram)
        record = LookupRecord(self._clock.wall_ms(), layout_id, shard, client, len(keys), hit, in_dram, hit - in_dram)
        record.miss = first_miss(self._blocks, layouts, layout_id, keys, hit)
        self._add(request_id, record, lease)

    def note_report(self, caller: Caller, request_id: str, report: ReportRecord) -> None:
        """Note a report, unless one with the same report id is noted already. Raises InvalidRequest."""
        self.check_id(request_id)
        if not request_id:
            raise InvalidRequest("a report names its request", field="request_id")
        if self._requests_max:
            request = self._record(request_id)
            if report.report_id and any(report.report_id == each.report_id for each in request.reports):
                return
            if len(request.reports) < _REPORTS_MAX:
                request.reports.append(report)
            else:
                request.reports_more += 1
        self.reported[report.plan, report.outcome] += 1

    def _record(self, request_id: str) -> RequestRecord:
        """The record of this id, which becomes the newest. For a new id, the oldest record is dropped if needed."""
        request = self._records.setdefault(request_id, RequestRecord())
        self._records.move_to_end(request_id)
        if len(self._records) > self._requests_max:
            _, forgotten = self._records.popitem(last=False)
            for lookup in forgotten.lookups:
                for lease_id in (lookup.lease_id, *lookup.successor_ids):
                    self._by_lease.pop(lease_id, None)
        return request

    def _add(self, request_id: str, record: LookupRecord, lease: Lease | None) -> None:
        request = self._record(request_id)
        if len(request.lookups) == _LOOKUPS_MAX:
            request.lookups_more += 1
            return
        request.lookups.append(record)
        if lease is not None:
            record.lease_id = lease.lease_id
            self._by_lease[lease.lease_id] = record

    def follow(self, lease_id: int, successor_id: int) -> None:
        """Count loads of a derived (exported or adopted) lease for the lookup that granted the first lease."""
        record = self._by_lease.get(lease_id)
        if record is not None and len(record.successor_ids) < _SUCCESSORS_MAX:
            record.successor_ids.append(successor_id)
            self._by_lease[successor_id] = record

    @contextmanager
    def load(
        self, caller: Caller, lease: Lease, blocks: range, layers: range, path: str = "stream"
    ) -> Iterator[LoadRecord]:
        """Note a load of the lease, and how it ended. The caller counts `sent_bytes`."""
        record = self._load_record(lease, blocks, layers, path)
        began_s = self._clock.monotonic_s()
        try:
            yield record
            record.outcome = record.ends_as or "done"
        except KVError as error:
            record.outcome = record.ends_as or error.reason.lower()
            raise
        except BaseException:
            record.outcome = record.ends_as or "cancelled"
            raise
        finally:
            record.took_ms = (self._clock.monotonic_s() - began_s) * 1000

    def note_load(self, lease: Lease, blocks: range, layers: range, path: str, took_s: float) -> None:
        """Note a load that a client has made, and reports now."""
        record = self._load_record(lease, blocks, layers, path)
        record.took_ms = took_s * 1000
        record.outcome = "done"

    def _load_record(self, lease: Lease, blocks: range, layers: range, path: str) -> LoadRecord:
        """The record of a load that begins now."""
        lookup = self._by_lease.get(lease.lease_id)
        rows = lease.rows[blocks.start : blocks.stop]
        from_dram = int(self._blocks.lie_in(rows, self._blocks.first_tier).sum()) if lookup is not None else 0
        from_ssd = len(blocks) - from_dram
        record = LoadRecord(self._clock.wall_ms(), len(blocks), len(layers), from_dram, from_ssd, path)
        if lookup is not None:
            if len(lookup.loads) < _LOADS_MAX:
                lookup.loads.append(record)
            else:
                lookup.loads_more += 1
        return record
