"""Domain to wire for operators' queries: blocks, events, misses, requests, drains, recorded turns."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice.blocks import TierName
from kvservice.rpc.messages import TIER_NUMBERS, known_timestamp, residency_runs, timestamp
from kvservice.rpc.session_messages import session_message
from kvservice.store.types import (
    BlockFacts,
    ClientFacts,
    DrainProgress,
    ExplainedBlock,
    ExplainedLookup,
    ExplainedRequest,
    ExplainedSession,
    Found,
    LayoutFacts,
    LoadRecord,
    MissEvent,
    Missing,
    OtherLayout,
    PolicyFacts,
    ShadowFacts,
    TierPlace,
    TraceStep,
    Worth,
)
from kvservice_api.v1 import admin_pb2 as pb


def stored_block(facts: BlockFacts) -> pb.StoredBlock:
    return pb.StoredBlock(
        key=facts.key,
        parent_key=facts.parent_key,
        layout_fingerprint=facts.layout.fingerprint,
        shard=facts.shard.to_proto(),
        token_count=facts.token_count,
        size_bytes=facts.size_bytes,
        in_dram=TierName.DRAM in facts.tiers,
        on_ssd=TierName.SSD in facts.tiers,
        tiers=facts.tiers,
        stored_at=timestamp(facts.stored_at_ms),
        used_at=timestamp(facts.used_at_ms),
        hits=facts.hits,
        leases=facts.leases,
        pinned_until=known_timestamp(facts.pinned_until_ms),
    )


def stored_layout(facts: LayoutFacts) -> pb.StoredLayout:
    return pb.StoredLayout(
        fingerprint=facts.layout.fingerprint,
        layout=facts.layout.to_proto(),
        blocks=facts.blocks,
        size_bytes=facts.size_bytes,
    )


def attached_client(facts: ClientFacts) -> pb.AttachedClient:
    client = facts.client
    return pb.AttachedClient(
        name=client.name,
        number=client.number,
        attached_at=timestamp(client.attached_at_ms),
        leases=len(client.leases),
        leased_blocks=client.leased_rows,
        sends_hints=facts.queued_requests is not None,
        queued_requests=facts.queued_requests or 0,
    )


def block(key: bytes, found: ExplainedBlock) -> pb.ExplainedBlock:
    return pb.ExplainedBlock(
        key=key,
        shards=[_shard(facts, places) for facts, places in found.shards],
        events=[_event(event) for event in found.events],
        remembers_since=timestamp(found.remembers_since_ms),
        layout=found.shards[0][0].layout.to_proto() if found.shards else None,
        miss=_miss(found.missing) if found.missing is not None else None,
        worth=_worth(found.worth) if found.shards else None,
    )


def _shard(facts: BlockFacts, places: Sequence[TierPlace]) -> pb.ExplainedShard:
    return pb.ExplainedShard(
        block=stored_block(facts),
        places=[
            pb.Place(
                tier=TIER_NUMBERS.get(place.tier),
                tier_name=place.tier,
                arrival=f"ARRIVAL_{place.arrival.name}",
                since=known_timestamp(place.since_ms),
            )
            for place in places
        ],
        holds=facts.holds,
    )


def _event(event: MissEvent) -> pb.BlockEvent:
    return pb.BlockEvent(
        kind=f"EVENT_KIND_{event.reason.name}",
        at=timestamp(event.at_ms),
        tier=TIER_NUMBERS.get(event.tier) if event.tier else None,
        tier_name=event.tier or "",
        detail=event.detail,
        last_copy=event.last_copy,
        pin_ended_at=known_timestamp(event.pin_ended_ms),
        space_for=f"SPACE_FOR_{event.space_for.name}" if event.space_for else None,
        score=event.score,
    )


def _worth(worth: Worth) -> pb.PolicyWorth:
    return pb.PolicyWorth(
        policy=worth.policy,
        values=[pb.TierWorth(tier_name=each.tier, score=each.score, inputs=dict(each.inputs)) for each in worth.values],
    )


def policy(facts: PolicyFacts) -> pb.SetPolicyResponse:
    return pb.SetPolicyResponse(
        policy=facts.name,
        since=timestamp(facts.since_ms),
        configured=facts.configured,
        items=facts.items,
        blocks=facts.blocks,
        queued_items=facts.queued,
        ranking_ms=facts.ranking_ms,
        look_ms=facts.look_ms,
        read_ahead_bytes=facts.read_ahead_bytes,
        read_ahead_unused=facts.read_ahead_unused,
        shadow=_shadow(facts.shadow, facts.shadow_real_read_bytes) if facts.shadow is not None else None,
    )


def _shadow(facts: ShadowFacts, real_read_bytes: int) -> pb.ShadowPolicy:
    return pb.ShadowPolicy(
        policy=facts.name,
        since=timestamp(facts.since_ms),
        requests=facts.requests,
        real=_found(facts.real, real_read_bytes),
        shadow=_found(facts.shadow, facts.shadow.read_ahead_bytes),
    )


def _found(found: Found, read_ahead_bytes: int) -> pb.RequestsFound:
    return pb.RequestsFound(
        requests_in_dram=found.requests_in_dram,
        dram_bytes=found.dram_bytes,
        ssd_bytes=found.ssd_bytes,
        missing_bytes=found.missing_bytes,
        read_ahead_bytes=read_ahead_bytes,
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
        stored_since=known_timestamp(missing.stored_since_ms),
    )


def request(request_id: str, found: ExplainedRequest) -> pb.ExplainedRequest:
    return pb.ExplainedRequest(
        request_id=request_id,
        lookups=[_lookup(each) for each in found.lookups],
        lookups_more=found.lookups_more,
        reports=[pb.ExplainedReport(at=timestamp(each.began_ms), report=each.message) for each in found.reports],
        reports_more=found.reports_more,
    )


def session(found: ExplainedSession) -> pb.ExplainedSession:
    stored, usable, runs = found.history
    left_key, left = found.left_dram or (b"", None)
    return pb.ExplainedSession(
        session=session_message(stored, bytes_max=0),
        layout=stored.layout.to_proto(),
        usable_slices=usable,
        usable_tokens=int(stored.manifest.slices["token_count"][:usable].sum()),
        runs=residency_runs(runs),
        miss=_miss(found.missing) if found.missing is not None else None,
        worth=_worth(found.worth) if usable else None,
        outside_dram_key=left_key,
        left_dram=_event(left) if left is not None else None,
    )


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
        in_place=load.path == "in_place",
        path=load.path,
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


def trace(step: TraceStep) -> pb.RecordTraceResponse:
    turns = [
        pb.RecordedTurn(
            arrived_s=turn.at_s,
            prompt_tokens=turn.prompt_tokens,
            answer_tokens=turn.answer_tokens,
            hash_ids=turn.hash_ids,
        )
        for turn in step.turns
    ]
    answer = pb.RecordTraceResponse(turns=turns, dropped=step.dropped, done=step.done)
    if (layout := step.layout) is not None:
        answer.layout.layout_fingerprint = layout.fingerprint
        answer.layout.block_tokens = layout.block_tokens
        answer.layout.kv_bytes_per_token = step.kv_bytes_per_token
    return answer
