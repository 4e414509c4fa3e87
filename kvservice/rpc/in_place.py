"""The RPCs of BlockService for clients that map the arena: they carry places instead of bytes."""

from __future__ import annotations

from contextlib import aclosing

import numpy as np

from kvservice.rpc.callers import Callers
from kvservice.rpc.interceptors import Context
from kvservice.rpc.messages import ON_SSD, block_range, checksums_of, save_request, save_response, shard_of
from kvservice.store.store import BlockStore
from kvservice.store.transfers.in_place_reads import Located, NotInPlace
from kvservice.store.transfers.upload import SaveOutcome
from kvservice_api.status import to_status
from kvservice_api.v1 import blocks_pb2 as pb


class InPlaceRpcs:
    """A part of BlockService."""

    _store: BlockStore
    _callers: Callers
    _loads_max: int

    async def LocateBlocks(self, request: pb.LocateBlocksRequest, context: Context) -> None:
        store, caller = self._store, self._callers.of(context, request.client_id)
        lease = await store.lease(caller, request.lease_id, shard_of(request))
        blocks = block_range(request.first_block, request.block_count, len(lease.rows), "block")
        found = store.locates.run(caller, lease, blocks, verify=request.verify, open_max=self._loads_max)
        layers = range(lease.shard.layers)
        with store.requests.load(caller, lease, blocks, layers, in_place=True) as record:
            async with aclosing(found) as steps:
                answer = pb.LocateBlocksResponse()
                async for step in steps:
                    if isinstance(step, Located):
                        answer = self._places(step)
                        continue
                    if isinstance(step, NotInPlace):
                        answer.not_in_place_because, record.ends_as = step.why, "not_in_place"
                    else:
                        answer.layers_ready = step
                        record.ends_as = "done" if step == len(layers) else ""
                    await context.write(answer)
                    answer = pb.LocateBlocksResponse()

    async def ReserveBlocks(self, request: pb.ReserveBlocksRequest, context: Context) -> pb.ReserveBlocksResponse:
        store, caller = self._store, self._callers.of(context, request.header.client_id)
        client, save = save_request(store, caller, request.header)
        on_ssd = ON_SSD[request.header.durability]
        reservation, places = await store.reservations.reserve(
            caller, request.reservation_id, client, save, on_ssd=on_ssd
        )
        refused = [
            pb.RefusedBlock(block=block, status=to_status(error))
            for block, error in sorted(reservation.outcome.refused.items())
        ]
        return pb.ReserveBlocksResponse(
            arena_id=store.dram.arena_id,
            blocks=[place.position for place in places],
            offsets=[place.extent.offset_bytes for place in places],
            refused=refused,
        )

    async def CommitBlocks(self, request: pb.CommitBlocksRequest, context: Context) -> pb.SaveBlocksResponse:
        caller = self._callers.of(context, request.client_id)
        client = self._store.leases.client(caller)
        checksums = checksums_of(request.checksums)
        outcome: SaveOutcome = await self._store.reservations.commit(caller, request.reservation_id, client, checksums)
        return save_response(outcome)

    async def AbandonBlocks(self, request: pb.AbandonBlocksRequest, context: Context) -> pb.AbandonBlocksResponse:
        caller = self._callers.of(context, request.client_id)
        client = self._store.leases.client(caller)
        self._store.reservations.abandon(caller, request.reservation_id, client)
        return pb.AbandonBlocksResponse()

    def _places(self, located: Located) -> pb.LocateBlocksResponse:
        blocks, rows = self._store.blocks, located.rows
        return pb.LocateBlocksResponse(
            arena_id=self._store.dram.arena_id,
            offsets=[extent.offset_bytes for extent in located.extents],
            generations=located.generations,
            trailer_checksums=blocks.trailer_checksum[rows].tolist(),
            token_counts=blocks.token_count[rows].tolist(),
            shards=np.ascontiguousarray(blocks.shard[rows]).tobytes(),
        )
