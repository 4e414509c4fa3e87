"""Hints: the mirror of a queue, the window, and readiness."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import TierName
from kvservice.policy import daemon_policy
from kvservice.policy.base import Hint
from kvservice.store.caller import Tenant
from kvservice.store.hints.exchange import HintExchange, HintLimits
from kvservice.store.hints.queue_mirror import HintSubject, HintTotals, QueueEntry, QueueLimits, QueueMirror
from kvservice.store.leases import Client
from kvservice.store.operations.explain import Arrival
from kvservice.store.types import HintStream, Nearness, SessionAppend
from kvservice_api.errors import UnknownClient
from kvservice_api.keys import BlockChain
from tests.clock import HandClock
from tests.file_faults import FaultyCalls
from tests.stores import CALLER, KIB, LAYOUT, PATIENT, OpenStore, caller_of, some_chain, some_images, until

BLOCK = 12 * KIB
BLOCKS = 4  # Of each session.
SUBJECT = HintSubject(b"", "", bytes(32))


def entry(name: str, keys: int = 1) -> QueueEntry:
    return QueueEntry(name, HintSubject(b"", "", bytes(32 * keys)), None, 0)


def unlimited() -> HintTotals:
    return HintTotals(QueueLimits(1000, 1000))


def names(queue: QueueMirror) -> list[str]:
    return [each.request_id for each in queue]


@given(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.integers(0, 9), st.integers(-1, 9)), max_size=60))
def test_the_mirror_has_the_order_of_a_list_with_the_same_changes(changes: list[tuple[str, int, int]]) -> None:
    queue, model = QueueMirror(QueueLimits(8, 8), unlimited()), list[str]()
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
    queue = QueueMirror(QueueLimits(8, 10), unlimited())

    assert queue.put(entry("a", 6))
    assert not queue.put(entry("b", 5))
    assert queue.put(entry("a", 10)), "it replaces its own keys"
    queue.remove("a")
    assert queue.put(entry("b", 5))


def test_queues_together_have_no_more_than_the_totals() -> None:
    totals = HintTotals(QueueLimits(3, 10))
    one, two = QueueMirror(QueueLimits(8, 8), totals), QueueMirror(QueueLimits(8, 8), totals)

    assert one.put(entry("a", 6))
    assert not two.put(entry("b", 5))
    assert two.key_count == 0
    assert two.put(entry("b", 2))
    assert two.put(entry("c", 0))
    assert not two.put(entry("d", 0))
    one.clear()
    assert two.put(entry("d", 6))
    two.clear()
    assert (totals.entries, totals.keys) == (0, 0)


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
    await opened.store.sessions.append(CALLER, LAYOUT.fingerprint, name, 0, append)
    await opened.store.moves.evict(CALLER, chain.keys, TierName.DRAM)


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
    with opened.store.hints.open(caller_of(client)) as stream:
        yield stream


def exchange_of(opened: OpenStore) -> HintExchange:
    return opened.store.hints


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
    explained = await opened.store.operators.explain_block(CALLER, chains[0].keys[0])
    [(_, places)] = explained.shards
    assert [place.arrival for place in places] == [Arrival.HINTED, Arrival.WRITTEN_BEHIND]


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
    other = opened.store.leases.attach(CALLER, "other")
    with opened.store.hints.open(caller_of(other)) as second:
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
    with opened.store.hints.open(stranger) as stream:
        seen = Seen(stream)
        stream.put("keys", keys_of(*chains), None, 0, "")
        stream.put("session", session("chat-0"), None, 0, "")
        stream.put("nothing", session("no-such-session"), None, 0, "")
        stream.expect(session("chat-0"), 0.0, Hint.TOOL_CALL)
        stream.not_needed(keys_of(*chains), write=False)
        for name in ("keys", "session", "nothing"):
            assert await seen.until(name, Nearness.ABSENT) == [Nearness.ABSENT]
    assert in_dram(opened, chains) == []
    assert opened.counters.hint_promoted_blocks == 0


async def test_the_history_of_a_typing_person_is_promoted(
    opened: OpenStore, client: Client, stream: HintStream
) -> None:
    chains = await stored_sessions(opened, client, 2)

    stream.expect(session("chat-1"), None, Hint.TYPING)

    await until(lambda: whole_in_dram(opened, chains[1]))
    assert in_dram(opened, chains) == [1]


async def test_the_history_of_a_tool_call_is_promoted_shortly_before_its_answer(
    opened: OpenStore, client: Client, stream: HintStream
) -> None:
    chains, exchange = await stored_sessions(opened, client, 1), exchange_of(opened)
    stream.expect(session("chat-0"), 300.0, Hint.TOOL_CALL)
    await exchange.tick()
    assert in_dram(opened, chains) == []

    opened.files.clock.advance(seconds=289.0)
    await exchange.tick()
    assert in_dram(opened, chains) == []

    opened.files.clock.advance(seconds=2.0)
    await until(lambda: whole_in_dram(opened, chains[0]))
    opened.files.clock.advance(seconds=80.0)
    await until(lambda: not stream.expected)


async def test_hints_promote_no_more_than_their_share_and_no_faster_than_their_rate(
    open_store: Callable[..., Any],
) -> None:
    limits = HintLimits(QueueLimits(16, 256), 0.5, 10 * BLOCK)
    opened: OpenStore = await open_store(dram_bytes=40 * BLOCK + 4 * KIB, limits=replace(PATIENT, hints=limits))
    client, clock = opened.store.leases.attach(CALLER, "test"), opened.files.clock
    chains = await stored_sessions(opened, client, 6)
    with opened.store.hints.open(caller_of(client)) as stream:
        queue_sessions(stream, range(6))
        exchange = exchange_of(opened)

        async def promoted() -> int:
            for _ in range(20):
                await exchange.tick()
            await opened.settle()
            return len(in_dram(opened, chains))

        await until(lambda: len(in_dram(opened, chains)) == 3)
        assert await promoted() == 3, "the rate, with one second in advance"
        clock.advance(seconds=1.5)
        await until(lambda: len(in_dram(opened, chains)) == 5)
        clock.advance(seconds=60.0)
        assert await promoted() == 5, "the share: 20 blocks"


async def test_a_request_named_by_its_whole_blocks_reads_the_partial_block_after_them_too(
    opened: OpenStore, client: Client, stream: HintStream
) -> None:
    chain, other = some_chain(3, tail_tokens=2), some_chain(3, seed=1, tail_tokens=2)
    for number, each in enumerate((chain, other)):
        await stored_session(opened, client, f"chat-{number}", each)
    stream.put("request-0", keys_of(chain[:3]), None, 0, "")
    stream.put("request-1", keys_of(other[:2]), None, 0, "")
    await until(lambda: whole_in_dram(opened, chain) and whole_in_dram(opened, other[:2]))
    await opened.settle()
    assert not any(TierName.DRAM in opened.residency(key) for key in other.keys[2:]), (
        "it reads a beginning of the history"
    )


async def test_an_error_of_ours_ends_no_engines_hints(
    opened: OpenStore, client: Client, stream: HintStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains, failed = await stored_sessions(opened, client, 2), asyncio.Event()

    def fail(*arguments: object) -> None:
        failed.set()
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(opened.store._policy, "want", fail)
    queue_sessions(stream, [0])
    await failed.wait()
    queue_sessions(stream, [1])
    await until(lambda: whole_in_dram(opened, chains[1]))


async def test_the_queue_of_a_client_that_leaves_promotes_nothing_more(opened: OpenStore, client: Client) -> None:
    await stored_sessions(opened, client, 4)
    exchange = exchange_of(opened)
    with opened.store.hints.open(caller_of(client)) as stream:
        queue_sessions(stream, range(4))
        assert (exchange.stream_count, exchange.queued_count) == (1, 4)
        opened.store.leases.detach(CALLER, client)
        assert await stream.changed(10) is None
    assert (exchange.stream_count, exchange.queued_count) == (0, 0)
    await exchange.tick()
    with pytest.raises(UnknownClient), opened.store.hints.open(caller_of(client)):
        pass


async def fill(opened: OpenStore, client: Client, blocks: int, seed: int) -> BlockChain:
    """Save blocks that need an eviction for each."""
    chain = some_chain(blocks, seed=seed)
    assert not (await opened.save(client, chain, some_images(chain), on_ssd=True)).refused
    return chain


async def test_blocks_of_an_ended_session_are_evicted_first(
    opened: OpenStore, client: Client, stream: HintStream
) -> None:
    chains = await stored_sessions(opened, client, 1)
    old = await fill(opened, client, 16, seed=100)
    await opened.store.moves.prefetch(CALLER, chains[0].keys, within_s=0, wait=True)
    opened.hits(chains[0].keys)  # The session is the newest of all.
    await fill(opened, client, 4, seed=101)
    assert whole_in_dram(opened, chains[0])

    stream.not_needed(session("chat-0"), write=True)
    await until(lambda: not exchange_of(opened)._is_telling)
    await fill(opened, client, 4, seed=102)

    assert in_dram(opened, chains) == []
    assert all(TierName.DRAM in opened.residency(key) for key in old.keys)


@pytest.mark.parametrize("name", ["lookahead", "foresight"])
async def test_blocks_of_an_ended_session_are_evicted_first_by_every_policy(
    open_store: Callable[..., Any], name: str
) -> None:
    opened: OpenStore = await open_store(
        policy=daemon_policy(name), clock=HandClock(), dram_bytes=24 * BLOCK + 4 * KIB, limits=PATIENT
    )
    client, chains = (
        opened.store.leases.attach(CALLER, "test"),
        [some_chain(BLOCKS, seed=number) for number in range(6)],
    )
    for number, chain in enumerate(chains):
        await opened.save(client, chain, some_images(chain), on_ssd=True)
        append = SessionAppend(chain.parent, chain.keys)
        await opened.store.sessions.append(CALLER, LAYOUT.fingerprint, f"chat-{number}", 0, append)
    with opened.store.hints.open(caller_of(client)) as stream:
        stream.not_needed(session("chat-4"), write=True)
        await until(lambda: not exchange_of(opened)._ended)
        await opened.decided()  # An order of victims from before is out of date.
        await fill(opened, client, BLOCKS, seed=100)

    assert in_dram(opened, chains) == [0, 1, 2, 3, 5]
    items = opened.store._policy.items
    assert items is not None
    row = int(opened.blocks.rows_of_keys(chains[4].keys[:1])[0])
    assert await items.on_thread(lambda known, now_s: bool(known.items.ended[known.item_of(row)]))


async def test_queued_requests_are_read_in_the_order_of_the_queue(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: OpenStore = await open_store(
        policy=daemon_policy("lookahead"), dram_bytes=40 * BLOCK + 4 * KIB,
        limits=replace(PATIENT, hints=HintLimits(QueueLimits(16, 256), 0.9, 1 << 40)),
    )  # fmt: skip
    assert opened.promoter is not None
    client, order, promote = opened.store.leases.attach(CALLER, "test"), list[int](), opened.promoter.promote
    chains = await stored_sessions(opened, client, 5)

    async def noted(rows: Sequence[int], **options: Any) -> None:
        order.extend(number for number, chain in enumerate(chains) if opened.blocks.key_of(rows[0]) in chain.keys)
        await promote(rows, **options)

    monkeypatch.setattr(opened.promoter, "promote", noted)
    with opened.store.hints.open(caller_of(client)) as stream:
        queue_sessions(stream, range(5))
        await until(lambda: in_dram(opened, chains) == [0, 1, 2, 3, 4])
    assert order == [0, 1, 2, 3, 4]


async def test_blocks_that_another_session_names_or_another_client_has_used_are_not_evicted_first(
    opened: OpenStore, client: Client, stream: HintStream
) -> None:
    chains, other = await stored_sessions(opened, client, 3), opened.store.leases.attach(CALLER, "other")
    blocks = opened.blocks
    shared = SessionAppend(chains[0].parent, chains[0].keys[:3])
    await opened.store.sessions.append(CALLER, LAYOUT.fingerprint, "shared", 0, shared)
    lease = opened.lookup(other, chains[1].keys[:2])
    assert lease is not None
    opened.leases.begin_release(caller_of(other), lease.lease_id)

    for number in range(3):
        stream.not_needed(session(f"chat-{number}"), write=True)
    await until(lambda: not exchange_of(opened)._is_telling)

    def is_first(key: bytes) -> bool:
        return not blocks.access_seq[blocks.rows_of_keys([key])[0]]

    assert [is_first(key) for key in chains[0].keys] == [False, False, False, True]
    assert [is_first(key) for key in chains[1].keys] == [False, False, True, True]
    assert all(map(is_first, chains[2].keys))


async def test_a_block_that_is_not_to_be_kept_is_not_written_to_ssd_until_it_is_used(
    open_store: Callable[..., Any],
) -> None:
    calls = FaultyCalls()
    opened: OpenStore = await open_store(calls=calls)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(40)
    with calls.held("pwritev"), opened.store.hints.open(caller_of(client)) as stream:
        await opened.save(client, chain, some_images(chain))
        stream.not_needed(keys_of(chain), write=False)
        row = opened.blocks.rows_of_keys(chain.keys[-1:])
        # A turn at a time: others leave the queue before it meanwhile.
        while not opened.blocks.unwanted_on_ssd[row]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        opened.hits(chain.keys[-1:])
    await opened.settle()

    written = [TierName.SSD in opened.residency(key) for key in chain.keys]
    assert written[-1], "a request has found it meanwhile"
    assert sum(written[:-1]) <= opened.store.limits.writes_in_flight, "those that were being written"


async def test_hints_that_repeat_are_bounded(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=24 * BLOCK + 4 * KIB, limits=PATIENT)
    client = opened.store.leases.attach(CALLER, "test")
    with opened.store.hints.open(caller_of(client)) as stream:
        await repeat_hints(opened, client, stream)


async def repeat_hints(opened: OpenStore, client: Client, stream: HintStream) -> None:
    chains = await stored_sessions(opened, client, 1)
    await opened.store.moves.prefetch(CALLER, chains[0].keys, within_s=0, wait=True)
    for number in range(3000):
        stream.not_needed(session("chat-0"), write=True)
        stream.expect(keys_of(some_chain(1, seed=number)), 5.0, Hint.TYPING)
    await until(lambda: not exchange_of(opened)._is_telling)
    assert len(stream.expected) == 1024
    assert opened.counters.hints_over_limit == 2 * (3000 - 1024)
    assert all(len(queue) <= BLOCKS for queue in opened.evictor._victims.values())
    assert exchange_of(opened).totals.entries == 1024
    stream.end()
    assert exchange_of(opened).totals.entries == exchange_of(opened).totals.keys == 0


async def test_the_readiness_of_a_long_queue_is_evaluated_in_parts_and_completely(
    open_store: Callable[..., Any],
) -> None:
    limits = HintLimits(QueueLimits(5000, 5000), 0.5, 1 << 40)
    opened: OpenStore = await open_store(limits=replace(PATIENT, hints=limits))
    client = opened.store.leases.attach(CALLER, "test")
    with opened.store.hints.open(caller_of(client)) as stream:
        for number in range(5000):
            stream.put(str(number), session("no-such-session"), None, 0, "")
        found: dict[str, Nearness] = {}
        while len(found) < 5000:
            changed = await stream.changed(1000)
            assert changed is not None
            assert len(changed) <= 1000
            found |= {each.request_id: each.nearness for each in changed}
        await stored_session(opened, client, "no-such-session", some_chain(2))
        while set(found.values()) != {Nearness.IN_DRAM}:
            changed = await stream.changed(1000)
            assert changed is not None
            found |= {each.request_id: each.nearness for each in changed}


async def test_the_window_is_promoted_and_other_blocks_are_evicted_before_it(
    open_store: Callable[..., Any],
) -> None:
    limits = HintLimits(QueueLimits(16, 256), 0.5, 1 << 40)
    opened: OpenStore = await open_store(dram_bytes=24 * BLOCK + 4 * KIB, limits=replace(PATIENT, hints=limits))
    client = opened.store.leases.attach(CALLER, "test")
    chains = await stored_sessions(opened, client, 6)
    await fill(opened, client, 20, seed=100)
    with opened.store.hints.open(caller_of(client)) as stream:
        seen = Seen(stream)
        queue_sessions(stream, range(6))
        for number in range(3):
            await seen.until(f"request-{number}", Nearness.IN_DRAM)
        for seed in range(101, 106):
            await fill(opened, client, 10, seed=seed)
        assert in_dram(opened, chains) == [0, 1, 2]
    await exchange_of(opened).tick()
    for seed in range(106, 110):
        await fill(opened, client, 20, seed=seed)
    assert in_dram(opened, chains) == [], "no request awaits them any more"


async def test_readiness_goes_from_on_ssd_over_coming_to_in_dram(open_store: Callable[..., Any]) -> None:
    calls = FaultyCalls()
    limits = HintLimits(QueueLimits(16, 256), 0.5, 1 << 40)
    opened: OpenStore = await open_store(
        dram_bytes=24 * BLOCK + 4 * KIB, limits=replace(PATIENT, hints=limits), calls=calls
    )
    client = opened.store.leases.attach(CALLER, "test")
    await stored_sessions(opened, client, 4)
    with opened.store.hints.open(caller_of(client)) as stream:
        seen = Seen(stream)
        with calls.held("preadv"):
            queue_sessions(stream, range(4))
            await seen.until("request-2", Nearness.COMING)
            await seen.until("request-3", Nearness.ON_SSD)
        await seen.until("request-2", Nearness.IN_DRAM)
        stream.remove("request-0")
        with calls.held("preadv"):
            await seen.until("request-3", Nearness.COMING)
        states = await seen.until("request-3", Nearness.IN_DRAM)
    assert list(dict.fromkeys(states)) == [Nearness.ON_SSD, Nearness.COMING, Nearness.IN_DRAM]


async def test_the_reads_of_an_overdue_request_are_due_after_those_of_loads(
    opened: OpenStore, client: Client, stream: HintStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stored_sessions(opened, client, 2)
    promoter, due = opened.promoter, list[float]()
    assert promoter is not None
    promote = promoter.promote

    async def noted(rows: Sequence[int], *, within_s: float, wait: bool) -> None:
        due.append(within_s)
        await promote(rows, within_s=within_s, wait=wait)

    monkeypatch.setattr(promoter, "promote", noted)
    stream.put("late", session("chat-0"), 0.0, 0, "")
    stream.put("early", session("chat-1"), 30.0, 0, "")
    seen = Seen(stream)
    await seen.until("late", Nearness.IN_DRAM)
    await seen.until("early", Nearness.IN_DRAM)
    assert due == [pytest.approx(0.1), pytest.approx(30.0)]
