"""Loads that threads send: blocks are held from the step that finds their lease on."""

from __future__ import annotations

import pytest

from kvservice.store.leases import Client
from kvservice.store.types import Span
from kvservice_api.errors import LeaseExpired
from kvservice_api.layout import Layout, Shard
from tests.stores import CALLER, OpenStore, Sent, caller_of, some_chain, some_images


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


SLICE = 4096
DEEP = Layout(model_id="deep", dtype="float32", layers=14, kv_heads=2, k_head_dim=16, v_head_dim=16, block_tokens=16)


@pytest.mark.parametrize(
    ("unit_slices", "sent"),
    [
        (8, [1, 1, 2, 4, 4, 2]),  # The first layer alone; then no more than was sent before, and no more than a unit.
        (3, [1] * 14),
        (2, [1] * 14),
        (1, [0.5] * 28),
    ],
)
async def test_layers_are_sent_alone_first_and_then_several_at_once(
    opened: OpenStore, client: Client, unit_slices: int, sent: list[float]
) -> None:
    await opened.store.layouts.open(CALLER, DEEP)
    chain, whole = some_chain(2, layout=DEEP), Shard.whole(DEEP)
    images = some_images(chain, shard=whole, layout=DEEP)
    await opened.save(client, chain, images, shard=whole, layout=DEEP)
    lease = opened.lookup(client, chain.keys, shard=whole, layout=DEEP)
    assert lease is not None
    parts = Sent(unit_bytes=unit_slices * SLICE)
    await (await opened.store.loads.to_send(caller_of(client), lease.lease_id, None, Span(), Span()))(parts)
    assert [len(part.checksums) / 2 for part in parts.parts] == sent
    assert parts.sent_bytes == 14 * 2 * SLICE
    assert [(part.layer, part.first_block) for part in parts.parts] == [
        (number // 2, number % 2) for number in range(28) if number in starts(sent)
    ]


def starts(sent: list[float]) -> set[int]:
    """The numbers of the slices with which parts of so many layers begin."""
    return {int(2 * sum(sent[:part])) for part in range(len(sent))}
