"""Calls of BlockService on connections of the bulk port: by the handlers, counts and errors of those over gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, cast

import grpc
from google.protobuf import message_factory
from google.rpc import status_pb2

from kvservice.rpc.blocks import BlockService
from kvservice.rpc.calls import DETAILS_KEY, BulkContext, CallCounts, Context, guarded
from kvservice.store.caller import Caller
from kvservice.store.tasks import LoopBudget
from kvservice_api.bulk import CALLS, MessageKind
from kvservice_api.v1 import blocks_pb2


class BulkCalls:
    def __init__(self, service: BlockService, counts: CallCounts, loop_budget: LoopBudget) -> None:
        methods = blocks_pb2.DESCRIPTOR.services_by_name["BlockService"].methods_by_name
        requests = [message_factory.GetMessageClass(methods[name].input_type) for name in CALLS]
        self._handlers = [
            guarded(getattr(service, name), counts, loop_budget, request.FromString)
            for name, request in zip(CALLS, requests, strict=True)
        ]

    async def answer(
        self, number: int, request: bytes, caller: Caller, certificate: bytes
    ) -> tuple[MessageKind, bytes]:
        """As `kvservice.bulk.calls.Answer`."""
        context = _Context(caller.principal, certificate)
        try:
            answer = await self._handlers[number](request, cast(Context, context))
        except _Refused as refused:
            return MessageKind.ERROR, refused.status
        return MessageKind.ANSWER, answer.SerializeToString()


class _Refused(Exception):
    def __init__(self, status: bytes) -> None:
        self.status = status


class _Context(BulkContext):
    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, message: str, details: Sequence[tuple[str, bytes]] = ()) -> NoReturn:
        status = dict(details).get(DETAILS_KEY)
        raise _Refused(status or status_pb2.Status(code=code.value[0], message=message).SerializeToString())
