"""Domain to wire for what operators are told: blocks, events, misses, requests, drains."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from kvservice.blocks import TierName
from kvservice.index.session_records import Manifest
from kvservice.rpc.reports import report_message
from kvservice.store.caller import Caller
from kvservice.store.miss_reasons import Event
from kvservice.store.operations.drain import DrainProgress
from kvservice.store.operations.explain import ExplainedLookup, Missing, OtherLayout
from kvservice.store.operations.requests import LoadRecord
from kvservice.store.sessions.messages import session_message
from kvservice.store.store import BlockStore
from kvservice_api.layout import Shard
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import blocks_pb2, types_pb2

_TIERS = {None: types_pb2.TIER_UNSPECIFIED, TierName.DRAM: types_pb2.TIER_DRAM, TierName.SSD: types_pb2.TIER_SSD}


def timestamp(wall_ms: int) -> Timestamp:
    return Timestamp(seconds=wall_ms // 1000, nanos=wall_ms % 1000 * 1_000_000)


def _known(wall_ms: int) -> Timestamp | None:
    """None where 0 stands for a time that is not known."""
    return timestamp(wall_ms) if wall_ms else None


def stored_block(store: BlockStore, row: int) -> pb.StoredBlock:
    blocks = store.blocks
    pinned_until_ms = int(blocks.pinned_until_ms[row])
    return pb.StoredBlock(
        key=blocks.key_of(row),
        parent_key=blocks.parent_key[row].tobytes(),
        layout_fingerprint=store.index.layouts[int(blocks.layout_id[row])].fingerprint,
        shard=blocks.shard_of(row).to_proto(),
        token_count=int(blocks.token_count[row]),
        size_bytes=int(blocks.size_bytes[row]),
        in_dram=blocks.is_resident(row, TierName.DRAM),
        on_ssd=blocks.is_resident(row, TierName.SSD),
        stored_at=timestamp(int(blocks.stored_at_ms[row])),
        used_at=timestamp(int(blocks.used_at_ms[row])),
        hits=int(blocks.hits[row]),
        leases=int(blocks.leases[row]),
        pinned_until=timestamp(pinned_until_ms) if pinned_until_ms > store.clock.wall_ms() else None,
    )


def block(store: BlockStore, caller: Caller, key: bytes) -> pb.ExplainedBlock:
    explain = store.explain
    rows = explain.rows(caller, key)
    answer = pb.ExplainedBlock(
        key=key,
        shards=[_shard(store, caller, row) for row in rows],
        events=[_event(event) for event in explain.events(caller, key)],
        remembers_since=timestamp(explain.remembers_since_ms),
    )
    if rows:
        answer.layout.CopyFrom(store.index.layouts[int(store.blocks.layout_id[rows[0]])].to_proto())
    else:
        answer.miss.CopyFrom(_miss(explain.missing(caller, key)))
        answer.remembers_since.CopyFrom(answer.miss.remembers_since)  # With the history off it is the time of reading.
    return answer


def _shard(store: BlockStore, caller: Caller, row: int) -> pb.ExplainedShard:
    places = [
        pb.Place(
            tier=_TIERS[place.tier],
            arrival=f"ARRIVAL_{place.arrival.name}",
            since=_known(place.since_ms),
        )
        for place in store.explain.places(caller, row)
    ]
    return pb.ExplainedShard(block=stored_block(store, row), places=places, holds=int(store.blocks.holds[row]))


def _event(event: Event) -> pb.BlockEvent:
    return pb.BlockEvent(
        kind=f"EVENT_KIND_{event.reason.name}",
        at=timestamp(event.at_ms),
        tier=_TIERS[event.tier],
        detail=event.word,
        last_copy=event.last_copy,
        pin_ended_at=_known(event.pin_ended_ms),
    )


def _miss(missing: Missing) -> pb.Miss:
    emptied = missing.dram_emptied
    return pb.Miss(
        key=missing.key,
        reason=f"MISS_REASON_{missing.why.name}",
        event=_event(missing.event) if missing.event is not None else None,
        remembers_since=timestamp(missing.remembers_since_ms),
        dram_emptied_at=timestamp(emptied.at_ms) if emptied is not None else None,
        dram_emptied_because=emptied.why if emptied is not None else "",
        stored_since=_known(missing.stored_since_ms),
    )


def request(store: BlockStore, caller: Caller, request_id: str) -> pb.ExplainedRequest:
    found = store.requests.get(caller, request_id)
    return pb.ExplainedRequest(
        request_id=request_id,
        lookups=[_lookup(each) for each in store.explain.lookups(caller, found)],
        lookups_more=found.lookups_more,
        reports=[
            pb.ExplainedReport(at=timestamp(each.began_ms), report=report_message(request_id, each))
            for each in found.reports
        ],
        reports_more=found.reports_more,
    )


def session(store: BlockStore, caller: Caller, session_id: str) -> list[pb.ExplainedSession]:
    """One a layout."""
    return [_session(store, caller, manifest) for manifest in store.sessions.find_by_id(caller, session_id)]


def _session(store: BlockStore, caller: Caller, manifest: Manifest) -> pb.ExplainedSession:
    layout = store.index.layouts[manifest.layout_id]
    usable, runs = store.usable_history(caller, manifest, Shard.whole(layout))
    answer = pb.ExplainedSession(
        session=session_message(manifest, layout, bytes_max=0),
        layout=layout.to_proto(),
        usable_slices=usable,
        usable_tokens=int(manifest.slices["token_count"][:usable].sum()),
        runs=[blocks_pb2.ResidencyRun(count=count, dram=dram, ssd=ssd) for count, dram, ssd in runs],
    )
    if usable < len(manifest.slices):
        answer.miss.CopyFrom(_miss(store.explain.missing(caller, manifest.slices["key"][usable].tobytes())))
    return answer


def _lookup(lookup: ExplainedLookup) -> pb.ExplainedLookup:
    record = lookup.record
    return pb.ExplainedLookup(
        at=timestamp(record.at_ms),
        client_name=record.client,
        layout_fingerprint=lookup.layout.fingerprint,
        layout=lookup.layout.to_proto(),
        shard=record.shard.to_proto(),
        asked_blocks=record.asked,
        hit_blocks=record.hit,
        hit_blocks_in_dram=record.in_dram,
        hit_blocks_on_ssd=record.on_ssd,
        miss=_miss(lookup.missing) if lookup.missing is not None else None,
        other_layouts=[_other_layout(other) for other in lookup.other_layouts],
        loads=[_load(load) for load in record.loads],
        loads_more=record.loads_more,
    )


def _other_layout(other: OtherLayout) -> pb.OtherLayout:
    differences = [
        pb.LayoutDifference(field=name, stored=stored, asked=asked)
        for name, (stored, asked) in sorted(other.differs.items())
    ]
    return pb.OtherLayout(layout_fingerprint=other.layout.fingerprint, differences=differences)


def _load(load: LoadRecord) -> pb.ExplainedLoad:
    return pb.ExplainedLoad(
        began_at=timestamp(load.began_ms),
        blocks=load.blocks,
        layers=load.layers,
        blocks_from_dram=load.from_dram,
        blocks_from_ssd=load.from_ssd,
        sent_bytes=load.sent_bytes,
        took_ms=load.took_ms,
        outcome=load.outcome,
        in_place=load.in_place,
    )


def drain(progress: DrainProgress) -> pb.DrainResponse:
    return pb.DrainResponse(
        uploads=progress.uploads,
        loads=progress.loads,
        blocks_only_in_dram=progress.only_in_dram,
        bytes_only_in_dram=progress.only_in_dram_bytes,
        unwritten=progress.unwritten,
        waiting_because=progress.waiting_because,
        done=progress.done,
    )
