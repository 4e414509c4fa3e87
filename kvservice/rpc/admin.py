"""AdminService: the RPCs of ``admin.proto``, for operators and ``kvctl``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

from kvservice.blocks import TierName
from kvservice.device.cuda_ipc import CudaIpc
from kvservice.rpc import explained
from kvservice.rpc.calls import Callers, Context
from kvservice.rpc.explained import stored_block
from kvservice.rpc.messages import tier_of, timestamp
from kvservice.rpc.session_messages import session_message
from kvservice.store.store import BlockStore
from kvservice.store.types import DISCARD_KEYS_MAX, PIN_KEYS_MAX
from kvservice_api.errors import BlockNotFound, InvalidRequest
from kvservice_api.keys import split_keys
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import types_pb2

_BLOCKS_A_TURN = 64  # Their messages take a millisecond of the event loop.


class AdminService:
    def __init__(
        self, store: BlockStore, cuda_ipc: CudaIpc, *, version: str, counters: Callable[[], dict[str, float]]
    ) -> None:
        self._store = store
        self._cuda_ipc = cuda_ipc
        self._operators = store.operators
        self._callers = Callers(store)
        self._version = version
        self._counters = counters

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        facts, counts = self._store.status.facts(), self._store.status.block_counts()
        tiers = [
            pb.TierStatus(
                name=tier.name,
                capacity_bytes=tier.capacity_bytes,
                used_bytes=tier.used_bytes,
                blocks=counts[tier.name],
                refusing_because=tier.refusing_because,
                configured_bytes=tier.configured_bytes,
                short_because=tier.short_because,
            )
            for tier in facts.tiers
        ]
        return pb.StatusResponse(
            version=self._version,
            store_id=facts.store_id,
            boot_epoch=self._store.boot_epoch,
            started_at=timestamp(facts.started_at_ms),
            state="draining" if facts.is_draining else "serving",
            dram=_without_name(tiers, TierName.DRAM),
            ssd=_without_name(tiers, TierName.SSD),
            tiers=tiers,
            index=pb.IndexStatus(
                durable_map_bytes=facts.index_map_bytes[TierName.SSD],
                durable_used_bytes=facts.index_used_bytes[TierName.SSD],
                volatile_map_bytes=facts.index_map_bytes[TierName.DRAM],
                volatile_used_bytes=facts.index_used_bytes[TierName.DRAM],
            ),
            blocks=facts.blocks,
            layouts=facts.layouts,
            clients=facts.clients,
            leases=facts.leases,
            uploads=facts.uploads,
            counters=self._counters(),
            sessions=facts.sessions,
            hint_streams=facts.hint_streams,
            queued_requests=facts.queued_requests,
            set_aside_bytes=facts.set_aside_bytes,
            set_aside_extents=facts.set_aside_extents,
            recordings=facts.recordings,
            cuda=pb.CudaStatus(
                refused_because=self._cuda_ipc.refused_because,
                registrations=self._cuda_ipc.registration_count,
                arena_registered_bytes=self._cuda_ipc.arena_registered_bytes,
                failed=self._cuda_ipc.has_failed,
            ),
        )

    async def ListBlocks(self, request: pb.ListBlocksRequest, context: Context) -> pb.ListBlocksResponse:
        caller, tiers = self._callers.of(context), self._tiers(request, [])
        blocks, token = await self._operators.list_blocks(
            caller, request.page_token, request.page_size, request.layout_fingerprint, tiers, request.key_prefix
        )
        page = pb.ListBlocksResponse(next_page_token=token)
        for start in range(0, len(blocks), _BLOCKS_A_TURN):
            page.blocks.extend(map(stored_block, blocks[start : start + _BLOCKS_A_TURN]))
            await asyncio.sleep(0)
        return page

    async def Inspect(self, request: pb.InspectRequest, context: Context) -> pb.InspectResponse:
        found = await self._operators.explain_block(self._callers.of(context), request.key)
        if not found.shards:
            raise BlockNotFound(f"nothing is stored under {request.key.hex()}", key=request.key.hex())
        blocks = [facts for facts, _ in found.shards]
        return pb.InspectResponse(shards=map(stored_block, blocks), layout=blocks[0].layout.to_proto())

    async def Discard(self, request: pb.DiscardRequest, context: Context) -> pb.DiscardResponse:
        given = [bool(request.keys), bool(request.layout_fingerprint), request.everything]
        if sum(given) != 1:
            raise InvalidRequest("give exactly one of keys, layout_fingerprint and everything", field="keys")
        caller = self._callers.of(context)
        if request.keys:
            keys = split_keys(request.keys, field="keys", count_max=DISCARD_KEYS_MAX)
            discarded, missing = await self._operators.discard(caller, keys)
            return pb.DiscardResponse(discarded=discarded, missing=missing)
        discarded = await self._operators.discard_layout(caller, request.layout_fingerprint or None)
        return pb.DiscardResponse(discarded=discarded)

    async def Scrub(self, request: pb.ScrubRequest, context: Context) -> None:
        tiers = self._tiers(request, self._store.tier_names)
        scrub = self._store.scrub.run(self._callers.of(context), tiers, request.bytes_per_second)
        async with aclosing(scrub) as progress:
            async for step in progress:
                await context.write(
                    pb.ScrubResponse(
                        blocks_total=step.copies_total,
                        blocks_checked=step.copies_checked,
                        bytes_checked=step.bytes_checked,
                        damaged=step.damaged,
                        done=step.done,
                    )
                )

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        keys = split_keys(request.keys, field="keys", count_max=PIN_KEYS_MAX)
        outcome = await self._store.pins.pin(self._callers.of(context), keys, request.ttl_ms)
        return pb.PinResponse(
            pinned=outcome.pinned,
            missing=outcome.missing,
            pinned_until=timestamp(outcome.until_ms),
            pinned_bytes=outcome.pinned_bytes,
            pinned_bytes_max=outcome.pinned_bytes_max,
        )

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        keys = split_keys(request.keys, field="keys", count_max=PIN_KEYS_MAX)
        outcome = await self._store.pins.unpin(self._callers.of(context), keys)
        return pb.UnpinResponse(**outcome._asdict())

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        if sum(map(bool, (request.key, request.request_id, request.session_id, request.key_prefix))) != 1:
            raise InvalidRequest("give exactly one of key, request_id, session_id and key_prefix", field="key")
        caller = self._callers.of(context)
        if request.session_id:
            sessions = await self._operators.explain_session(caller, request.session_id)
            return pb.ExplainResponse(sessions=map(explained.session, sessions))
        if request.request_id:
            found = self._operators.explain_request(caller, request.request_id)
            return pb.ExplainResponse(request=explained.request(request.request_id, found))
        key = request.key or await self._operators.remembered_key(caller, request.key_prefix)
        block = await self._operators.explain_block(caller, key)
        return pb.ExplainResponse(block=explained.block(key, block))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> None:
        caller = self._callers.of(context)
        if request.action == pb.DRAIN_ACTION_UNDO:
            await context.write(explained.drain(self._store.drain.undo(caller)))
            return
        if request.action != pb.DRAIN_ACTION_BEGIN:
            raise InvalidRequest("name the action: DRAIN_ACTION_BEGIN or DRAIN_ACTION_UNDO", field="action")
        self._store.drain.begin(caller)
        async with aclosing(self._store.drain.progress(caller)) as progress:
            async for step in progress:
                await context.write(explained.drain(step))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        caller = self._callers.of(context)
        sessions, token = await self._operators.list_sessions(
            caller, request.page_token, request.page_size, request.layout_fingerprint, request.session_id
        )
        return pb.ListSessionsResponse(
            sessions=[session_message(each, bytes_max=0) for each in sessions], next_page_token=token
        )

    async def ListLayouts(self, request: pb.ListLayoutsRequest, context: Context) -> pb.ListLayoutsResponse:
        caller = self._callers.of(context)
        layouts, token = await self._operators.list_layouts(caller, request.page_token, request.page_size)
        return pb.ListLayoutsResponse(layouts=map(explained.stored_layout, layouts), next_page_token=token)

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsResponse:
        caller = self._callers.of(context)
        clients, token = self._operators.list_clients(caller, request.page_token, request.page_size)
        return pb.ListClientsResponse(clients=map(explained.attached_client, clients), next_page_token=token)

    async def RecordTrace(self, request: pb.RecordTraceRequest, context: Context) -> None:
        caller = self._callers.of(context)
        steps = self._operators.record_trace(caller, request.layout_fingerprint, request.duration_ms / 1e3)
        async with aclosing(steps):
            async for step in steps:
                await context.write(explained.trace(step))

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.SetPolicyResponse:
        caller = self._callers.of(context)
        if not (request.policy or request.shadow):
            return explained.policy(await self._store.policies.show(caller))
        return explained.policy(await self._store.policies.set(caller, request.policy, request.shadow))

    def _tiers(
        self, request: pb.ListBlocksRequest | pb.ScrubRequest, where_unspecified: Sequence[TierName]
    ) -> Sequence[TierName]:
        if request.tier == types_pb2.TIER_UNSPECIFIED and not request.tier_name:
            return where_unspecified
        return [tier_of(request.tier, request.tier_name, self._store.tier_names)]


def _without_name(tiers: Sequence[pb.TierStatus], name: TierName) -> pb.TierStatus:
    status = pb.TierStatus()
    for tier in tiers:
        if tier.name == name:
            status.CopyFrom(tier)
    status.name = ""
    return status
