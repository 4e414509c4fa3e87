"""BlockService: the RPCs of ``blocks.proto``, each a few lines over the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from kvservice.blocks import TierName
from kvservice.rpc.callers import Callers
from kvservice.rpc.in_place import InPlaceRpcs
from kvservice.rpc.interceptors import Context
from kvservice.rpc.messages import (
    ON_SSD,
    SAVE_BLOCKS_MAX,
    SAVE_SLICES_MAX,
    block_range,
    checksums_of,
    save_request,
    save_response,
    shard_of,
)
from kvservice.rpc.reports import report_record
from kvservice.store.caller import Caller
from kvservice.store.directory import ResidencyDirectory
from kvservice.store.store import BlockStore
from kvservice.store.transfers.reads import Part
from kvservice.store.transfers.upload import SaveOutcome
from kvservice_api.errors import DeadlineExceeded, IncompleteSave, InvalidFrame, InvalidRequest, Overloaded
from kvservice_api.frames import HEAD_BYTES_MAX, Frame, decode_save, encode_frame
from kvservice_api.keys import split_keys
from kvservice_api.layout import Layout
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2

_TIERS = {types_pb2.TIER_DRAM: TierName.DRAM, types_pb2.TIER_SSD: TierName.SSD}


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    version: str
    boot_epoch: int
    frame_bytes: int
    keys_max: int
    loads_max: int
    saves_max: int
    transfer_slots: int
    transfer_idle_s: float


class BlockService(InPlaceRpcs):
    def __init__(self, store: BlockStore, limits: ServiceLimits, directory: ResidencyDirectory) -> None:
        self._store = store
        self._callers = Callers(store.leases)
        self._directory = directory
        self._limits = limits
        self._loads_max = limits.loads_max
        self._saves = 0
        self._save_turns = asyncio.Semaphore(limits.transfer_slots)

    async def GetCapabilities(self, request: pb.GetCapabilitiesRequest, context: Context) -> pb.GetCapabilitiesResponse:
        dram, not_shared = self._store.dram, self._store.dram.not_shared_because
        return pb.GetCapabilitiesResponse(
            version=self._limits.version,
            boot_epoch=self._limits.boot_epoch,
            store_id=self._store.index.store_id,
            max_frame_bytes=self._limits.frame_bytes + HEAD_BYTES_MAX,
            max_keys=self._limits.keys_max,
            max_save_blocks=SAVE_BLOCKS_MAX,
            max_save_slices=SAVE_SLICES_MAX,
            max_lease_ttl_ms=int(self._store.limits.lease_ttl_max_s * 1000),
            transports=["grpc"] if not_shared else ["shm", "grpc"],
            arena_directory="" if not_shared else str(dram.arena_directory.absolute()),
            arena_id=b"" if not_shared else dram.arena_id,
            arena_capacity_bytes=0 if not_shared else dram.arena_capacity_bytes,
            arena_writable=not self._store.reservations.refused_because,
            arena_not_shared_because=not_shared,
            residency_directory=self._directory.path,
            max_session_slices=self._store.limits.session.slices_max,
            session_ttl_ms=int(self._store.limits.session.ttl_s * 1000),
        )

    async def OpenLayout(self, request: pb.OpenLayoutRequest, context: Context) -> pb.OpenLayoutResponse:
        layout = Layout.from_proto(request.layout, request.fingerprint)
        return pb.OpenLayoutResponse(created=await self._store.open_layout(self._callers.of(context), layout))

    async def Attach(self, requests: AsyncIterator[pb.AttachRequest], context: Context) -> None:
        first = await anext(requests, None)
        if first is None:
            return
        caller = self._callers.of(context)
        client = self._store.leases.attach(caller, first.client_name)
        try:
            answer = pb.AttachResponse(client_id=client.client_id, boot_epoch=self._limits.boot_epoch)
            await context.write(answer)
            async for _ in requests:  # Ends when the client closes its side, or is gone.
                pass
        finally:
            self._store.leases.detach(caller, client)

    async def LookupPrefix(self, request: pb.LookupPrefixRequest, context: Context) -> pb.LookupPrefixResponse:
        hit = await self._store.lookup_chunked(
            self._callers.of(context, request.client_id),
            request.layout_fingerprint,
            shard_of(request),
            split_keys(request.keys, field="keys", count_max=self._limits.keys_max),
            request.lease_ttl_ms / 1000,
            request.request_id,
        )
        runs = [pb.ResidencyRun(count=count, dram=dram, ssd=ssd) for count, dram, ssd in hit.runs]
        if hit.lease is None:
            return pb.LookupPrefixResponse(hit_blocks=hit.blocks, runs=runs)
        granted_ms = min(request.lease_ttl_ms, int(self._store.limits.lease_ttl_max_s * 1000))
        return pb.LookupPrefixResponse(
            hit_blocks=hit.blocks, runs=runs, lease_id=hit.lease.lease_id, lease_ttl_ms=granted_ms
        )

    async def LoadBlocks(self, request: pb.LoadBlocksRequest, context: Context) -> None:
        caller = self._callers.of(context, request.client_id)
        lease = await self._store.lease(caller, request.lease_id, shard_of(request))
        blocks = block_range(request.first_block, request.block_count, len(lease.rows), "block")
        layers = block_range(request.first_layer, request.layer_count, lease.shard.layers, "layer")
        if self._store.loads.open_count >= self._limits.loads_max:
            raise Overloaded(f"{self._limits.loads_max} loads are open, the most that this daemon takes")
        with self._store.requests.load(caller, lease, blocks, layers) as record:
            async with aclosing(self._store.loads.run(caller, lease, blocks, layers, _encode)) as frames:
                async for frame in frames:
                    try:
                        async with asyncio.timeout(self._limits.transfer_idle_s):
                            await context.write(frame)
                    except TimeoutError as error:  # Nobody may keep blocks in their place for ever.
                        raise DeadlineExceeded(
                            f"the client took nothing for {self._limits.transfer_idle_s:g} s; the load was ended"
                        ) from error
                    record.sent_bytes += len(frame)

    async def SaveBlocks(self, requests: AsyncIterator[bytes], context: Context) -> pb.SaveBlocksResponse:
        header = await self._next_message(requests)
        if not isinstance(header, pb.SaveHeader):
            raise InvalidRequest("the first message of a save must be its header", field="header")
        caller = self._callers.of(context, header.client_id)
        if self._saves >= self._limits.saves_max:
            keys = split_keys(header.keys, field="keys", count_max=SAVE_BLOCKS_MAX)
            error = Overloaded(f"{self._limits.saves_max} saves are open, the most that this daemon takes")
            raise self._store.record_refused(caller, keys, error)
        self._saves += 1
        try:
            return save_response(await self._save(caller, header, requests))
        finally:
            self._saves -= 1

    async def _save(self, caller: Caller, header: pb.SaveHeader, requests: AsyncIterator[bytes]) -> SaveOutcome:
        client, request = save_request(self._store, caller, header)
        async with self._store.ingests.begin(caller, client, request) as ingest:
            message = await self._next_message(requests)
            while isinstance(message, Frame):
                async with self._save_turns:
                    self._check_size(message)
                    ingest.write(message)
                    await asyncio.sleep(0)  # With the turn in hand: the event loop goes round between frames.
                message = await self._next_message(requests)
            if not isinstance(message, pb.SaveCommit):
                raise InvalidRequest("a save has one header", field="header")
            if await self._next_data(requests) is not None:
                raise InvalidRequest("nothing may follow the commit", field="commit")
            return await ingest.commit(checksums_of(message.checksums), on_ssd=ON_SSD[header.durability])

    async def ExportLease(self, request: pb.ExportLeaseRequest, context: Context) -> pb.ExportLeaseResponse:
        ttl_ms = self._granted_ms(request.ttl_ms, "ttl_ms")
        caller = self._callers.of(context, request.client_id)
        ticket = self._store.tickets.export(caller, request.lease_id, ttl_ms / 1000, request.adoptions)
        return pb.ExportLeaseResponse(ticket=ticket, ttl_ms=ttl_ms)

    async def AdoptLease(self, request: pb.AdoptLeaseRequest, context: Context) -> pb.AdoptLeaseResponse:
        ttl_ms = self._granted_ms(request.lease_ttl_ms, "lease_ttl_ms")
        hit = await self._store.adopt(
            self._callers.of(context, request.client_id),
            request.ticket,
            request.layout_fingerprint,
            shard_of(request),
            ttl_ms / 1000,
        )
        assert hit.lease is not None
        return pb.AdoptLeaseResponse(
            lease_id=hit.lease.lease_id,
            lease_ttl_ms=ttl_ms,
            token_counts=self._store.blocks.token_count[hit.lease.rows].tolist(),
            runs=[pb.ResidencyRun(count=count, dram=dram, ssd=ssd) for count, dram, ssd in hit.runs],
        )

    def _granted_ms(self, asked_ms: int, field: str) -> int:
        if not asked_ms:
            raise InvalidRequest(f"{field} is 0", field=field)
        return min(asked_ms, int(self._store.limits.lease_ttl_max_s * 1000))

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        if not request.ttl_ms:
            raise InvalidRequest("ttl_ms is 0; to end a lease, release it", field="ttl_ms")
        granted_ms = min(request.ttl_ms, int(self._store.limits.lease_ttl_max_s * 1000))
        self._store.leases.renew(self._callers.of(context, request.client_id), request.lease_id, granted_ms / 1000)
        return pb.RenewLeaseResponse(ttl_ms=granted_ms)

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, context: Context) -> pb.ReleaseLeaseResponse:
        await self._store.release(self._callers.of(context, request.client_id), request.lease_id)
        return pb.ReleaseLeaseResponse()

    async def Prefetch(self, request: pb.PrefetchRequest, context: Context) -> pb.PrefetchResponse:
        outcome = await self._store.prefetch(
            self._callers.of(context),
            split_keys(request.keys, field="keys", count_max=self._limits.keys_max),
            within_s=request.deadline_ms / 1000,
            wait=request.wait,
        )
        return pb.PrefetchResponse(**outcome._asdict())

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        keys = split_keys(request.keys, field="keys", count_max=self._limits.keys_max)
        if request.tier not in _TIERS:
            raise InvalidRequest("name the tier to evict from: TIER_DRAM or TIER_SSD", field="tier")
        outcome = await self._store.evict(self._callers.of(context), keys, _TIERS[request.tier])
        return pb.EvictResponse(**outcome._asdict())

    async def ReportRequest(self, request: pb.ReportRequestRequest, context: Context) -> pb.ReportRequestResponse:
        caller, report = self._callers.of(context), request.report
        record = report_record(report, self._store.clock.wall_ms())
        self._store.requests.note_report(caller, report.request_id, record)
        return pb.ReportRequestResponse()

    async def _next_data(self, requests: AsyncIterator[bytes]) -> bytes | None:
        try:
            async with asyncio.timeout(self._limits.transfer_idle_s):
                return await anext(requests, None)
        except TimeoutError as error:
            raise IncompleteSave(f"nothing came for {self._limits.transfer_idle_s:g} s") from error

    async def _next_message(self, requests: AsyncIterator[bytes]) -> Frame | pb.SaveHeader | pb.SaveCommit:
        data = await self._next_data(requests)
        if data is None:
            raise IncompleteSave("the stream ended without a commit")
        return decode_save(data)

    def _check_size(self, frame: Frame) -> None:
        if len(frame.payload) > self._limits.frame_bytes:
            raise InvalidFrame(
                f"a frame carries {len(frame.payload)} bytes; at most {self._limits.frame_bytes} are allowed"
            )


def _encode(part: Part) -> bytes:
    return encode_frame(part.layer, part.first_block, part.first_offset_bytes, part.runs)
