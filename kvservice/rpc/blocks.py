"""BlockService: the RPCs of ``blocks.proto``, each a few lines over the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing

import numpy as np
from numpy.typing import NDArray

from kvservice.bulk.port import BulkPort
from kvservice.rpc.calls import Callers, Context, certificate_of
from kvservice.rpc.messages import residency_runs, tier_of
from kvservice.rpc.reports import report_record
from kvservice.store.caller import Caller
from kvservice.store.store import BlockStore
from kvservice.store.types import (
    SAVE_BLOCKS_MAX,
    SAVE_SLICES_MAX,
    TAILS_MAX,
    Lease,
    Located,
    NotInPlace,
    Part,
    SaveChain,
    SaveHeader,
    SaveOutcome,
    Span,
)
from kvservice_api import spans
from kvservice_api.errors import InvalidRequest, KVError
from kvservice_api.frames import HEAD_BYTES_MAX, Frame, decode_save, encode_frame
from kvservice_api.keys import split_keys
from kvservice_api.layout import Layout, Shard
from kvservice_api.session_ids import checked_session_id
from kvservice_api.status import to_status
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2

_SESSIONS_MAX = 64  # Of one request: they may name half a million blocks.

_WithShard = (
    pb.LookupPrefixRequest | pb.SaveHeader | pb.LoadBlocksRequest | pb.LocateBlocksRequest | pb.AdoptLeaseRequest
)

_ON_SSD: Mapping[int, bool] = {
    types_pb2.DURABILITY_UNSPECIFIED: False,
    types_pb2.DURABILITY_DRAM: False,
    types_pb2.DURABILITY_SSD: True,
}


class BlockService:
    def __init__(
        self,
        store: BlockStore,
        *,
        version: str,
        residency_directory: Callable[[], str],
        cuda_ipc_refused_because: Callable[[], str],
        bulk: BulkPort,
    ) -> None:
        """`residency_directory` returns the path of the file that clients on this host may read; empty if there is
        none. `cuda_ipc_refused_because` is empty while DeviceService can be used.
        """
        self._store = store
        self._callers = Callers(store)
        self._version = version
        self._residency_directory = residency_directory
        self._cuda_ipc_refused_because = cuda_ipc_refused_because
        self._bulk = bulk

    async def GetCapabilities(self, request: pb.GetCapabilitiesRequest, context: Context) -> pb.GetCapabilitiesResponse:
        store, limits, arena = self._store, self._store.limits, self._store.status.arena
        shared = pb.GetCapabilitiesResponse(
            arena_directory=arena.directory, arena_id=arena.arena_id, arena_capacity_bytes=arena.capacity_bytes
        )
        no_cuda = self._cuda_ipc_refused_because()
        faster = {"cuda_ipc": not no_cuda, "shm": not arena.not_shared_because, "bulk": bool(self._bulk.port)}
        transports = [*(name for name, is_offered in faster.items() if is_offered), "grpc"]
        answer = pb.GetCapabilitiesResponse() if arena.not_shared_because else shared
        answer.MergeFrom(
            pb.GetCapabilitiesResponse(
                version=self._version,
                boot_epoch=store.boot_epoch,
                store_id=store.store_id,
                max_frame_bytes=limits.frame_bytes + HEAD_BYTES_MAX,
                max_keys=limits.keys_max,
                max_save_blocks=SAVE_BLOCKS_MAX,
                max_save_slices=SAVE_SLICES_MAX,
                max_tails=TAILS_MAX,
                keeps_generations=True,
                takes_hints=True,
                restores_sessions=True,
                max_save_chains=SAVE_BLOCKS_MAX,
                max_lease_ttl_ms=int(limits.lease_ttl_max_s * 1000),
                transports=transports,
                cuda_ipc_refused_because=no_cuda,
                bulk_port=self._bulk.port,
                arena_writable=arena.is_writable,
                arena_not_shared_because=arena.not_shared_because,
                residency_directory=self._residency_directory(),
                max_session_slices=limits.session.slices_max,
                session_ttl_ms=int(limits.session.ttl_s * 1000),
            )
        )
        return answer

    async def OpenLayout(self, request: pb.OpenLayoutRequest, context: Context) -> pb.OpenLayoutResponse:
        layout = Layout.from_proto(request.layout, request.fingerprint)
        return pb.OpenLayoutResponse(created=await self._store.layouts.open(self._callers.of(context), layout))

    async def Attach(self, requests: AsyncIterator[pb.AttachRequest], context: Context) -> None:
        first = await anext(requests, None)
        if first is None:
            return
        caller = self._callers.of(context)
        client = self._store.leases.attach(caller, first.client_name)
        try:
            answer = pb.AttachResponse(client_id=client.client_id, boot_epoch=self._store.boot_epoch)
            await context.write(answer)
            async for _ in requests:  # Ends when the client closes its side, or disconnects.
                pass
        finally:
            self._store.leases.detach(caller, client)

    async def LookupPrefix(self, request: pb.LookupPrefixRequest, context: Context) -> pb.LookupPrefixResponse:
        only_tails = request.parent_key and not request.keys
        keys_max = self._store.limits.keys_max
        caller = self._callers.of(context, request.client_id)
        hit = await self._store.lookups.lookup(
            caller,
            request.layout_fingerprint,
            shard_of(request),
            [] if only_tails else split_keys(request.keys, field="keys", count_max=keys_max),
            request.lease_ttl_ms / 1000,
            request.request_id,
            request.parent_key,
            # After the answer is sent. A span is recorded within that of its call.
            asyncio.get_running_loop().call_soon if spans.current() is None else None,
        )
        answer = pb.LookupPrefixResponse(
            hit_blocks=hit.blocks,
            runs=residency_runs(hit.runs),
            tails=[pb.Tail(key=key, token_count=count) for key, count in hit.tails],
            lease_id=hit.lease.lease_id if hit.lease is not None else 0,
            lease_ttl_ms=round(hit.ttl_s * 1000),
        )
        if hit.lease is not None:
            if request.locate:
                self._locate(caller, hit.lease, answer)
            if request.offer_load:
                self._offer_load(caller, hit.lease, request.offer_load, context, answer)
            if not (answer.HasField("located") or answer.HasField("offered_load")):
                self._store.loads.expect(caller, hit.lease.lease_id)
        return answer

    async def LoadBlocks(self, request: pb.LoadBlocksRequest, context: Context) -> None:
        await self._store.loads.load(
            self._callers.of(context, request.client_id),
            request.lease_id,
            shard_of(request),
            Span(request.first_block, request.block_count),
            Span(request.first_layer, request.layer_count),
            _encode,
            context.write,
        )

    async def SaveBlocks(self, requests: AsyncIterator[bytes], context: Context) -> pb.SaveBlocksResponse:
        incoming = self._store.saves.incoming(self._callers.of(context), requests)
        first = decode_save(await incoming.next())
        if not isinstance(first, pb.SaveHeader):
            raise InvalidRequest("the first message of a save must be its header", field="header")
        caller = self._callers.of(context, first.client_id)
        header, on_ssd = save_header(first)
        self._bulk.supersede(caller, header.keys)
        async with self._store.saves.save(caller, header) as upload:
            while isinstance(message := decode_save(await incoming.next()), Frame):
                await upload.put(message)
            if not isinstance(message, pb.SaveCommit):
                raise InvalidRequest("a save has one header", field="header")
            if not await incoming.ended():
                raise InvalidRequest("nothing may follow the commit", field="commit")
            return save_response(await upload.commit(checksums_of(message.checksums), on_ssd=on_ssd))

    # On sockets of their own

    async def OpenTransfer(self, request: pb.OpenTransferRequest, context: Context) -> pb.OpenTransferResponse:
        certificate = certificate_of(context)
        if request.WhichOneof("transfer") == "load":
            load = request.load
            opened = await self._bulk.open_load(
                self._callers.of(context, load.client_id),
                certificate,
                load.lease_id,
                shard_of(load),
                Span(load.first_block, load.block_count),
                Span(load.first_layer, load.layer_count),
                request.connections,
            )
            return pb.OpenTransferResponse(tickets=opened.tickets, ttl_ms=round(opened.ttl_s * 1000))
        if request.WhichOneof("transfer") == "calls":
            caller = self._callers.of(context, request.calls.client_id)
            opened = self._bulk.open_calls(caller, certificate, request.connections)
            return pb.OpenTransferResponse(tickets=opened.tickets, ttl_ms=round(opened.ttl_s * 1000))
        if request.WhichOneof("transfer") != "save":
            raise InvalidRequest("a transfer is a load, a save or calls", field="transfer")
        caller = self._callers.of(context, request.save.client_id)
        header, on_ssd = save_header(request.save)
        opened, upload = await self._bulk.open_save(
            caller, certificate, header, request.connections, _encode_result, on_ssd=on_ssd
        )
        return pb.OpenTransferResponse(
            tickets=opened.tickets,
            ttl_ms=round(opened.ttl_s * 1000),
            blocks=[place.position for place in upload.places],
            refused=refused_blocks(upload.refused),
        )

    # For clients that map the arena: the places of blocks instead of bytes.

    async def LocateBlocks(self, request: pb.LocateBlocksRequest, context: Context) -> None:
        caller = self._callers.of(context, request.client_id)
        blocks = Span(request.first_block, request.block_count)
        found = self._store.loads.locate(caller, request.lease_id, shard_of(request), blocks, verify=request.verify)
        async with aclosing(found) as steps:
            answer = pb.LocateBlocksResponse()
            async for step in steps:
                if isinstance(step, Located):
                    answer = pb.LocateBlocksResponse()
                    self._put_places(step, answer)  # They are sent with the first count of layers.
                    continue
                if isinstance(step, NotInPlace):
                    answer.not_in_place_because = step.why
                else:
                    answer.layers_ready = step
                await context.write(answer)
                answer = pb.LocateBlocksResponse()

    async def ReserveBlocks(self, request: pb.ReserveBlocksRequest, context: Context) -> pb.ReserveBlocksResponse:
        caller = self._callers.of(context, request.header.client_id)
        header, on_ssd = save_header(request.header)
        places, refused = await self._store.saves.reserve(caller, request.reservation_id, header, on_ssd=on_ssd)
        return pb.ReserveBlocksResponse(
            arena_id=self._store.status.arena.arena_id,
            blocks=[place.position for place in places],
            offsets=[place.extent.offset_bytes for place in places],
            refused=refused_blocks(refused),
        )

    async def CommitBlocks(self, request: pb.CommitBlocksRequest, context: Context) -> pb.SaveBlocksResponse:
        caller = self._callers.of(context, request.client_id)
        checksums = checksums_of(request.checksums)
        return save_response(await self._store.saves.commit(caller, request.reservation_id, checksums))

    async def AbandonBlocks(self, request: pb.AbandonBlocksRequest, context: Context) -> pb.AbandonBlocksResponse:
        self._store.saves.abandon(self._callers.of(context, request.client_id), request.reservation_id)
        return pb.AbandonBlocksResponse()

    # Leases, hints and reports

    async def ExportLease(self, request: pb.ExportLeaseRequest, context: Context) -> pb.ExportLeaseResponse:
        caller = self._callers.of(context, request.client_id)
        ttl_s = request.ttl_ms / 1000
        ticket, granted_s = self._store.tickets.export(caller, request.lease_id, ttl_s, request.adoptions)
        return pb.ExportLeaseResponse(ticket=ticket, ttl_ms=round(granted_s * 1000))

    async def AdoptLease(self, request: pb.AdoptLeaseRequest, context: Context) -> pb.AdoptLeaseResponse:
        caller = self._callers.of(context, request.client_id)
        adopted = await self._store.tickets.adopt(
            caller,
            request.ticket,
            request.layout_fingerprint,
            shard_of(request),
            request.lease_ttl_ms / 1000,
        )
        answer = pb.AdoptLeaseResponse(
            lease_id=adopted.lease.lease_id,
            lease_ttl_ms=round(adopted.ttl_s * 1000),
            token_counts=adopted.token_counts,
            runs=residency_runs(adopted.runs),
        )
        if request.locate:
            self._locate(caller, adopted.lease, answer)
        if request.offer_load:
            self._offer_load(caller, adopted.lease, request.offer_load, context, answer)
        return answer

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        caller = self._callers.of(context, request.client_id)
        granted_s = self._store.leases.renew(caller, request.lease_id, request.ttl_ms / 1000)
        return pb.RenewLeaseResponse(ttl_ms=round(granted_s * 1000))

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, context: Context) -> pb.ReleaseLeaseResponse:
        caller = self._callers.of(context, request.client_id)
        loads = [(Span(each.first_block, each.block_count), each.took_us / 1e6) for each in request.loads]
        try:
            self._store.loads.note_in_place(caller, request.lease_id, loads)
        finally:
            await self._store.leases.release(caller, request.lease_id)
        return pb.ReleaseLeaseResponse()

    async def Prefetch(self, request: pb.PrefetchRequest, context: Context) -> pb.PrefetchResponse:
        caller = self._callers.of(context)
        keys, missing_sessions = await self._keys(caller, request)
        outcome = await self._store.moves.prefetch(caller, keys, within_s=request.deadline_ms / 1000, wait=request.wait)
        return pb.PrefetchResponse(**outcome._asdict(), missing_sessions=missing_sessions)

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        caller = self._callers.of(context)
        keys, missing_sessions = await self._keys(caller, request)
        tier = tier_of(request.tier, request.tier_name, self._store.tier_names)
        outcome = await self._store.moves.evict(caller, keys, tier)
        return pb.EvictResponse(**outcome._asdict(), missing_sessions=missing_sessions)

    async def _keys(self, caller: Caller, request: pb.PrefetchRequest | pb.EvictRequest) -> tuple[list[bytes], int]:
        """The keys that a request names, with those of its sessions, and how many sessions do not exist."""
        if (count := len(request.sessions)) > _SESSIONS_MAX:
            raise InvalidRequest(f"{count} sessions are named; at most {_SESSIONS_MAX} are allowed", field="sessions")
        names = [(each.layout_fingerprint, checked_session_id(each.session_id)) for each in request.sessions]
        keys, missing = await self._store.sessions.keys(caller, names)
        if request.keys or not names:
            keys += split_keys(request.keys, field="keys", count_max=self._store.limits.keys_max)
        return keys, missing

    async def ReportRequest(self, request: pb.ReportRequestRequest, context: Context) -> pb.ReportRequestResponse:
        caller, report = self._callers.of(context), request.report
        record = report_record(report, self._store.clock.wall_ms())
        self._store.lookups.report(caller, report.request_id, record)
        return pb.ReportRequestResponse()

    # Key generations

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        number = self._store.layouts.generation(self._callers.of(context), request.layout_fingerprint)
        return pb.GetGenerationResponse(generation=number)

    async def BeginGeneration(self, request: pb.BeginGenerationRequest, context: Context) -> pb.BeginGenerationResponse:
        number = await self._store.layouts.begin_generation(self._callers.of(context), request.layout_fingerprint)
        return pb.BeginGenerationResponse(generation=number)

    def _locate(self, caller: Caller, lease: Lease, answer: pb.LookupPrefixResponse | pb.AdoptLeaseResponse) -> None:
        """Add the places of all blocks of a new lease, if they are few, and can be read there now."""
        if (places := self._store.loads.places_of(caller, lease.lease_id)) is not None:
            located, answer.located_verified = places
            self._put_places(located, answer.located)
            answer.located.layers_ready = lease.shard.layers

    def _offer_load(
        self,
        caller: Caller,
        lease: Lease,
        connections: int,
        context: Context,
        answer: pb.LookupPrefixResponse | pb.AdoptLeaseResponse,
    ) -> None:
        """Add tickets for a load of all blocks of a new lease, if there is a bulk port."""
        offered = self._bulk.offer_load(caller, certificate_of(context), lease.lease_id, connections)
        if offered is not None:
            answer.offered_load.tickets.extend(offered.tickets)
            answer.offered_load.ttl_ms = round(offered.ttl_s * 1000)

    def _put_places(self, located: Located, answer: pb.LocateBlocksResponse) -> None:
        answer.arena_id = self._store.status.arena.arena_id
        answer.offsets.extend(located.offsets.tolist())
        answer.generations.extend(located.generations)
        answer.trailer_checksums.extend(located.trailer_checksums.tolist())
        answer.token_counts.extend(located.token_counts.tolist())
        answer.shards = np.ascontiguousarray(located.shards).tobytes()


def _encode(part: Part) -> bytes:
    return encode_frame(part.layer, part.first_block, part.first_offset_bytes, part.runs)


def _encode_result(outcome: SaveOutcome) -> bytes:
    return save_response(outcome).SerializeToString()


def save_header(header: pb.SaveHeader) -> tuple[SaveHeader, bool]:
    """The chains and the shard of a save, and whether it must be durable on SSD. Raises InvalidRequest."""
    if header.durability not in _ON_SSD:  # Never promise less than was asked for.
        raise InvalidRequest(f"no durability has the number {header.durability}", field="durability")
    chains = [_save_chain(header), *map(_save_chain, header.more)]
    if (count := sum(len(chain.keys) for chain in chains)) > SAVE_BLOCKS_MAX:
        raise InvalidRequest(f"the chains have {count} keys; at most {SAVE_BLOCKS_MAX} are allowed", field="keys")
    return SaveHeader(header.layout_fingerprint, shard_of(header), chains), _ON_SSD[header.durability]


def _save_chain(chain: pb.SaveHeader | pb.SaveChain) -> SaveChain:
    keys = split_keys(chain.keys, field="keys", count_max=SAVE_BLOCKS_MAX)
    return SaveChain(chain.parent_key, keys, chain.last_block_tokens)


def save_response(outcome: SaveOutcome) -> pb.SaveBlocksResponse:
    return pb.SaveBlocksResponse(
        stored=len(outcome.stored),
        already_stored=len(outcome.already_stored),
        refused=refused_blocks(outcome.refused),
        stored_blocks=sorted(outcome.stored),
    )


def refused_blocks(refused: Mapping[int, KVError]) -> list[pb.RefusedBlock]:
    return [pb.RefusedBlock(block=block, status=to_status(error)) for block, error in sorted(refused.items())]


def checksums_of(data: bytes) -> NDArray[np.uint64]:
    if len(data) % 8:
        raise InvalidRequest("checksums must have 8 bytes each", field="checksums")
    return np.frombuffer(data, "<u8").astype(np.uint64)


def shard_of(request: _WithShard) -> Shard | None:
    return Shard.from_proto(request.shard) if request.HasField("shard") else None
