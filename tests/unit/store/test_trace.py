"""What a recording has of a store's turns, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from kvservice.store.leases import Client
from kvservice.store.operations.requests import ReportRecord
from kvservice.store.operations.trace import RecordedTurn, TraceStep
from kvservice.store.types import SessionAppend
from kvservice_api.errors import InvalidRequest, Overloaded
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.v1 import blocks_pb2
from tests.clock import HandClock
from tests.stores import CALLER, KIB, LAYOUT, OpenStore, at_once, caller_of, some_chain, some_images

TOKENS = LAYOUT.block_tokens


class Recording:
    """A recording that began, on a store with one client."""

    def __init__(self, opened: OpenStore, clock: HandClock) -> None:
        self.opened = opened
        self.clock = clock
        self.client: Client = opened.store.leases.attach(CALLER, "test")
        self._steps = opened.store.operators.record_trace(CALLER, b"", 1000.0)
        self._next = asyncio.ensure_future(anext(self._steps))

    async def step(self, seconds: float = 3.0) -> TraceStep:
        """What the recording tells after so many seconds."""
        await asyncio.sleep(0)
        self.clock.advance(seconds=seconds)
        async with asyncio.timeout(60):
            step = await self._next
        self._next = asyncio.ensure_future(anext(self._steps))
        return step

    async def turns(self, seconds: float = 3.0) -> list[RecordedTurn]:
        return (await self.step(seconds)).turns

    def ask(self, chain: BlockChain, request_id: str = "") -> int:
        """A lookup with a lease. Returns the lease's id, 0 without hits."""
        caller = caller_of(self.client)
        hit = at_once(self.opened.store.lookups.lookup(caller, LAYOUT.fingerprint, None, chain.keys, 30.0, request_id))
        return 0 if hit.lease is None else hit.lease.lease_id

    async def save(self, chain: BlockChain) -> None:
        await self.opened.save(self.client, chain, some_images(chain))

    async def release(self, lease_id: int) -> None:
        await self.opened.store.leases.release(caller_of(self.client), lease_id)

    async def close(self) -> None:
        self._next.cancel()
        await asyncio.gather(self._next, return_exceptions=True)
        await self._steps.aclose()


@pytest.fixture
async def recording(open_store: Callable[..., Any]) -> AsyncGenerator[Recording, None]:
    async with recorded(open_store) as started:
        yield started


@asynccontextmanager
async def recorded(open_store: Callable[..., Any]) -> AsyncGenerator[Recording, None]:
    clock = HandClock()
    started = Recording(await open_store(clock=clock), clock)
    await started.step(0.5)
    yield started
    await started.close()


async def test_a_turn_has_its_arrival_its_tokens_and_its_chain(recording: Recording) -> None:
    chain = some_chain(5)
    await recording.save(chain[:2])
    first = await recording.step()
    lease_id = recording.ask(chain[:3])
    await recording.save(chain[2:])
    await recording.release(lease_id)
    second = await recording.step()

    assert first.layout == second.layout == LAYOUT
    assert first.kv_bytes_per_token == 12 * KIB // TOKENS
    (begun,), (turn,) = first.turns, second.turns
    assert (begun.at_s, begun.prompt_tokens, begun.answer_tokens, len(begun.hash_ids)) == (0.5, 2 * TOKENS, 0, 2)
    assert (turn.at_s, turn.prompt_tokens, turn.answer_tokens) == (3.5, 3 * TOKENS, 2 * TOKENS)
    assert len(set(turn.hash_ids)) == 5
    assert turn.hash_ids[:2] == begun.hash_ids
    assert all(0 <= each < 2**63 for each in turn.hash_ids)


async def test_no_part_of_a_key_is_recorded_and_no_two_recordings_have_the_same_ids(
    open_store: Callable[..., Any],
) -> None:
    chain, found = some_chain(2), []
    for _ in range(2):
        async with recorded(open_store) as recording:
            await recording.save(chain)
            (turn,) = await recording.turns()
            found += turn.hash_ids
    assert len(set(found)) == 4
    assert not any(each.to_bytes(8)[1:] in key for each in found for key in chain.keys)


async def test_lookups_and_saves_of_one_request_are_one_turn(recording: Recording) -> None:
    """Of several ranks, for a tail, and block by block."""
    chain = some_chain(6)
    await recording.save(chain[:2])
    await recording.turns()

    leases = [recording.ask(chain[:2]), recording.ask(chain[:2]), recording.ask(chain[:3])]
    for block in range(2, 5):
        await recording.save(chain[block : block + 1])
    await recording.save(chain[2:5])
    for lease_id in leases:
        await recording.release(lease_id)

    (turn,) = await recording.turns()
    assert (turn.prompt_tokens, turn.answer_tokens, len(turn.hash_ids)) == (2 * TOKENS, 3 * TOKENS, 5)


async def test_the_next_turn_of_a_conversation_is_another_turn_also_before_the_first_was_sent(
    recording: Recording,
) -> None:
    chain = some_chain(4)
    await recording.save(chain[:2])
    lease_id = recording.ask(chain[:3])
    await recording.save(chain[2:])
    await recording.release(lease_id)
    turns = await recording.turns()
    assert [len(turn.hash_ids) for turn in turns] == [2, 4]


async def test_turns_that_share_a_prefix_get_their_own_blocks(recording: Recording) -> None:
    prefix = np.arange(2 * TOKENS)
    branches = [block_chain(LAYOUT, np.concatenate([prefix, prefix + number])) for number in (1, 2)]
    await recording.save(branches[0][:2])
    await recording.turns()
    leases = [recording.ask(branch) for branch in branches]
    for branch in branches:
        await recording.save(branch[2:])
    for lease_id in leases:
        await recording.release(lease_id)

    one, two = await recording.turns()
    assert one.hash_ids[:2] == two.hash_ids[:2]
    assert len(set(one.hash_ids + two.hash_ids)) == 6


async def test_a_turn_is_not_recorded_while_it_holds_a_lease(recording: Recording) -> None:
    chain = some_chain(2)
    await recording.save(chain)
    await recording.turns()
    lease_id = recording.ask(chain)
    later = asyncio.ensure_future(recording.turns(10.0))
    for _ in range(50):  # All that the step of the clock has set going.
        await asyncio.sleep(0)
    assert not later.done()
    await recording.release(lease_id)
    await asyncio.sleep(0)
    recording.clock.advance(seconds=1.0)
    (turn,) = await later
    assert len(turn.hash_ids) == 2


async def test_a_report_tells_the_tokens_of_the_prompt(recording: Recording) -> None:
    chain = some_chain(3)
    recording.ask(chain[:1], "cmpl-1")
    await recording.save(chain)
    message = blocks_pb2.RequestReport(history_tokens=TOKENS, new_tokens=10)
    report = ReportRecord(1, 0, "load", "done", message)
    recording.opened.store.lookups.report(caller_of(recording.client), "cmpl-1", report)

    (turn,) = await recording.turns()
    assert (turn.prompt_tokens, turn.answer_tokens) == (TOKENS + 10, 2 * TOKENS - 10)


async def test_a_partial_block_counts_with_its_tokens_and_has_no_id(recording: Recording) -> None:
    chain = some_chain(2, tail_tokens=5)
    await recording.save(chain)
    (turn,) = await recording.turns()
    assert (turn.prompt_tokens, len(turn.hash_ids)) == (2 * TOKENS + 5, 2)


async def test_an_appended_turn_has_the_blocks_of_its_session(recording: Recording) -> None:
    chain = some_chain(3)
    await recording.save(chain)
    recording.ask(chain[:2])
    store, caller = recording.opened.store, caller_of(recording.client)
    turn = SessionAppend(chain.parent, chain.keys)
    await store.sessions.append(caller, LAYOUT.fingerprint, "chat", 0, turn)
    await recording.opened.store.leases.release(caller, next(iter(recording.client.leases)))
    turns = await recording.turns()
    assert (turns[-1].prompt_tokens, turns[-1].answer_tokens) == (2 * TOKENS, TOKENS)


async def test_what_no_engine_asked_for_is_no_turn(recording: Recording) -> None:
    chain = some_chain(2)
    await recording.save(chain)
    await recording.turns()
    recording.opened.hits(chain.keys)
    other = some_chain(1, seed=7)
    await recording.save(other)
    (turn,) = await recording.turns()
    assert len(turn.hash_ids) == 1


async def test_nothing_is_kept_without_a_recording(open_store: Callable[..., Any]) -> None:
    async with recorded(open_store) as recording:
        await recording.save(some_chain(2))
        opened = recording.opened
    client = opened.store.leases.attach(CALLER, "later")
    chain = some_chain(2, seed=3)
    await opened.save(client, chain, some_images(chain))
    opened.lookup(client, chain.keys)
    recorder = opened.store._trace
    assert not recorder._running
    assert not recorder._by_key


async def test_the_daemons_stop_ends_a_recording_with_the_turns_so_far(recording: Recording) -> None:
    await recording.save(some_chain(2))
    recording.opened.store.begin_stop()
    step = await recording.step(0.0)
    assert (step.done, len(step.turns)) == (True, 1)


async def test_turns_beyond_the_limits_are_counted(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvservice.store.operations.trace._TURNS_MAX", 2)
    async with recorded(open_store) as recording:
        for seed in range(5):
            await recording.save(some_chain(1, seed=seed))
        step = await recording.step()
    assert (len(step.turns), step.dropped) == (2, 3)


async def test_a_fifth_recording_and_a_wrong_time_are_refused(opened: OpenStore) -> None:
    operators = opened.store.operators
    running = [operators.record_trace(CALLER, b"", 100.0) for _ in range(5)]
    begun = [asyncio.ensure_future(anext(each)) for each in running[:4]]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="end one of them"):
        await anext(running[4])
    for wrong in (0.0, 31 * 86400.0):
        with pytest.raises(InvalidRequest, match="duration_ms"):
            operators.record_trace(CALLER, b"", wrong)
    for each in begun:
        each.cancel()
    await asyncio.gather(*begun, return_exceptions=True)
