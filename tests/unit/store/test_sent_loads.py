"""Loads that threads send: blocks are held from the step that finds their lease on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.store.leases import Client
from kvservice.store.types import Part, Span
from kvservice_api.bulk import UNIT_BYTES
from kvservice_api.errors import LeaseExpired
from kvservice_api.image import PAGE_BYTES, block_geometry
from kvservice_api.layout import Layout, Shard
from tests.file_faults import HeldReads
from tests.stores import CALLER, OpenStore, caller_of, layers_of, on_ssd, some_chain, some_images, until


class Sent:
    """A `PartSender` that sends all parts at once."""

    def __init__(self, unit_bytes: int = UNIT_BYTES) -> None:
        self.unit_bytes = unit_bytes
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


WIDE = Layout(model_id="wide", dtype="float32", layers=2, kv_heads=2, k_head_dim=4096, v_head_dim=4096, block_tokens=16)


async def test_a_part_of_the_first_layer_is_sent_while_later_blocks_of_it_are_read(
    open_store: Callable[..., Any],
) -> None:
    """A slice is a part here."""
    size = block_geometry(WIDE, Shard.whole(WIDE), 16).image_bytes
    calls = HeldReads()
    opened: OpenStore = await open_store(calls=calls, dram_bytes=8 * size, ssd_bytes=8 * size)
    await opened.store.layouts.open(CALLER, WIDE)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2, layout=WIDE)
    images = await on_ssd(opened, client, chain, layout=WIDE)
    lease = opened.lookup(client, chain.keys, shard=Shard.whole(WIDE), layout=WIDE)
    assert lease is not None
    first, second = [opened.extents(TierName.SSD)[row].offset_bytes for row in lease.rows.tolist()]
    assert first < second
    calls.held_from = PAGE_BYTES + second  # After the file's header.
    sent = Sent()
    send = await opened.store.loads.to_send(caller_of(client), lease.lease_id, None, Span(), Span())
    load = asyncio.ensure_future(send(sent))
    await until(lambda: bool(sent.parts))
    assert [(part.layer, part.first_block) for part in sent.parts] == [(0, 0)]
    calls.gate.set()
    await load
    received = b"".join(bytes(run) for part in sent.parts for run in part.runs)
    assert received == b"".join(layers_of(images, shard=Shard.whole(WIDE)))


async def test_a_load_that_ends_while_a_block_comes_that_it_has_twice_leaves_no_read_behind(
    open_store: Callable[..., Any],
) -> None:
    size = block_geometry(WIDE, Shard.whole(WIDE), 16).image_bytes
    calls = HeldReads()
    opened: OpenStore = await open_store(calls=calls, dram_bytes=8 * size, ssd_bytes=8 * size)
    await opened.store.layouts.open(CALLER, WIDE)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(1, layout=WIDE)
    await on_ssd(opened, client, chain, layout=WIDE)
    lease = opened.lookup(client, [*chain.keys, *chain.keys], shard=Shard.whole(WIDE), layout=WIDE)
    assert lease is not None and len(lease.rows) == 2
    calls.held_from = 0
    send = await opened.store.loads.to_send(caller_of(client), lease.lease_id, None, Span(), Span())
    load = asyncio.ensure_future(send(Sent()))
    await until(lambda: reads_of_slices() > 0)
    load.cancel()
    await asyncio.wait({load})
    assert reads_of_slices() == 0
    calls.gate.set()


def reads_of_slices() -> int:
    """Running tasks of loads that wait for a slice."""
    return sum("_fetch_slice" in repr(task.get_coro()) for task in asyncio.all_tasks())
