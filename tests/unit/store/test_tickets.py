"""Lease tickets: their blocks, their duration, their adopters, and which tickets are refused."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.store.caller import Tenant
from kvservice.store.leases import Client, Lease
from kvservice.store.tickets import ADOPTIONS_MAX, TICKET_BYTES
from kvservice_api.errors import (
    InvalidRequest,
    KVError,
    LeaseExpired,
    LeaseNotYours,
    Overloaded,
    TicketExpired,
    TicketForeign,
    TicketForged,
    TicketLayoutMismatch,
    TicketNotYours,
    TicketSpent,
    UnknownClient,
)
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Shard
from tests.stores import (
    CALLER,
    LAYOUT,
    LIMITS,
    WHOLE,
    OpenStore,
    at_once,
    caller_of,
    layers_of,
    some_chain,
    some_images,
    until,
)

TTL_S = 30.0
BOOT_EPOCH_AT = range(8, 16)


@pytest.fixture
def rank(opened: OpenStore) -> Client:
    return opened.store.leases.attach(CALLER, "rank")


async def leased(opened: OpenStore, client: Client, blocks: int = 3, **options: Any) -> tuple[BlockChain, Lease]:
    chain = some_chain(blocks, **options)
    await opened.save(client, chain, some_images(chain))
    await opened.settle()
    lease = opened.lookup(client, chain.keys, ttl_s=1000)
    assert lease is not None
    return chain, lease


def export(opened: OpenStore, client: Client, lease: Lease, *, ttl_s: float = TTL_S, adoptions: int = 1) -> bytes:
    ticket, _ = opened.store.tickets.export(caller_of(client), lease.lease_id, ttl_s, adoptions)
    return ticket


async def adopt(
    opened: OpenStore, client: Client, ticket: bytes, *, shard: Shard | None = None, ttl_s: float = TTL_S
) -> Lease:
    return (await opened.store.tickets.adopt(caller_of(client), ticket, LAYOUT.fingerprint, shard, ttl_s)).lease


async def evictable(opened: OpenStore, chain: BlockChain) -> int:
    """How many of the blocks nothing holds in DRAM. They are evicted."""
    return (await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)).evicted


# The blocks of a ticket


async def test_an_adopted_lease_is_the_ranks_own_on_the_same_blocks(
    opened: OpenStore, client: Client, rank: Client
) -> None:
    chain, lease = await leased(opened, client)
    adopted = await adopt(opened, rank, export(opened, client, lease))

    assert adopted.rows.tolist() == lease.rows.tolist()
    assert (adopted.client, adopted.layout, adopted.shard) == (rank, LAYOUT, WHOLE)
    opened.store.leases.detach(CALLER, client)
    assert await opened.load(opened.leases.get(caller_of(rank), adopted.lease_id)) == layers_of(some_images(chain))
    assert await evictable(opened, chain) == 0
    await opened.store.leases.release(caller_of(rank), adopted.lease_id)
    assert await evictable(opened, chain) == 3


async def test_blocks_of_a_ticket_that_dram_lacks_are_promoted_before_it_is_adopted(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(3)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    assert await evictable(opened, chain) == 3
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    export(opened, client, lease)
    await until(lambda: all(opened.blocks.is_resident(int(row), TierName.DRAM) for row in lease.rows))


async def test_a_ticket_holds_the_blocks_though_its_exporter_is_gone(
    opened: OpenStore, client: Client, rank: Client
) -> None:
    chain, lease = await leased(opened, client)
    ticket = export(opened, client, lease, adoptions=2)
    await opened.store.leases.release(caller_of(client), lease.lease_id)
    opened.store.leases.detach(CALLER, client)

    assert await evictable(opened, chain) == 0
    first = await adopt(opened, rank, ticket)
    assert await evictable(opened, chain) == 0
    await opened.store.leases.release(caller_of(rank), first.lease_id)
    assert await evictable(opened, chain) == 0, "one more adoption is allowed"
    second = await adopt(opened, rank, ticket)
    await opened.store.leases.release(caller_of(rank), second.lease_id)
    assert await evictable(opened, chain) == 3, "after the last adoption the ticket holds nothing"


async def test_a_ticket_releases_its_blocks_exactly_when_it_expires(
    opened: OpenStore, client: Client, rank: Client
) -> None:
    chain, lease = await leased(opened, client)
    ticket = export(opened, client, lease, ttl_s=TTL_S, adoptions=9)
    opened.store.leases.detach(CALLER, client)

    opened.files.clock.advance(seconds=TTL_S - 0.002)
    opened.leases.expire()
    adopted = await adopt(opened, rank, ticket)
    await opened.store.leases.release(caller_of(rank), adopted.lease_id)
    assert await evictable(opened, chain) == 0

    opened.files.clock.advance(seconds=0.002)
    for _ in range(2):  # Also before the daemon has ended the ticket's lease.
        with pytest.raises(TicketExpired):
            await adopt(opened, rank, ticket)
        opened.leases.expire()
    await opened.leases.drain_ended()
    assert await evictable(opened, chain) == 3


async def test_the_clients_limits_apply_to_adopted_leases_and_a_refused_adoption_does_not_count(
    open_store: Callable[..., Any],
) -> None:
    limits = dataclasses.replace(LIMITS, leases_per_client_max=2, leased_blocks_per_client_max=7)
    opened: OpenStore = await open_store(limits=limits)
    client, rank = opened.store.leases.attach(CALLER, "scheduler"), opened.store.leases.attach(CALLER, "rank")
    _, lease = await leased(opened, client)
    ticket = export(opened, client, lease, adoptions=3)
    first, _ = await adopt(opened, rank, ticket), await adopt(opened, rank, ticket)
    for _ in range(5):
        with pytest.raises(Overloaded):
            await adopt(opened, rank, ticket)
    await opened.store.leases.release(caller_of(rank), first.lease_id)
    await adopt(opened, rank, ticket)
    with pytest.raises(TicketSpent):
        await adopt(opened, rank, ticket)


async def test_the_open_tickets_of_one_client_hold_no_more_than_it_may_and_leave_room_for_others(
    open_store: Callable[..., Any],
) -> None:
    limits = dataclasses.replace(LIMITS, leases_per_client_max=2)
    opened: OpenStore = await open_store(limits=limits)
    client = opened.store.leases.attach(CALLER, "scheduler")
    _, lease = await leased(opened, client)
    for _ in range(2):
        export(opened, client, lease, ttl_s=5)
    with pytest.raises(Overloaded, match="open tickets"):
        export(opened, client, lease)
    other = opened.store.leases.attach(CALLER, "another scheduler")
    _, another = await leased(opened, other)
    export(opened, other, another)
    opened.files.clock.advance(seconds=5)
    opened.leases.expire()
    export(opened, client, lease)


async def test_what_is_known_of_expired_tickets_does_not_pile_up(opened: OpenStore, client: Client) -> None:
    _, lease = await leased(opened, client)
    for _ in range(500):
        export(opened, client, lease, ttl_s=0.1)
        opened.files.clock.advance(seconds=0.1)
        opened.leases.expire()
    assert len(opened.tickets._adoptions_left) < 100


async def test_loads_of_adopted_leases_are_listed_with_the_exporters_lookup(
    opened: OpenStore, client: Client, rank: Client
) -> None:
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain))
    caller, requests = caller_of(client), opened.requests
    lease = at_once(opened.store.lookups.lookup(caller, LAYOUT.fingerprint, WHOLE, chain.keys, 30, "request")).lease
    assert lease is not None
    adopted = await adopt(opened, rank, export(opened, client, lease))
    with requests.load(caller_of(rank), adopted, range(2), range(1)):
        pass
    (lookup,) = requests.get(CALLER, "request").lookups
    assert [load.blocks for load in lookup.loads] == [2]


# Shards


@pytest.mark.parametrize(
    "stored",
    [
        [WHOLE],
        [Shard(0, 2, 0, 1), Shard(0, 2, 1, 2)],
        [Shard(0, 1, 0, 2), Shard(1, 2, 0, 2)],
        [Shard(0, 1, 0, 1), Shard(0, 1, 1, 2), Shard(1, 2, 0, 2)],
    ],
    ids=["whole", "by heads", "by layers", "by both"],
)
async def test_a_rank_adopts_its_shard_and_holds_only_what_it_takes(
    opened: OpenStore, client: Client, rank: Client, stored: list[Shard]
) -> None:
    chain = some_chain(3)
    images = some_images(chain)
    for shard in stored:
        await opened.save(client, chain, [part_of(image, WHOLE, shard) for image in images], shard=shard)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    for shard in (WHOLE, Shard(0, 2, 0, 1), Shard(0, 2, 1, 2), Shard(1, 2, 0, 2), Shard(1, 2, 1, 2), Shard(0, 1, 0, 1)):
        adopted = await adopt(opened, rank, export(opened, client, lease), shard=shard)
        assert (adopted.shard, len(adopted.rows)) == (shard, 3)
        expected = layers_of([part_of(image, WHOLE, shard) for image in images], shard=shard)
        assert await opened.load(adopted) == expected
        narrowed = await opened.narrowed(client, lease, shard)
        assert (narrowed.rows.tolist(), narrowed.parts) == (adopted.rows.tolist(), adopted.parts)
        assert await opened.load(narrowed) == expected
        fewest = 1 if any(part.covers(shard) for part in stored) else len(adopted.held_rows) // 3
        assert len(adopted.held_rows) == 3 * fewest
        assert set(adopted.held_rows.tolist()) <= set(lease.held_rows.tolist())
        await opened.store.leases.release(caller_of(rank), adopted.lease_id)


def part_of(image: bytes, whole: Shard, shard: Shard) -> bytes:
    """A shard's slices of an image that has all layers and heads."""
    size = len(image) // (whole.layers * whole.heads * 2)  # Bytes of K or V of one head in one layer.
    pieces = []
    for layer in range(shard.layer_begin, shard.layer_end):
        for which in range(2):
            start = (layer * 2 + which) * whole.heads
            pieces.append(image[(start + shard.head_begin) * size : (start + shard.head_end) * size])
    return b"".join(pieces)


async def test_a_shard_outside_the_exporters_is_refused(opened: OpenStore, client: Client, rank: Client) -> None:
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain))
    lease = opened.lookup(client, chain.keys, shard=Shard(0, 1, 0, 1))
    assert lease is not None
    ticket = export(opened, client, lease)
    for shard in (WHOLE, Shard(1, 2, 0, 1), Shard(0, 1, 1, 2), Shard(0, 9, 0, 1), Shard(0, 0, 0, 1)):
        with pytest.raises(InvalidRequest):
            await adopt(opened, rank, ticket, shard=shard)
        with pytest.raises(InvalidRequest):
            await opened.narrowed(client, lease, shard)
    assert (await adopt(opened, rank, ticket)).shard == lease.shard


# Refused tickets


async def test_a_ticket_with_any_bit_changed_is_refused(opened: OpenStore, client: Client, rank: Client) -> None:
    _, lease = await leased(opened, client)
    ticket = export(opened, client, lease)
    assert len(ticket) == TICKET_BYTES
    for at in range(len(ticket)):
        for bit in range(8):
            forged = bytearray(ticket)
            forged[at] ^= 1 << bit
            with pytest.raises(TicketForeign if at in BOOT_EPOCH_AT else TicketForged):
                await adopt(opened, rank, bytes(forged))
    await adopt(opened, rank, ticket)


async def test_bytes_that_are_no_whole_ticket_are_refused(opened: OpenStore, client: Client, rank: Client) -> None:
    _, lease = await leased(opened, client)
    ticket = export(opened, client, lease)
    for data in (
        b"",
        *(ticket[:end] for end in range(1, len(ticket))),
        ticket + b"\0",
        bytes(TICKET_BYTES),
        ticket * 2,
    ):
        with pytest.raises(TicketForged):
            await adopt(opened, rank, data)
    await adopt(opened, rank, ticket)


async def test_a_ticket_of_another_daemon_or_of_before_the_restart_is_refused(
    opened: OpenStore, client: Client, store_files: Callable[..., Any]
) -> None:
    _, lease = await leased(opened, client)
    ticket = export(opened, client, lease)
    other: OpenStore = store_files().open()
    await other.store.layouts.open(CALLER, LAYOUT)
    with pytest.raises(TicketForeign):
        await adopt(other, other.leases.attach(CALLER, "rank"), ticket)
    await other.close()
    await opened.close()
    again = opened.files.open()
    with pytest.raises(TicketForeign):
        await adopt(again, again.store.leases.attach(CALLER, "rank"), ticket)
    await again.close()


async def test_a_ticket_is_for_its_layout_and_its_tenant_and_an_attached_client(
    opened: OpenStore, client: Client, rank: Client
) -> None:
    _, lease = await leased(opened, client)
    ticket = export(opened, client, lease)
    stranger = dataclasses.replace(caller_of(rank), tenant=Tenant(1, "another"))
    with pytest.raises(TicketNotYours):
        await opened.store.tickets.adopt(stranger, ticket, LAYOUT.fingerprint, None, TTL_S)
    for fingerprint in (bytes(32), b"", LAYOUT.fingerprint[:31]):
        with pytest.raises(TicketLayoutMismatch):
            await opened.store.tickets.adopt(caller_of(rank), ticket, fingerprint, None, TTL_S)
    with pytest.raises(UnknownClient):
        await opened.store.tickets.adopt(CALLER, ticket, LAYOUT.fingerprint, None, TTL_S)
    await adopt(opened, rank, ticket)


async def test_a_lease_that_has_ended_or_is_anothers_is_not_exported(
    opened: OpenStore, client: Client, rank: Client
) -> None:
    _, lease = await leased(opened, client)
    refusals: list[tuple[Client, int, type[KVError]]] = [(rank, 1, LeaseNotYours)]
    refusals += [(client, adoptions, InvalidRequest) for adoptions in (0, -1, ADOPTIONS_MAX + 1)]
    for asking, adoptions, error in refusals:
        with pytest.raises(error):
            export(opened, asking, lease, adoptions=adoptions)
    opened.files.clock.advance(seconds=1000)
    with pytest.raises(LeaseExpired):
        export(opened, client, lease)
    assert opened.leases.count <= 1


async def test_of_adoptions_at_the_same_moment_no_more_succeed_than_the_ticket_allows(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(2)
    images = some_images(chain)
    for shard in (Shard(0, 2, 0, 1), Shard(0, 2, 1, 2)):
        await opened.save(client, chain, [part_of(image, WHOLE, shard) for image in images], shard=shard)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    ticket = export(opened, client, lease, adoptions=3)
    ranks = [opened.store.leases.attach(CALLER, f"rank {number}") for number in range(8)]
    outcomes = await asyncio.gather(*(adopt(opened, rank, ticket) for rank in ranks), return_exceptions=True)
    assert sum(isinstance(outcome, Lease) for outcome in outcomes) == 3
    assert all(isinstance(outcome, (Lease, TicketSpent)) for outcome in outcomes)
    for each in (client, *ranks):
        opened.store.leases.detach(CALLER, each)
    await until(lambda: not opened.blocks.leases.any())
