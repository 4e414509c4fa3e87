"""SessionService: the RPCs of ``sessions.proto``, each a few lines over the store's sessions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvservice.rpc.calls import Callers, Context
from kvservice.rpc.messages import residency_runs
from kvservice.rpc.session_messages import change_refused, session_content, session_message
from kvservice.store.store import BlockStore
from kvservice.store.types import KEEP_RANGES_MAX, POSITIONS_MAX, SessionAppend
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import KEY_BYTES, split_keys
from kvservice_api.layout import Shard
from kvservice_api.v1 import sessions_pb2 as pb


class SessionService:
    def __init__(self, store: BlockStore) -> None:
        self._sessions = store.sessions
        self._keys_max = store.limits.keys_max
        self._slices_max = store.limits.session.slices_max
        self._callers = Callers(store)

    async def AppendTurn(self, request: pb.AppendTurnRequest, context: Context) -> pb.AppendTurnResponse:
        caller, turn = self._callers.of(context), self._turn(request)
        with change_refused():
            session = await self._sessions.append(
                caller, request.layout_fingerprint, request.session_id, request.expected_revision, turn
            )
        return pb.AppendTurnResponse(session=session_message(session, bytes_max=0))

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        caller = self._callers.of(context)
        shard = Shard.from_proto(request.shard) if request.HasField("shard") else None
        session, usable, runs = self._sessions.get(caller, request.layout_fingerprint, request.session_id, shard)
        return pb.GetSessionResponse(
            session=session_message(session),
            stored_slices=usable,
            stored_tokens=int(session.manifest.slices["token_count"][:usable].sum(dtype=np.uint64)),
            runs=residency_runs(runs),
        )

    async def TruncateSession(self, request: pb.TruncateSessionRequest, context: Context) -> pb.TruncateSessionResponse:
        _check_count("keep", request.keep, KEEP_RANGES_MAX)
        caller, keep = self._callers.of(context), [(part.first, part.count) for part in request.keep]
        with change_refused():
            session = await self._sessions.truncate(
                caller, request.layout_fingerprint, request.session_id, request.expected_revision, keep
            )
        return pb.TruncateSessionResponse(session=session_message(session, bytes_max=0))

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        caller, fingerprint = self._callers.of(context), request.layout_fingerprint
        with change_refused():
            session = await self._sessions.fork(
                caller, fingerprint, request.session_id, request.new_session_id, request.expected_revision
            )
        return pb.ForkSessionResponse(session=session_message(session, bytes_max=0))

    async def EndSession(self, request: pb.EndSessionRequest, context: Context) -> pb.EndSessionResponse:
        caller = self._callers.of(context)
        ended = await self._sessions.end(caller, request.layout_fingerprint, request.session_id)
        return pb.EndSessionResponse(ended=ended)

    async def RestoreSession(self, request: pb.RestoreSessionRequest, context: Context) -> pb.RestoreSessionResponse:
        caller, given = self._callers.of(context), request.session
        content = session_content(given, self._slices_max)
        with change_refused():
            session, changed = await self._sessions.restore(
                caller, given.layout_fingerprint, given.session_id, request.expected_revision, content
            )
        return pb.RestoreSessionResponse(session=session_message(session, bytes_max=0), changed=changed)

    def _turn(self, request: pb.AppendTurnRequest) -> SessionAppend:
        if len(request.parent_key) != KEY_BYTES:
            raise InvalidRequest(f"parent_key has {len(request.parent_key)} bytes, not {KEY_BYTES}", field="parent_key")
        _check_count("stored_positions", request.stored_positions, POSITIONS_MAX)
        return SessionAppend(
            request.parent_key,
            split_keys(request.keys, field="keys", count_max=self._keys_max),
            request.last_block_tokens,
            request.stored_position if request.HasField("stored_position") else None,
            np.array(request.stored_positions, np.uint64),
        )


def _check_count(field: str, items: Sequence[object], count_max: int) -> None:
    if len(items) > count_max:
        raise InvalidRequest(f"{field} has {len(items)} entries; at most {count_max} are allowed", field=field)
