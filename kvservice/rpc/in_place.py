"""The RPCs of BlockService for clients that map the arena: they carry places instead of bytes."""

from __future__ import annotations

from contextlib import aclosing

import numpy as np

from kvservice.rpc.callers import Callers
from kvservice.rpc.interceptors import Context
from kvservice.rpc.messages import checksums_of, refused_blocks, save_header, save_response, shard_of
from kvservice.store.store import BlockStore
from kvservice.store.types import Located, NotInPlace, Span
from kvservice_api.v1 import blocks_pb2 as pb


class InPlaceRpcs:
    """A part of BlockService."""

    _store: BlockStore
    _callers: Callers

    async def LocateBlocks(self, request: pb.LocateBlocksRequest, context: Context) -> None:
        caller = self._callers.of(context, request.client_id)
        blocks = Span(request.first_block, request.block_count)
        found = self._store.locate(caller, request.lease_id, shard_of(request), blocks, verify=request.verify)
        async with aclosing(found) as steps:
            answer = pb.LocateBlocksResponse()
            async for step in steps:
                if isinstance(step, Located):
                    answer = self._places(step)  # They travel with the first count of layers.
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
        places, refused = await self._store.reserve(caller, request.reservation_id, header, on_ssd=on_ssd)
        return pb.ReserveBlocksResponse(
            arena_id=self._store.arena.arena_id,
            blocks=[place.position for place in places],
            offsets=[place.extent.offset_bytes for place in places],
            refused=refused_blocks(refused),
        )

    async def CommitBlocks(self, request: pb.CommitBlocksRequest, context: Context) -> pb.SaveBlocksResponse:
        caller = self._callers.of(context, request.client_id)
        checksums = checksums_of(request.checksums)
        return save_response(await self._store.commit(caller, request.reservation_id, checksums))

    async def AbandonBlocks(self, request: pb.AbandonBlocksRequest, context: Context) -> pb.AbandonBlocksResponse:
        self._store.abandon(self._callers.of(context, request.client_id), request.reservation_id)
        return pb.AbandonBlocksResponse()

    def _places(self, located: Located) -> pb.LocateBlocksResponse:
        return pb.LocateBlocksResponse(
            arena_id=self._store.arena.arena_id,
            offsets=[extent.offset_bytes for extent in located.extents],
            generations=located.generations,
            trailer_checksums=located.trailer_checksums.tolist(),
            token_counts=located.token_counts.tolist(),
            shards=np.ascontiguousarray(located.shards).tobytes(),
        )
