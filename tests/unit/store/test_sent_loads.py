"""Loads that threads send: blocks are held from the step that finds their lease on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvservice.store.leases import Client
from kvservice.store.types import Part, Span
from kvservice_api.errors import LeaseExpired
from tests.stores import OpenStore, caller_of, some_chain, some_images


class Sent:
    """A `PartSender` that sends all parts at once."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.sent_bytes = 0

    def when_joined(self, call: Callable[[], None] | None) -> None:
        if call is not None:
            call()

    def put(self, parts: Sequence[Part], *, is_last: bool) -> None:
        self.parts += parts
        self.sent_bytes += sum(len(run) for part in parts for run in part.runs)

    async def until_sent(self, size_bytes: int) -> None:
        assert self.sent_bytes >= size_bytes

    async def until_taken(self) -> None:
        pass

    async def stop(self) -> None:
        pass


async def test_a_load_whose_lease_ends_before_it_begins_sends_nothing(opened: OpenStore, client: Client) -> None:
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain))
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    send = await opened.store.loads.to_send(caller_of(client), lease.lease_id, None, Span(), Span())
    await opened.leases.release(caller_of(client), lease.lease_id)
    sent = Sent()
    with pytest.raises(LeaseExpired):
        await send(sent)
    assert not sent.parts
