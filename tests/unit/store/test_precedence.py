"""A small load goes before a huge one, which never stops for it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from kvservice.store.transfers.precedence import LoadTurn, Precedence
from tests.clock import HandClock
from tests.stores import CALLER, MIB, OpenStore, caller_of, some_chain, some_images

LEASES = itertools.count(1)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


async def huge(precedence: Precedence) -> LoadTurn:
    """A load that has sent much."""
    turn = precedence.enter(next(LEASES))
    for _ in range(8):
        await turn.take(MIB)
    return turn


async def next_frame(turn: LoadTurn) -> asyncio.Task[None]:
    frame = asyncio.create_task(turn.take(MIB))
    for _ in range(5):
        await asyncio.sleep(0)
    return frame


async def test_a_huge_load_sends_its_next_frame_once_a_small_one_has_ended(clock: HandClock) -> None:
    precedence, lease_id = Precedence(clock), next(LEASES)
    large = await huge(precedence)
    small = precedence.enter(lease_id)
    frame = await next_frame(large)
    assert not frame.done()

    await small.take(MIB)  # It does not wait for the huge one.
    small.leave()
    precedence.called(lease_id)  # Its lease is released.
    await frame


async def test_a_huge_load_waits_no_longer_than_a_moment_per_frame(clock: HandClock) -> None:
    precedence = Precedence(clock)
    large = await huge(precedence)
    precedence.enter(next(LEASES))
    frame = await next_frame(large)
    clock.advance(seconds=0.01)
    await frame


async def test_a_load_whose_client_reads_slowly_delays_no_other_for_long(clock: HandClock) -> None:
    precedence = Precedence(clock)
    large = await huge(precedence)
    precedence.enter(next(LEASES))
    clock.advance(seconds=0.1)
    assert (await next_frame(large)).done()


async def test_a_load_that_has_sent_much_does_not_go_first_any_more(clock: HandClock) -> None:
    precedence = Precedence(clock)
    first, second = await huge(precedence), await huge(precedence)
    assert (await next_frame(first)).done() and (await next_frame(second)).done()


async def test_a_huge_load_gives_way_between_the_calls_of_a_client_for_a_small_one(clock: HandClock) -> None:
    precedence, lease_id = Precedence(clock), next(LEASES)
    large = await huge(precedence)
    precedence.expect_call(lease_id)  # After the lookup.
    frame = await next_frame(large)
    assert not frame.done()

    small = precedence.enter(lease_id)
    await small.take(MIB)
    small.leave()
    assert not (await next_frame(large)).done(), "the lease is not released yet"
    precedence.called(lease_id)
    await frame
    assert (await next_frame(large)).done()


async def test_a_client_that_does_not_call_again_at_once_delays_no_load_for_long(clock: HandClock) -> None:
    precedence = Precedence(clock)
    large = await huge(precedence)
    precedence.expect_call(next(LEASES))
    clock.advance(seconds=0.005)
    assert (await next_frame(large)).done()


async def test_no_call_is_expected_where_no_huge_load_runs(clock: HandClock) -> None:
    precedence = Precedence(clock)
    precedence.expect_call(next(LEASES))
    assert (await next_frame(await huge(precedence))).done()


async def test_a_lookup_whose_lease_is_over_before_its_answer_does_not_fail_by_that(
    open_store: Callable[..., Any], clock: HandClock
) -> None:
    opened: OpenStore = await open_store(clock=clock)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(1)
    await opened.save(client, chain, some_images(chain))
    await huge(opened.reads.precedence)
    lease = opened.lookup(client, chain.keys, ttl_s=0.001)
    assert lease is not None
    clock.advance(seconds=0.002)

    opened.store.loads.expect(caller_of(client), lease.lease_id)

    assert not opened.reads.precedence._calls_end_s
