"""Which transfers may begin, how long a client may be idle, and how large a message may be, for every listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from kvservice.store.leases import Client
from kvservice.store.operations.explain import Miss
from kvservice.store.transfers.leased_bytes import Part
from kvservice.store.types import Span
from kvservice_api.errors import DeadlineExceeded, IncompleteSave, InvalidFrame, KVError, Overloaded
from tests.clock import HandClock
from tests.stores import CALLER, LAYOUT, LIMITS, WHOLE, OpenStore, caller_of, frames_of, some_chain, some_images, until


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def opened(open_store: Callable[..., Any], clock: HandClock) -> OpenStore:
    limits = replace(LIMITS, loads_max=1, saves_max=1, transfer_idle_s=60, frame_bytes=5000)
    store: OpenStore = await open_store(clock=clock, limits=limits)
    return store


def encode(part: Part) -> bytes:
    return b"".join(part.runs)


async def loads(opened: OpenStore, client: Client, send: Callable[[bytes], Any]) -> None:
    """Saves a block and loads it, with `send` for each frame."""
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain))
    lease = opened.lookup(client, chain.keys, ttl_s=10_000)
    assert lease is not None
    await opened.store.loads.load(caller_of(client), lease.lease_id, None, Span(), Span(), encode, send)


async def test_a_load_whose_client_takes_nothing_ends_in_time_and_no_sooner(
    opened: OpenStore, client: Client, clock: HandClock
) -> None:
    sent = []

    async def send(frame: bytes) -> None:
        sent.append(frame)
        await asyncio.Event().wait()

    loading = asyncio.create_task(loads(opened, client, send))
    await until(lambda: len(sent) == 1)
    clock.advance(seconds=59.9)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not loading.done()
    clock.advance(seconds=0.2)
    with pytest.raises(DeadlineExceeded, match="60 s"):
        await asyncio.wait_for(loading, 30)
    await opened.settle()  # Blocks that are being written to SSD are held, too.
    assert not opened.blocks.holds.any()


async def test_the_load_of_a_client_that_reads_a_frame_now_and_then_continues(
    opened: OpenStore, client: Client, clock: HandClock
) -> None:
    sent = []

    async def send(frame: bytes) -> None:
        await asyncio.sleep(0)
        clock.advance(seconds=50)
        sent.append(frame)

    await loads(opened, client, send)
    assert len(sent) == LAYOUT.layers


async def test_loads_and_saves_are_bounded_each_and_a_save_that_is_refused_is_remembered(
    opened: OpenStore, client: Client
) -> None:
    gate, sent = asyncio.Event(), []

    async def send(frame: bytes) -> None:
        sent.append(frame)
        await gate.wait()

    loading = asyncio.create_task(loads(opened, client, send))
    await until(lambda: len(sent) == 1)
    with pytest.raises(Overloaded, match="1 loads"):
        await loads(opened, client, send)
    refused = some_chain(1, seed=2)
    async with opened.begin_save(client, some_chain(1, seed=1)):
        with pytest.raises(Overloaded, match="1 saves"):
            opened.begin_save(client, refused)
    assert opened.explain.missing(CALLER, refused.keys[0]).why is Miss.DROPPED_AT_SAVE
    async with opened.begin_save(client, refused):
        pass
    gate.set()
    await loading
    await loads(opened, client, send)


async def test_a_refused_load_is_listed_with_its_request(opened: OpenStore, client: Client) -> None:
    gate, sent = asyncio.Event(), []

    async def send(frame: bytes) -> None:
        sent.append(frame)
        await gate.wait()

    loading = asyncio.create_task(loads(opened, client, send))
    await until(lambda: len(sent) == 1)
    caller, keys = caller_of(client), some_chain(1).keys
    lease = (await opened.store.lookups.lookup(caller, LAYOUT.fingerprint, WHOLE, keys, 30, "request")).lease
    assert lease is not None
    with pytest.raises(Overloaded):
        await opened.store.loads.load(caller, lease.lease_id, None, Span(), Span(), encode, send)
    (lookup,) = opened.store.operators.explain_request(CALLER, "request").lookups
    assert [load.outcome for load in lookup.record.loads] == ["overloaded"]
    gate.set()
    await loading


async def test_a_save_whose_client_sends_nothing_ends_in_time_and_no_sooner(
    opened: OpenStore, clock: HandClock
) -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    incoming = opened.store.saves.incoming(CALLER, silent())
    assert await incoming.next() == b"first"
    waiting = asyncio.create_task(incoming.next())
    await asyncio.sleep(0)
    clock.advance(seconds=59.9)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    clock.advance(seconds=0.2)
    with pytest.raises(IncompleteSave, match="60 s"):
        await asyncio.wait_for(waiting, 30)


async def test_a_stream_that_ends_is_no_commit(opened: OpenStore) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        for message in list[bytes]():
            yield message

    with pytest.raises(IncompleteSave, match="without a commit"):
        await opened.store.saves.incoming(CALLER, nothing()).next()
    assert await opened.store.saves.incoming(CALLER, nothing()).ended()


async def test_a_frame_that_is_too_large_ends_its_save(opened: OpenStore, client: Client) -> None:
    chain = some_chain(2)
    (frame, *_) = frames_of(LAYOUT, WHOLE, chain, some_images(chain), frame_bytes=5001)
    refused: type[KVError] = InvalidFrame
    with pytest.raises(refused, match="at most 5000"):
        async with opened.begin_save(client, chain) as upload:
            await upload.put(frame)
    assert opened.dram.used_bytes == 0
