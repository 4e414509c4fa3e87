"""Hints: the mirror of a queue, the window, and readiness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import TierName
from kvservice.store.caller import Tenant
from kvservice.store.hints.exchange import HintExchange, HintLimits
from kvservice.store.hints.queue_mirror import HintSubject, QueueEntry, QueueLimits, QueueMirror
from kvservice.store.leases import Client
from kvservice.store.types import HintStream, Nearness, SessionAppend
from kvservice_api.keys import BlockChain
from tests.stores import CALLER, KIB, LAYOUT, PATIENT, OpenStore, caller_of, some_chain, some_images

BLOCK = 12 * KIB
BLOCKS = 4  # Of each session.
SUBJECT = HintSubject(b"", "", bytes(32))


def entry(name: str, keys: int = 1) -> QueueEntry:
    return QueueEntry(name, HintSubject(b"", "", bytes(32 * keys)), None, 0)


def names(queue: QueueMirror) -> list[str]:
    return [each.request_id for each in queue]


@given(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.integers(0, 9), st.integers(-1, 9)), max_size=60))
def test_the_mirror_has_the_order_of_a_list_with_the_same_changes(changes: list[tuple[str, int, int]]) -> None:
    queue, model = QueueMirror(QueueLimits(8, 8)), list[str]()
    for kind, which, before in changes:
        name, place = str(which), str(before)
        if name in model:
            model.remove(name)
        if kind == "remove":
            queue.remove(name)
        elif queue.put(entry(name), place):
            model.insert(model.index(place) if place in model else len(model), name)
        else:
            assert len(model) == 8
        assert names(queue) == model
        assert queue.key_count == len(queue) == len(model)
        for after, each in enumerate(model, 1):
            assert [one.request_id for one in queue.after(each)] == model[after:]


def test_a_queue_has_no_more_keys_than_its_limit() -> None:
    queue = QueueMirror(QueueLimits(8, 10))

    assert queue.put(entry("a", 6))
    assert not queue.put(entry("b", 5))
    assert queue.put(entry("a", 10)), "it replaces its own keys"
    queue.remove("a")
    assert queue.put(entry("b", 5))


@pytest.fixture
async def opened(open_store: Callable[..., Any]) -> OpenStore:
    """DRAM has space for 24 blocks, of which hints may use 12: three sessions."""
    store: OpenStore = await open_store(
        dram_bytes=24 * BLOCK + 4 * KIB, limits=replace(PATIENT, hints=HintLimits(QueueLimits(16, 256), 0.5, 1 << 40))
    )
    return store


async def stored_session(opened: OpenStore, client: Client, name: str, chain: BlockChain) -> None:
    """A session whose blocks are only on SSD."""
    outcome = await opened.save(client, chain, some_images(chain), on_ssd=True)
    assert not outcome.refused
    append = SessionAppend(chain.parent, chain.keys)
    await opened.store.append_turn(CALLER, LAYOUT.fingerprint, name, 0, append)
    await opened.store.evict(CALLER, chain.keys, TierName.DRAM)


async def stored_sessions(opened: OpenStore, client: Client, count: int) -> list[BlockChain]:
    chains = [some_chain(BLOCKS, seed=number) for number in range(count)]
    for number, chain in enumerate(chains):
        await stored_session(opened, client, f"chat-{number}", chain)
    return chains


def session(name: str) -> HintSubject:
    return HintSubject(LAYOUT.fingerprint, name)


def keys_of(*chains: BlockChain) -> HintSubject:
    return HintSubject(b"", "", b"".join(chain.packed_keys for chain in chains))


def in_dram(opened: OpenStore, chains: Sequence[BlockChain]) -> list[int]:
    """Which of the chains have a block in DRAM."""
    return [
        number
        for number, chain in enumerate(chains)
        if any(TierName.DRAM in opened.residency(key) for key in chain.keys)
    ]


def whole_in_dram(opened: OpenStore, chain: BlockChain) -> bool:
    return all(TierName.DRAM in opened.residency(key) for key in chain.keys)


@pytest.fixture
def stream(opened: OpenStore, client: Client) -> Iterator[HintStream]:
    with opened.store.hints(caller_of(client)) as stream:
        yield stream


def exchange_of(opened: OpenStore) -> HintExchange:
    return opened.store._hints


class Seen:
    """The readiness of each request as the engine learns it: every state that it had, in order."""

    def __init__(self, stream: HintStream) -> None:
        self._stream = stream
        self.states: dict[str, list[Nearness]] = {}

    async def until(self, request_id: str, nearness: Nearness) -> list[Nearness]:
        while self.states.get(request_id, [None])[-1] is not nearness:
            changed = await self._stream.changed(100)
            assert changed is not None
            for name, now, ready_in_s in changed:
                assert (ready_in_s > 0) <= (now is Nearness.COMING)
                self.states.setdefault(name, []).append(now)
        return self.states[request_id]


def queue_sessions(stream: HintStream, numbers: Sequence[int]) -> None:
    for number in numbers:
        stream.put(f"request-{number}", session(f"chat-{number}"), None, 0, "")


async def test_the_heads_of_a_queue_are_promoted_and_the_rest_waits(
    opened: OpenStore, client: Client, stream: HintStream
) -> None:
    chains, seen = await stored_sessions(opened, client, 6), Seen(stream)
    assert in_dram(opened, chains) == []

    queue_sessions(stream, range(6))

    for number in range(3):
        await seen.until(f"request-{number}", Nearness.IN_DRAM)
    await seen.until("request-5", Nearness.ON_SSD)
    assert in_dram(opened, chains) == [0, 1, 2]
    assert opened.counters.hint_promoted_blocks == 3 * BLOCKS


async def test_the_window_moves_with_the_queue_and_what_left_the_queue_is_evicted_first(
    opened: OpenStore, client: Client, stream: HintStream
) -> None:
    chains, seen = await stored_sessions(opened, client, 9), Seen(stream)
    queue_sessions(stream, range(9))
    await seen.until("request-2", Nearness.IN_DRAM)

    for number in range(6):
        stream.remove(f"request-{number}")
    for number in range(6, 9):
        await seen.until(f"request-{number}", Nearness.IN_DRAM)

    assert all(whole_in_dram(opened, chain) for chain in chains[6:])
    queue_sessions(stream, range(3, 6))
    stream.put("request-3", session("chat-3"), None, 0, "request-6")
    await seen.until("request-3", Nearness.IN_DRAM)
    assert all(whole_in_dram(opened, chains[number]) for number in (3, 6, 7)), "the window"


async def test_a_request_of_higher_priority_is_promoted_first(
    opened: OpenStore, client: Client, stream: HintStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains, seen = await stored_sessions(opened, client, 4), Seen(stream)
    other = opened.store.attach(CALLER, "other")
    with opened.store.hints(caller_of(other)) as second:
        order: list[int] = []
        promoter = opened.promoter
        assert promoter is not None
        promote = promoter.promote

        async def noted(rows: Sequence[int], **more: Any) -> None:
            key = opened.blocks.key_of(rows[0])
            order.append(next(number for number, chain in enumerate(chains) if key in chain.keys))
            await promote(rows, **more)

        monkeypatch.setattr(promoter, "promote", noted)
        stream.put("late", session("chat-0"), None, 0, "")
        second.put("urgent", session("chat-1"), None, 5, "")
        await seen.until("late", Nearness.IN_DRAM)
    assert order == [1, 0]


async def test_another_tenants_blocks_and_sessions_look_as_if_they_did_not_exist(
    opened: OpenStore, client: Client
) -> None:
    chains = await stored_sessions(opened, client, 1)
    stranger = replace(caller_of(client), tenant=Tenant(7, "other"))
    with opened.store.hints(stranger) as stream:
        seen = Seen(stream)
        stream.put("keys", keys_of(*chains), None, 0, "")
        stream.put("session", session("chat-0"), None, 0, "")
        stream.put("nothing", session("no-such-session"), None, 0, "")
        stream.expect(session("chat-0"), 0.0)
        stream.not_needed(keys_of(*chains), write=False)
        for name in ("keys", "session", "nothing"):
            assert await seen.until(name, Nearness.ABSENT) == [Nearness.ABSENT]
    assert in_dram(opened, chains) == []
    assert opened.counters.hint_promoted_blocks == 0
