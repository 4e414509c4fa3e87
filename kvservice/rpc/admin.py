"""AdminService: what operators ask and do, for ``kvctl``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from kvservice.blocks import TierName
from kvservice.rpc import explained
from kvservice.rpc.callers import Callers
from kvservice.rpc.explained import stored_block, timestamp
from kvservice.rpc.interceptors import Context
from kvservice.store.sessions.messages import session_message
from kvservice.store.store import BlockStore
from kvservice.tiers.base import Tier
from kvservice_api.errors import BlockNotFound, InvalidRequest
from kvservice_api.keys import KEY_BYTES, split_keys
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import types_pb2

_PAGE_SIZE, _PAGE_SIZE_MAX = 100, 1000
_DISCARD_KEYS_MAX = 65536
_PIN_KEYS_MAX = 4096
_ROWS_A_TURN = 64  # Of the event loop.
_TIERS: dict[int, list[TierName]] = {types_pb2.TIER_DRAM: [TierName.DRAM], types_pb2.TIER_SSD: [TierName.SSD]}


class AdminService:
    def __init__(
        self, store: BlockStore, *, version: str, boot_epoch: int, counters: Callable[[], dict[str, float]]
    ) -> None:
        self._store = store
        self._callers = Callers(store.leases)
        self._version = version
        self._boot_epoch = boot_epoch
        self._counters = counters
        self._started_at_ms = store.clock.wall_ms()

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        store = self._store
        index = store.index
        set_aside = store.reservations.set_aside
        return pb.StatusResponse(
            version=self._version,
            store_id=index.store_id,
            boot_epoch=self._boot_epoch,
            started_at=timestamp(self._started_at_ms),
            state="draining" if store.draining else "serving",
            dram=self._tier(TierName.DRAM, store.dram),
            ssd=self._tier(TierName.SSD, store.ssd),
            index=pb.IndexStatus(
                durable_map_bytes=index.map_bytes(TierName.SSD),
                durable_used_bytes=index.used_bytes(TierName.SSD),
                volatile_map_bytes=index.map_bytes(TierName.DRAM),
                volatile_used_bytes=index.used_bytes(TierName.DRAM),
            ),
            blocks=store.blocks.live_count,
            layouts=len(index.layouts),
            clients=store.leases.client_count,
            leases=store.leases.count,
            uploads=len(store.ingests.uploads),
            counters=self._counters(),
            sessions=store.sessions.count,
            set_aside_bytes=sum(extent.size_bytes for extent in set_aside),
            set_aside_extents=len(set_aside),
        )

    async def ListBlocks(self, request: pb.ListBlocksRequest, context: Context) -> pb.ListBlocksResponse:
        blocks = self._store.blocks
        size = _page_size(request.page_size)
        start = self._number_in(request.page_token, self._store.blocks.row_end)
        layout_id = self._layout_id(request.layout_fingerprint) if request.layout_fingerprint else None
        tiers = _tiers(request.tier, [])
        rows = self._store.list_rows(self._callers.of(context), start, size + 1, layout_id=layout_id, tiers=tiers)
        more = len(rows) > size
        listed = []
        for count, row in enumerate(rows[:size].tolist()):
            if count % _ROWS_A_TURN == 0:
                await asyncio.sleep(0)
            if blocks.live[row]:
                listed.append(stored_block(self._store, row))
        return pb.ListBlocksResponse(
            blocks=listed,
            next_page_token=f"{self._boot_epoch:x}.{rows[size]:x}" if more else "",
        )

    async def Inspect(self, request: pb.InspectRequest, context: Context) -> pb.InspectResponse:
        _check_key(request.key)
        rows = self._store.explain.rows(self._callers.of(context), request.key)
        if not rows:
            raise BlockNotFound(f"nothing is stored under {request.key.hex()}", key=request.key.hex())
        layout = self._store.index.layouts[int(self._store.blocks.layout_id[rows[0]])]
        shards = [stored_block(self._store, row) for row in rows]
        return pb.InspectResponse(shards=shards, layout=layout.to_proto())

    async def Discard(self, request: pb.DiscardRequest, context: Context) -> pb.DiscardResponse:
        given = [bool(request.keys), bool(request.layout_fingerprint), request.everything]
        if sum(given) != 1:
            raise InvalidRequest("give exactly one of keys, layout_fingerprint and everything", field="keys")
        caller = self._callers.of(context)
        if request.keys:
            keys = split_keys(request.keys, field="keys", count_max=_DISCARD_KEYS_MAX)
            discarded, missing = await self._store.discard(caller, keys)
            return pb.DiscardResponse(discarded=discarded, missing=missing)
        if request.layout_fingerprint:
            self._layout_id(request.layout_fingerprint)
        discarded = await self._store.discard_layout(caller, request.layout_fingerprint or None)
        return pb.DiscardResponse(discarded=discarded)

    async def Scrub(self, request: pb.ScrubRequest, context: Context) -> None:
        tiers = _tiers(request.tier, list(self._store.lifecycle.tiers))
        async with aclosing(
            self._store.scrub.run(self._callers.of(context), tiers, request.bytes_per_second)
        ) as progress:
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
        keys = split_keys(request.keys, field="keys", count_max=_PIN_KEYS_MAX)
        outcome = await self._store.pins.pin(self._callers.of(context), keys, request.ttl_ms)
        return pb.PinResponse(
            pinned=outcome.pinned,
            missing=outcome.missing,
            pinned_until=timestamp(outcome.until_ms),
            pinned_bytes=outcome.pinned_bytes,
            pinned_bytes_max=outcome.pinned_bytes_max,
        )

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        keys = split_keys(request.keys, field="keys", count_max=_PIN_KEYS_MAX)
        outcome = await self._store.pins.unpin(self._callers.of(context), keys)
        return pb.UnpinResponse(**outcome._asdict())

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        if sum(map(bool, (request.key, request.request_id, request.session_id))) != 1:
            raise InvalidRequest("give exactly one of key, request_id and session_id", field="key")
        caller = self._callers.of(context)
        if request.session_id:
            return pb.ExplainResponse(sessions=explained.session(self._store, caller, request.session_id))
        if request.request_id:
            return pb.ExplainResponse(request=explained.request(self._store, caller, request.request_id))
        _check_key(request.key)
        return pb.ExplainResponse(block=explained.block(self._store, caller, request.key))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> None:
        drain, caller = self._store.drain, self._callers.of(context)
        if request.action == pb.DRAIN_ACTION_UNDO:
            await context.write(explained.drain(drain.undo(caller)))
            return
        if request.action != pb.DRAIN_ACTION_BEGIN:
            raise InvalidRequest("name the action: DRAIN_ACTION_BEGIN or DRAIN_ACTION_UNDO", field="action")
        drain.begin(caller)
        async with aclosing(drain.progress(caller)) as progress:
            async for step in progress:
                await context.write(explained.drain(step))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        size = _page_size(request.page_size)
        layout_id = self._layout_id(request.layout_fingerprint) if request.layout_fingerprint else None
        start = self._number_in(request.page_token)
        found, following = await self._store.sessions.page(
            self._callers.of(context), start, size, request.session_id, layout_id
        )
        layouts = self._store.index.layouts
        return pb.ListSessionsResponse(
            sessions=[session_message(each, layouts[each.layout_id], bytes_max=0) for each in found],
            next_page_token="" if following is None else f"{self._boot_epoch:x}.{following:x}",
        )

    def _tier(self, name: TierName, tier: Tier | None) -> pb.TierStatus:
        if tier is None:
            return pb.TierStatus()
        blocks, dram = self._store.blocks, self._store.dram
        count = int((blocks.resident(name) & blocks.live[: blocks.row_end]).sum())
        return pb.TierStatus(
            capacity_bytes=tier.capacity_bytes,
            used_bytes=tier.used_bytes,
            blocks=count,
            refusing_because=tier.refusing_because,
            configured_bytes=dram.configured_bytes if tier is dram else tier.capacity_bytes,
            short_because=dram.short_because if tier is dram else "",
        )

    def _layout_id(self, fingerprint: bytes) -> int:
        if len(fingerprint) != 32:
            raise InvalidRequest(f"a fingerprint has 32 bytes, not {len(fingerprint)}", field="layout_fingerprint")
        layout_id = self._store.index.layout_id(fingerprint)
        return -1 if layout_id is None else layout_id  # A layout nobody opened has no blocks.

    def _number_in(self, token: str, number_max: int = 2**62) -> int:
        """The number that a page token carries; 0 of none."""
        if not token:
            return 0
        epoch, _, number = token.partition(".")
        try:
            if int(epoch, 16) == self._boot_epoch and 0 <= (start := int(number, 16)) <= number_max:
                return start
        except ValueError:
            pass
        raise InvalidRequest("this daemon gave no such page token: start from the first page", field="page_token")


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InvalidRequest(f"a key has {KEY_BYTES} bytes, not {len(key)}", field="key")


def _page_size(asked: int) -> int:
    if asked > _PAGE_SIZE_MAX:
        raise InvalidRequest(f"page_size is {asked}; at most {_PAGE_SIZE_MAX} are allowed", field="page_size")
    return asked or _PAGE_SIZE


def _tiers(tier: int, where_unspecified: list[TierName]) -> list[TierName]:
    if tier == types_pb2.TIER_UNSPECIFIED:
        return where_unspecified
    if tier not in _TIERS:
        raise InvalidRequest(f"no tier has the number {tier}", field="tier")
    return _TIERS[tier]
