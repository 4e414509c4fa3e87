"""HintService: the RPC of ``hints.proto``, over the store's hint streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from kvservice.rpc.calls import Callers, Context
from kvservice.store.store import BlockStore
from kvservice.store.types import Hint, HintStream, HintSubject, Nearness, QueuedReadiness
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import split_keys
from kvservice_api.session_ids import checked_session_id
from kvservice_api.v1 import hints_pb2 as pb

_TEXT_BYTES_MAX = 200
_READINESS_MAX = 4096  # Per response.
_HINTS_A_TURN = 64  # They take a millisecond of the event loop.
_READINESS: Mapping[Nearness, pb.Readiness] = {
    Nearness.IN_DRAM: pb.READINESS_IN_DRAM,
    Nearness.COMING: pb.READINESS_COMING,
    Nearness.ON_SSD: pb.READINESS_ON_SSD,
    Nearness.ABSENT: pb.READINESS_ABSENT,
}
_MS_MAX = 2**32 - 1


class HintService:
    def __init__(self, store: BlockStore) -> None:
        self._hints = store.hints
        self._keys_max = store.limits.keys_max
        self._callers = Callers(store)

    async def Exchange(self, requests: AsyncIterator[bytes], context: Context) -> None:
        first = await anext(requests, None)
        if first is None:
            return
        opening = pb.ExchangeRequest.FromString(first)
        with self._hints.open(self._callers.of(context, opening.client_id)) as stream:
            limits = pb.HintLimits(
                max_queued_requests=stream.limits.entries_max, max_queued_keys=stream.limits.keys_max
            )
            await context.write(pb.ExchangeResponse(limits=limits))
            reading = asyncio.ensure_future(self._read(opening, requests, stream))
            try:
                while (changed := await stream.changed(_READINESS_MAX)) is not None:
                    await context.write(pb.ExchangeResponse(readiness=map(_readiness, changed)))
                if reading.done():
                    await reading  # Raises what ended it.
            finally:
                reading.cancel()

    async def _read(self, opening: pb.ExchangeRequest, requests: AsyncIterator[bytes], stream: HintStream) -> None:
        """Apply messages until the client ends its side. Raises DecodeError."""
        try:
            await self._apply(opening, stream)
            async for data in requests:
                await self._apply(pb.ExchangeRequest.FromString(data), stream)
        finally:
            stream.end()

    async def _apply(self, request: pb.ExchangeRequest, stream: HintStream) -> None:
        if request.whole_queue:
            stream.clear_queue()
        for count, each in enumerate((*request.changes, *request.hints)):
            if count % _HINTS_A_TURN == 0:
                await stream.slot()
            try:
                if isinstance(each, pb.QueueChange):
                    self._change(each, stream)
                elif isinstance(each, pb.Hint):
                    self._hint(each, stream)
            except InvalidRequest:
                stream.note_invalid()

    def _change(self, change: pb.QueueChange, stream: HintStream) -> None:
        if change.WhichOneof("change") == "remove":
            stream.remove(change.remove)
        elif change.WhichOneof("change") == "put":
            put = change.put
            _check_text(put.request_id, "request_id")
            if not put.request_id:
                raise InvalidRequest("a queued request has an id", field="request_id")
            starts_in_s = put.starts_in_ms / 1000 if put.HasField("starts_in_ms") else None
            stream.put(put.request_id, self._subject(put.reads), starts_in_s, put.priority, put.before)
        else:
            raise InvalidRequest("a change of the queue puts or removes a request", field="change")

    def _hint(self, hint: pb.Hint, stream: HintStream) -> None:
        subject, kind = self._subject(hint.subject), hint.WhichOneof("kind")
        if kind == "turn_finished":
            _check_text(hint.turn_finished.stop_reason, "stop_reason")
            stream.turn_finished(subject, hint.turn_finished.answer_tokens)
        elif kind == "typing":
            stream.expect(subject, None, Hint.TYPING)
        elif kind == "tool_call":
            call = hint.tool_call
            _check_text(call.name, "name")
            within_s = call.expected_ms / 1000 if call.HasField("expected_ms") else None
            stream.expect(subject, within_s, Hint.TOOL_CALL, call.name)
        elif kind in ("session_ended", "do_not_keep"):
            stream.not_needed(subject, write=kind == "session_ended")
        else:
            raise InvalidRequest("the kind of a hint is missing, or newer than this daemon", field="kind")

    def _subject(self, subject: pb.HintSubject) -> HintSubject:
        if subject.keys:
            split_keys(subject.keys, field="keys", count_max=self._keys_max)
            return HintSubject(b"", "", subject.keys)
        session = subject.session
        return HintSubject(session.layout_fingerprint, checked_session_id(session.session_id))


def _check_text(text: str, field: str) -> None:
    if len(text.encode()) > _TEXT_BYTES_MAX:
        raise InvalidRequest(f"{field} is longer than {_TEXT_BYTES_MAX} bytes", field=field)


def _readiness(request: QueuedReadiness) -> pb.RequestReadiness:
    return pb.RequestReadiness(
        request_id=request.request_id,
        readiness=_READINESS[request.nearness],
        ready_in_ms=min(round(request.ready_in_s * 1000), _MS_MAX),
    )
