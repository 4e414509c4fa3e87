"""A small load goes before a huge one, which never stops for it."""

from __future__ import annotations

import asyncio

import pytest

from kvservice.store.transfers.precedence import LoadTurn, Precedence
from tests.clock import HandClock
from tests.stores import MIB


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


async def huge(precedence: Precedence) -> LoadTurn:
    """A load that has sent much."""
    turn = precedence.enter()
    for _ in range(8):
        await turn.take(MIB)
    return turn


async def next_frame(turn: LoadTurn) -> asyncio.Task[None]:
    frame = asyncio.create_task(turn.take(MIB))
    for _ in range(5):
        await asyncio.sleep(0)
    return frame


async def test_a_huge_load_sends_its_next_frame_once_a_small_one_has_ended(clock: HandClock) -> None:
    precedence = Precedence(clock)
    large = await huge(precedence)
    small = precedence.enter()
    frame = await next_frame(large)
    assert not frame.done()

    await small.take(MIB)  # It does not wait for the huge one.
    small.leave()
    await frame


async def test_a_huge_load_waits_no_longer_than_a_moment_per_frame(clock: HandClock) -> None:
    precedence = Precedence(clock)
    large = await huge(precedence)
    precedence.enter()
    frame = await next_frame(large)
    clock.advance(seconds=0.002)
    await frame


async def test_a_load_whose_client_reads_slowly_delays_no_other_for_long(clock: HandClock) -> None:
    precedence = Precedence(clock)
    large = await huge(precedence)
    precedence.enter()
    clock.advance(seconds=0.1)
    assert (await next_frame(large)).done()


async def test_a_load_that_has_sent_much_does_not_go_first_any_more(clock: HandClock) -> None:
    precedence = Precedence(clock)
    first, second = await huge(precedence), await huge(precedence)
    assert (await next_frame(first)).done() and (await next_frame(second)).done()
