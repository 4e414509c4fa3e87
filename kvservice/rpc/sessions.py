"""SessionService: the RPCs of ``sessions.proto``, each a few lines over the store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvservice.index.session_records import Manifest
from kvservice.rpc.callers import Callers
from kvservice.rpc.interceptors import Context
from kvservice.store.sessions.manifests import Turn
from kvservice.store.sessions.messages import session_message
from kvservice.store.store import BlockStore
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import KEY_BYTES, split_keys
from kvservice_api.layout import Shard
from kvservice_api.v1 import blocks_pb2
from kvservice_api.v1 import sessions_pb2 as pb

_POSITIONS_MAX = 65536
_RANGES_MAX = 4096  # A few milliseconds of the event loop.


class SessionService:
    def __init__(self, store: BlockStore, *, keys_max: int) -> None:
        self._store = store
        self._callers = Callers(store.leases)
        self._keys_max = keys_max

    async def AppendTurn(self, request: pb.AppendTurnRequest, context: Context) -> pb.AppendTurnResponse:
        manifest = await self._store.sessions.append(
            self._callers.of(context),
            request.layout_fingerprint,
            request.session_id,
            request.expected_revision,
            self._turn(request),
        )
        return pb.AppendTurnResponse(session=self._head(manifest))

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        shard = Shard.from_proto(request.shard) if request.HasField("shard") else None
        manifest, usable, runs = self._store.session_history(
            self._callers.of(context), request.layout_fingerprint, request.session_id, shard
        )
        return pb.GetSessionResponse(
            session=session_message(manifest, self._store.index.layouts[manifest.layout_id]),
            stored_slices=usable,
            stored_tokens=int(manifest.slices["token_count"][:usable].sum(dtype=np.uint64)),
            runs=[blocks_pb2.ResidencyRun(count=count, dram=dram, ssd=ssd) for count, dram, ssd in runs],
        )

    async def TruncateSession(self, request: pb.TruncateSessionRequest, context: Context) -> pb.TruncateSessionResponse:
        _check_count("keep", request.keep, _RANGES_MAX)
        manifest = await self._store.sessions.truncate(
            self._callers.of(context),
            request.layout_fingerprint,
            request.session_id,
            request.expected_revision,
            [(part.first, part.count) for part in request.keep],
        )
        return pb.TruncateSessionResponse(session=self._head(manifest))

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        manifest = await self._store.sessions.fork(
            self._callers.of(context),
            request.layout_fingerprint,
            request.session_id,
            request.new_session_id,
            request.expected_revision,
        )
        return pb.ForkSessionResponse(session=self._head(manifest))

    async def EndSession(self, request: pb.EndSessionRequest, context: Context) -> pb.EndSessionResponse:
        ended = await self._store.sessions.end(
            self._callers.of(context), request.layout_fingerprint, request.session_id
        )
        return pb.EndSessionResponse(ended=ended)

    def _turn(self, request: pb.AppendTurnRequest) -> Turn:
        if len(request.parent_key) != KEY_BYTES:
            raise InvalidRequest(f"parent_key has {len(request.parent_key)} bytes, not {KEY_BYTES}", field="parent_key")
        _check_count("stored_positions", request.stored_positions, _POSITIONS_MAX)
        return Turn(
            request.parent_key,
            split_keys(request.keys, field="keys", count_max=self._keys_max),
            request.last_block_tokens,
            request.stored_position if request.HasField("stored_position") else None,
            np.array(request.stored_positions, np.uint64),
        )

    def _head(self, manifest: Manifest) -> pb.Session:
        return session_message(manifest, self._store.index.layouts[manifest.layout_id], bytes_max=0)


def _check_count(field: str, items: Sequence[object], count_max: int) -> None:
    if len(items) > count_max:
        raise InvalidRequest(f"{field} has {len(items)} entries; at most {count_max} are allowed", field=field)
