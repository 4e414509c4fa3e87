"""What every call has around its handler: turns of the event loop, and callers and errors on the bulk port."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.rpc import status_pb2

from kvservice.rpc.blocks import BlockService
from kvservice.rpc.bulk_calls import BulkCalls
from kvservice.rpc.calls import CallCounts, Callers, Context, certificate_of, guarded
from kvservice.store.caller import DEFAULT_TENANT, Caller
from kvservice.store.tasks import LoopBudget
from kvservice_api.bulk import CALLS, MessageKind
from kvservice_api.errors import DaemonUnavailable, KVError, LeaseExpired
from kvservice_api.status import from_status
from kvservice_api.v1 import blocks_pb2 as pb
from tests.stores import OpenStore

RELEASE = CALLS.index("ReleaseLease")


async def test_calls_that_come_at_once_begin_over_several_turns_of_the_event_loop() -> None:
    turn, begun = 0, Counter[int]()

    async def handler(request: int, context: object) -> int:
        begun[turn] += 1
        return request

    call = guarded(handler, CallCounts(), LoopBudget(8))
    answers = asyncio.gather(*(call(number, cast(Context, None)) for number in range(64)))
    while not answers.done():
        turn += 1
        await asyncio.sleep(0)
    assert await answers == list(range(64))
    assert max(begun.values()) == 8


async def test_a_call_on_the_bulk_port_is_its_callers_with_the_certificate_that_was_shown(opened: OpenStore) -> None:
    seen: list[tuple[Caller, bytes]] = []

    async def release(request: pb.ReleaseLeaseRequest, context: Any) -> pb.ReleaseLeaseResponse:
        seen.append((Callers(opened.store).of(context), certificate_of(context)))
        return pb.ReleaseLeaseResponse()

    counts = CallCounts()
    caller = Caller("CN=engine-1", DEFAULT_TENANT, b"")
    answer = await bulk_calls(release, counts).answer(RELEASE, b"", caller, b"sha")
    assert answer == (MessageKind.ANSWER, b"")
    assert seen == [(caller, b"sha")]
    assert counts.ended["ReleaseLease", "OK"] == 1


@pytest.mark.parametrize(
    ("failure", "kind", "counted"),
    [(LeaseExpired("it is over"), LeaseExpired, "LEASE_EXPIRED"), (ValueError(), DaemonUnavailable, "INTERNAL")],
)
async def test_an_error_of_a_call_on_the_bulk_port_is_that_of_one_over_grpc(
    failure: Exception, kind: type[KVError], counted: str
) -> None:
    async def release(request: object, context: object) -> None:
        raise failure

    counts = CallCounts()
    sent, data = await bulk_calls(release, counts).answer(RELEASE, b"", Caller("local", DEFAULT_TENANT, b""), b"")
    assert sent is MessageKind.ERROR
    assert type(from_status(status_pb2.Status.FromString(data))) is kind
    assert counts.errors["ReleaseLease", counted] == 1 and not counts.running["ReleaseLease"]


def bulk_calls(release: Any, counts: CallCounts) -> BulkCalls:
    release.__name__ = "ReleaseLease"
    service = SimpleNamespace(**dict.fromkeys(CALLS, release))
    return BulkCalls(cast(BlockService, service), counts, LoopBudget())
