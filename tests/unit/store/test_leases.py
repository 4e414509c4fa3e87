"""Leases keep blocks in their place, and end: by release, by time, or with their client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.counters import Counters
from kvservice.store.leases import Client, Lease, Leases
from kvservice.store.store import StoreLimits
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice_api.errors import InvalidRequest, KVError, LeaseExpired, LeaseNotYours, Overloaded, UnknownClient
from tests.clock import FakeClock
from tests.stores import CALLER, LAYOUT, WHOLE, OpenStore, caller_of, layers_of, some_chain, some_images, until


@dataclass
class CountingResidency:
    """Replaces the block lifecycle in tests that need only the number of leases per row."""

    leased: dict[int, int]

    def lease(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        for row in rows.tolist():
            self.leased[row] = self.leased.get(row, 0) + 1

    def unlease(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        for row in rows.tolist():
            self.leased[row] -= 1


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def residency() -> CountingResidency:
    return CountingResidency({})


@pytest.fixture
def leases(residency: CountingResidency, clock: FakeClock) -> Leases:
    return new_leases(residency, clock)


def new_leases(residency: CountingResidency, clock: FakeClock, **limits: int) -> Leases:
    bounds = {"clients_max": 3, "per_client_max": 5, "blocks_per_client_max": 100_000, "ttl_max_s": 300} | limits
    return Leases(residency, clock, Counters(), Tasks(), LoopBudget(), **bounds)  # type: ignore[arg-type]


def granted(leases: Leases, client: Client, rows: list[int], ttl_s: float = 30.0) -> Lease:
    held = np.array(rows, np.int64)
    return leases.grant(client, LAYOUT, WHOLE, held, {}, held, ttl_s)


# Ends of leases


def test_a_lease_ends_exactly_when_its_time_is_over(leases: Leases, clock: FakeClock) -> None:
    client = leases.attach(CALLER, "test")
    lease = granted(leases, client, [1], ttl_s=30)

    clock.advance(seconds=29.999)
    assert leases.get(caller_of(client), lease.lease_id) is lease

    clock.advance(seconds=0.002)
    with pytest.raises(LeaseExpired):  # Also if no call has noticed the end yet.
        leases.get(caller_of(client), lease.lease_id)
    with pytest.raises(LeaseExpired):
        leases.renew(caller_of(client), lease.lease_id, 30)


def test_expiry_ends_what_is_over_and_nothing_else(
    leases: Leases, clock: FakeClock, residency: CountingResidency
) -> None:
    client = leases.attach(CALLER, "test")
    granted(leases, client, [1, 2], ttl_s=10)
    granted(leases, client, [2, 3], ttl_s=20)

    clock.advance(seconds=15)
    leases.expire()
    assert residency.leased == {1: 0, 2: 1, 3: 1}
    assert leases.count == 1 and len(client.leases) == 1

    clock.advance(seconds=5)
    leases.expire()
    assert residency.leased == {1: 0, 2: 0, 3: 0}
    assert leases.count == 0 and not client.leases


def test_a_renewed_lease_lives_from_the_renewal_on_longer_or_shorter(leases: Leases, clock: FakeClock) -> None:
    client = leases.attach(CALLER, "test")
    longer, shorter = granted(leases, client, [1], 10), granted(leases, client, [2], 100)
    clock.advance(seconds=5)
    leases.renew(caller_of(client), longer.lease_id, 30)
    leases.renew(caller_of(client), shorter.lease_id, 1)

    clock.advance(seconds=6)  # The longer lease's first end is over.
    leases.expire()
    assert leases.get(caller_of(client), longer.lease_id) is longer
    with pytest.raises(LeaseExpired):
        leases.get(caller_of(client), shorter.lease_id)
    assert leases.count == 1

    clock.advance(seconds=24)
    leases.expire()
    assert leases.count == 0


def test_a_released_lease_is_over_and_may_be_released_again(leases: Leases, residency: CountingResidency) -> None:
    client = leases.attach(CALLER, "test")
    lease = granted(leases, client, [1, 2])
    leases.begin_release(caller_of(client), lease.lease_id)
    leases.begin_release(caller_of(client), lease.lease_id)
    assert residency.leased == {1: 0, 2: 0}
    with pytest.raises(LeaseExpired):
        leases.get(caller_of(client), lease.lease_id)


def test_a_clients_leases_end_with_it_and_others_stay(leases: Leases, residency: CountingResidency) -> None:
    gone, stays = leases.attach(CALLER, "gone"), leases.attach(CALLER, "stays")
    granted(leases, gone, [1, 2])
    granted(leases, gone, [2])
    kept = granted(leases, stays, [2])
    ended: list[str] = []
    gone.on_detach.add(lambda: ended.append("save"))

    leases.detach(CALLER, gone)

    assert residency.leased == {1: 0, 2: 1}
    assert ended == ["save"], "the client's other resources end, too"
    assert leases.get(caller_of(stays), kept.lease_id) is kept
    with pytest.raises(UnknownClient):
        leases.client(caller_of(gone))
    assert (leases.client_count, leases.count) == (1, 1)


# Owners of leases


@pytest.mark.parametrize("call", ["get", "renew", "begin_release"])
def test_another_clients_lease_is_refused_and_stays(leases: Leases, call: str) -> None:
    owner, other = leases.attach(CALLER, "owner"), leases.attach(CALLER, "other")
    lease = granted(leases, owner, [1])
    more = (30.0,) if call == "renew" else ()
    with pytest.raises(LeaseNotYours):
        getattr(leases, call)(caller_of(other), lease.lease_id, *more)
    assert leases.get(caller_of(owner), lease.lease_id) is lease


@pytest.mark.parametrize("lease_id", [0, 1, 2**63])
def test_a_number_that_was_never_given_is_an_expired_lease(leases: Leases, lease_id: int) -> None:
    client = leases.attach(CALLER, "test")
    with pytest.raises(LeaseExpired):
        leases.get(caller_of(client), lease_id)


def test_numbers_of_another_daemon_mean_nothing_here(clock: FakeClock) -> None:
    numbers = set()
    for _ in range(20):
        leases = new_leases(CountingResidency({}), clock)
        numbers.add(granted(leases, leases.attach(CALLER, "test"), [1]).lease_id)
    assert len(numbers) == 20 and 0 not in numbers


# Limits


def test_clients_names_and_leases_are_bounded(leases: Leases) -> None:
    with pytest.raises(InvalidRequest):
        leases.attach(CALLER, "n" * 201)
    clients = [leases.attach(CALLER, str(number)) for number in range(3)]
    with pytest.raises(Overloaded):
        leases.attach(CALLER, "one more")
    for _ in range(5):
        granted(leases, clients[0], [1])
    with pytest.raises(Overloaded):
        granted(leases, clients[0], [1])
    granted(leases, clients[1], [1])


def test_the_blocks_that_one_clients_leases_hold_are_bounded(clock: FakeClock, residency: CountingResidency) -> None:
    """Also repeated keys count, because each takes memory, and time at the end."""
    leases = new_leases(residency, clock, blocks_per_client_max=10)
    greedy, other = leases.attach(CALLER, "greedy"), leases.attach(CALLER, "other")
    lease = granted(leases, greedy, [1] * 6)
    with pytest.raises(Overloaded):
        granted(leases, greedy, [1] * 5)
    granted(leases, greedy, [2] * 4)
    granted(leases, other, [1] * 10)
    assert residency.leased == {1: 16, 2: 4} and len(greedy.leases) == 2

    leases.begin_release(caller_of(greedy), lease.lease_id)
    granted(leases, greedy, [1] * 6)


def test_many_short_leases_leave_nothing_behind(leases: Leases) -> None:
    client = leases.attach(CALLER, "test")
    for _ in range(10_000):
        lease = granted(leases, client, [1], ttl_s=300)
        leases.renew(caller_of(client), lease.lease_id, 300)
        leases.begin_release(caller_of(client), lease.lease_id)
    assert len(leases._by_end) < 5000


def test_what_is_forgotten_of_old_ends_is_never_a_lease_that_lives(leases: Leases, clock: FakeClock) -> None:
    client = leases.attach(CALLER, "test")
    kept = [granted(leases, client, [1], ttl_s=10 * number) for number in (1, 2, 3)]
    for _ in range(5000):
        leases.renew(caller_of(client), kept[2].lease_id, 30)
    for number in (2, 1, 0):
        assert leases.count == number + 1
        clock.advance(seconds=10)
        leases.expire()
    assert leases.count == 0


# In a store


async def leased_at_length(opened: OpenStore, client: Client, keys: Sequence[bytes]) -> Lease | None:
    """A lookup of more keys than fit into one iteration of the event loop."""
    return (await opened.store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, keys, 30)).lease


async def test_a_leased_block_survives_pressure_until_its_lease_expires(opened: OpenStore, client: Client) -> None:
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    lease = opened.lookup(client, chain.keys, ttl_s=30)
    assert lease is not None
    places = [opened.blocks.extent(row, TierName.DRAM) for row in lease.rows.tolist()]

    await fill_dram(opened, client)
    assert [opened.blocks.extent(row, TierName.DRAM) for row in lease.rows.tolist()] == places

    opened.files.clock.advance(seconds=31)
    opened.leases.expire()
    await fill_dram(opened, client)
    assert opened.residency(chain.keys[0]) == {TierName.SSD}


async def test_a_leased_block_that_is_discarded_can_be_loaded_until_its_lease_ends(
    opened: OpenStore, client: Client
) -> None:
    chain, images = some_chain(2), some_images(some_chain(2))
    await opened.save(client, chain, images, on_ssd=True)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    used = opened.dram.used_bytes

    await opened.store.operators.discard(CALLER, chain.keys)
    assert opened.hits(chain.keys) == 0
    assert opened.dram.used_bytes == used
    await fill_dram(opened, client)
    assert await opened.load(lease) == layers_of(images)

    opened.leases.begin_release(caller_of(client), lease.lease_id)
    with pytest.raises(KVError):
        opened.leases.get(caller_of(client), lease.lease_id)
    await opened.settle()


async def test_a_client_with_many_leased_blocks_is_gone_at_once_and_its_blocks_follow_in_short_turns(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = StoreLimits(leases_per_client_max=100, leased_blocks_per_client_max=100_000)
    opened: OpenStore = await open_store(limits=limits)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    await opened.save(client, chain, some_images(chain))
    for _ in range(50):
        lease = (
            await opened.store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, chain.keys[:1] * 2000, 30)
        ).lease
    assert lease is not None
    row = int(lease.rows[0])
    unlease, ended_at_once = opened.block_lifecycle.unlease, []

    def watched(rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        ended_at_once.append(len(rows))
        unlease(rows)

    monkeypatch.setattr(opened.block_lifecycle, "unlease", watched)
    opened.store.leases.detach(CALLER, client)
    assert opened.leases.count == 0
    with pytest.raises(UnknownClient):
        opened.leases.get(caller_of(client), lease.lease_id)
    assert opened.blocks.leases[row] > 90_000, "not all of them in this turn"

    await opened.leases.drain_ended()
    assert not opened.blocks.leases.any()
    assert sum(ended_at_once) == 100_000 and max(ended_at_once) <= 128


async def test_expiry_of_many_leases_takes_several_turns_and_none_of_them_is_found_meanwhile(
    leases: Leases, clock: FakeClock, residency: CountingResidency
) -> None:
    leases = new_leases(residency, clock, per_client_max=5000)
    client = leases.attach(CALLER, "test")
    many = [granted(leases, client, [1], ttl_s=10) for _ in range(3000)]
    clock.advance(seconds=10)
    turns = 1
    while leases.expire():
        turns += 1
        with pytest.raises(LeaseExpired):
            leases.get(caller_of(client), many[-1].lease_id)
        await asyncio.sleep(0)
    assert 2 <= turns <= 3000 and leases.count == 0
    await leases.drain_ended()
    assert residency.leased == {1: 0}


async def test_a_released_lease_of_many_blocks_holds_none_of_them_once_its_counts_are_decremented(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain))
    lease = await leased_at_length(opened, client, chain.keys[:1] * 5000)
    assert lease is not None
    await opened.store.operators.discard(CALLER, chain.keys)
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    with pytest.raises(LeaseExpired):
        opened.leases.get(caller_of(client), lease.lease_id)
    await opened.leases.drain_ended()
    await until(lambda: opened.dram.used_bytes == 0)


async def fill_dram(opened: OpenStore, client: Client) -> None:
    """Save more than DRAM holds, so that everything that may be evicted is evicted."""
    for _ in range(12):
        seed = int(opened.blocks.next_access_seq) + 1000
        chain = some_chain(10, seed=seed)
        await opened.save(client, chain, some_images(chain, seed=seed))


async def test_a_block_that_is_named_twice_in_a_lookup_is_free_once_its_lease_ends(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain))
    assert opened.lookup(client, [chain.keys[0], chain.keys[1], chain.keys[1]]) is not None
    assert opened.lookup(client, chain.keys) is not None

    opened.store.leases.detach(CALLER, client)

    assert not opened.blocks.leases.any()
