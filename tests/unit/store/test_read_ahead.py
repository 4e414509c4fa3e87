"""A real store with a policy over items: it promotes blocks before the request that needs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.policy import PLACEMENTS
from kvservice.store.mover.evictor import Watermarks
from kvservice_api.keys import BlockChain, block_chain
from tests.clock import HandClock
from tests.stores import CALLER, KIB, LAYOUT, MIB, PATIENT, OpenStore, at_once, caller_of, until

_IMAGE = bytes(8 * KIB)
_BLOCKS = 6
_BLOCK_BYTES = 12 * KIB
_SESSIONS = 20
_AWAY_S = 60.0  # Each user returns after exactly that time.


def history_of(session: int) -> BlockChain:
    return block_chain(LAYOUT, range(1000 * session, 1000 * session + _BLOCKS * LAYOUT.block_tokens))


class Service:
    """Users who take turns: each has one conversation, and a fifth of all fit into DRAM."""

    def __init__(self, opened: OpenStore, clock: HandClock) -> None:
        self.opened, self.clock = opened, clock
        self.client = opened.store.leases.attach(CALLER, "engine")

    async def turn(self, session: int) -> float:
        """A request with the session's history. Returns the share of it that is in DRAM when it comes."""
        store, blocks, chain = self.opened.store, self.opened.blocks, history_of(session)
        lease = self.opened.lookup(self.client, chain.keys, ttl_s=300)
        in_dram = 0.0 if lease is None else float(blocks.lie_in(lease.rows, TierName.DRAM).mean())
        if lease is None:
            await self.opened.save(self.client, chain, [_IMAGE] * _BLOCKS)
            assert self.opened.write_behind is not None
            await self.opened.write_behind.idle()
        else:
            await store.moves.prefetch(CALLER, chain.keys, within_s=0.0, wait=True)
            await store.leases.release(caller_of(self.client), lease.lease_id)
        return in_dram

    async def second(self) -> None:
        self.clock.advance(seconds=1.0)
        await self.opened.decided()

    async def hits(self, rounds: int) -> list[float]:
        """For each round the mean share of a history that is in DRAM when its request comes."""
        shares = []
        for _ in range(rounds):
            found = []
            for session in range(_SESSIONS):
                found.append(await self.turn(session))
                for _ in range(round(_AWAY_S / _SESSIONS)):
                    await self.second()
            shares.append(sum(found) / len(found))
        return shares


@pytest.fixture
async def service(open_store: Callable[..., Any], request: pytest.FixtureRequest) -> Service:
    clock = HandClock()
    dram_bytes = _SESSIONS * _BLOCKS * _BLOCK_BYTES // 5
    opened: OpenStore = await open_store(
        policy=PLACEMENTS[request.param](), clock=clock, dram_bytes=dram_bytes, ssd_bytes=16 * MIB, limits=PATIENT,
        watermarks=Watermarks(0.0, 0.0),
    )  # fmt: skip
    return Service(opened, clock)


@pytest.mark.parametrize("service", ["foresight"], indirect=True)
async def test_what_returns_at_regular_times_is_in_dram_when_it_does(service: Service) -> None:
    """By recency nothing would be: a user returns after all the others."""
    shares = await service.hits(6)
    assert shares[0] == 0
    assert shares[-1] > 0.5, shares
    assert (
        at_once(service.opened.store.lookups.lookup(CALLER, LAYOUT.fingerprint, None, history_of(0).keys, 0)).blocks
        == 6
    )


@pytest.mark.parametrize("service", ["foresight"], indirect=True)
async def test_what_a_client_evicts_is_not_read_ahead_before_the_next_request(service: Service) -> None:
    await service.hits(5)
    store, blocks = service.opened.store, service.opened.blocks
    keys = [history_of(session).keys for session in range(_SESSIONS)]
    rows = np.concatenate([blocks.rows_of_keys(each) for each in keys])
    evicted = rows[blocks.lie_in(rows, TierName.DRAM)]
    assert len(evicted) >= _BLOCKS
    for each in keys:
        await store.moves.evict(CALLER, each, TierName.DRAM)

    read = service.opened.counters.read_ahead_blocks
    for _ in range(round(_AWAY_S)):
        await service.second()
    assert service.opened.counters.read_ahead_blocks > read, "others are read"
    assert not blocks.lie_in(evicted, TierName.DRAM).any()

    assert (await service.hits(3))[-1] > 0.3, "after their next use they are read ahead again"


@pytest.mark.parametrize("service", ["lookahead"], indirect=True)
async def test_a_policy_is_asked_seldom_while_nothing_happens_and_at_once_when_something_does(
    service: Service,
) -> None:
    read_ahead = service.opened.store._policy._read_ahead
    assert read_ahead is not None
    await service.turn(0)
    assert read_ahead._pause_s(next_s=math.inf) == 0.1
    service.clock.advance(seconds=6.0)
    await service.opened.decided()
    assert read_ahead._pause_s(next_s=math.inf) == 2.0
    assert read_ahead._pause_s(next_s=service.clock.monotonic_s() + 0.5) == 0.5, "the policy has the last word"

    looks = read_ahead.looks
    await service.turn(1)  # The time stands still.
    await until(lambda: read_ahead.looks > looks)


@pytest.mark.parametrize("service", ["lru", "fifo", "s3fifo", "lookahead"], indirect=True)
async def test_every_policy_serves_and_loses_nothing(service: Service) -> None:
    shares = await service.hits(3)
    assert np.isfinite(shares).all()
    for session in range(_SESSIONS):
        assert service.opened.hits(history_of(session).keys) == _BLOCKS
    await service.opened.settle()
