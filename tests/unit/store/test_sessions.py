"""Sessions in a real store: the disk after an answered change, dropped blocks, and the ends of sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.index.environment import SESSIONS
from kvservice.index.session_records import Manifest
from kvservice.store.leases import Client
from kvservice.store.operations.explain import Miss
from kvservice.store.sessions.manifests import SessionAppend
from kvservice.store.sessions.sessions import SessionLimits
from kvservice.store.store import StoreLimits
from kvservice_api.errors import (
    IndexFull,
    InvalidRequest,
    SessionChanged,
    SessionNotFound,
    SessionsFull,
    StorageFailed,
    UnknownLayout,
)
from kvservice_api.keys import BlockChain, block_key
from tests.stores import CALLER, LAYOUT, MIB, OpenStore, some_chain, some_images, until

TTL_S = 60.0
LIMITS = StoreLimits(session=SessionLimits(ttl_s=TTL_S, sessions_max=4, slices_max=16))


@pytest.fixture
async def opened(open_store: Callable[..., Any]) -> OpenStore:
    store: OpenStore = await open_store(limits=LIMITS)
    return store


def turn_of(chain: BlockChain) -> SessionAppend:
    return SessionAppend(chain.parent, chain.keys, chain.token_counts[-1])


async def begin(opened: OpenStore, session_id: str = "chat", chain: BlockChain | None = None) -> Manifest:
    chain = some_chain(2, tail_tokens=5) if chain is None else chain
    return (await opened.sessions.append(CALLER, LAYOUT.fingerprint, session_id, 0, turn_of(chain))).manifest


async def append(opened: OpenStore, manifest: Manifest, chain: BlockChain) -> Manifest:
    turn = turn_of(chain)
    appended = await opened.sessions.append(CALLER, LAYOUT.fingerprint, manifest.session_id, manifest.revision, turn)
    return appended.manifest


def get(opened: OpenStore, session_id: str = "chat") -> Manifest:
    return opened.sessions.get(CALLER, LAYOUT.fingerprint, session_id, None).session.manifest


def same(one: Manifest, other: Manifest) -> bool:
    return (one.revision, one.tip, one.slices.tobytes()) == (other.revision, other.tip, other.slices.tobytes())


async def some_turns() -> None:
    """Run the event loop often enough for every task that waits for no disk."""
    for _ in range(20):
        await asyncio.sleep(0)


async def drops_ended(opened: OpenStore) -> None:
    await some_turns()
    await until(lambda: not any("partial" in task.get_name() for task in opened.tasks._running))


async def reopened(opened: OpenStore, *, kill: bool = False) -> OpenStore:
    await (opened.kill() if kill else opened.close())
    again = opened.files.open()
    await again.store.layouts.open(CALLER, LAYOUT)
    return again


# On disk


@pytest.mark.parametrize("kill", [False, True])
async def test_a_session_is_there_after_a_restart(opened: OpenStore, kill: bool) -> None:
    first = await begin(opened)
    cut = await opened.sessions.truncate(CALLER, LAYOUT.fingerprint, "chat", first.revision, [(3, 20)])

    again = await reopened(opened, kill=kill)

    assert same(get(again), cut.manifest)
    await again.close()


async def test_a_change_is_answered_only_once_it_is_on_disk(opened: OpenStore) -> None:
    with opened.commits_held(TierName.SSD):
        change = asyncio.ensure_future(begin(opened))
        await some_turns()
        assert not change.done()
        with pytest.raises(SessionNotFound):
            get(opened)
    assert same(await change, get(opened))


async def test_a_change_whose_caller_is_gone_is_ended(opened: OpenStore) -> None:
    with opened.commits_held(TierName.SSD):
        change = asyncio.ensure_future(begin(opened))
        await some_turns()
        change.cancel()
        await asyncio.sleep(0)
    await until(lambda: opened.sessions.count == 1)

    again = await reopened(opened)
    assert get(again).revision == 1
    await again.close()


async def test_of_two_concurrent_changes_one_is_refused(opened: OpenStore) -> None:
    chain = some_chain(2, tail_tokens=5)
    first = await begin(opened, chain=chain[:1])

    results = await asyncio.gather(
        append(opened, first, chain[1:]),
        opened.sessions.truncate(CALLER, LAYOUT.fingerprint, "chat", first.revision, [(0, 3)]),
        return_exceptions=True,
    )

    done = [each for each in results if isinstance(each, Manifest)]
    refused = [each for each in results if isinstance(each, SessionChanged)]
    assert (len(done), len(refused)) == (1, 1)
    assert refused[0].now.manifest.revision == done[0].revision == 2
    assert same(get(opened), done[0])


async def test_a_session_that_an_index_has_no_space_for_is_as_it_was(open_store: Callable[..., Any]) -> None:
    limits = StoreLimits(session=SessionLimits(slices_max=8192))
    opened = await open_store(map_bytes=MIB, limits=limits)
    first = await begin(opened)
    too_long = BlockChain(first.tip, tuple(number.to_bytes(32, "big") for number in range(7500)), (16,) * 7500)
    long = SessionAppend(too_long.parent, too_long.keys)

    async def grow(session_id: str) -> None:
        await opened.sessions.fork(CALLER, LAYOUT.fingerprint, "chat", session_id, 0)
        await opened.sessions.append(CALLER, LAYOUT.fingerprint, session_id, 1, long)

    await grow("one")
    await grow("two")
    with pytest.raises(IndexFull):
        await grow("three")

    assert same(get(opened), first)
    assert [len(get(opened, name).slices) for name in ("one", "two", "three")] == [7502, 7502, 3]
    again = await reopened(opened)
    assert same(get(again), first)
    assert [len(get(again, name).slices) for name in ("one", "two", "three")] == [7502, 7502, 3]
    await again.close()


async def test_a_session_that_could_not_be_written_is_as_it_was(
    opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await begin(opened)

    async def refuse(*arguments: object) -> None:
        raise StorageFailed("the drive is gone")

    monkeypatch.setattr(opened.index, "put_session", refuse)
    monkeypatch.setattr(opened.index, "delete_sessions", refuse)
    with pytest.raises(StorageFailed):
        await opened.sessions.truncate(CALLER, LAYOUT.fingerprint, "chat", 1, [(0, 3)])
    with pytest.raises(StorageFailed):
        await opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat")

    assert same(get(opened), first)


async def test_a_tail_whose_turn_could_not_be_written_may_be_appended_again(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await begin(opened)
    chain = await saved(opened, client, BlockChain(first.tip, (block_key(first.tip, range(9)),), (9,)))

    async def refuse(*arguments: object) -> None:
        raise StorageFailed("the drive is gone")

    with monkeypatch.context() as patch:
        patch.setattr(opened.index, "put_session", refuse)
        with pytest.raises(StorageFailed):
            await append(opened, first, chain)
    await drops_ended(opened)
    assert stored(opened, chain.keys[0])

    await append(opened, first, chain)
    await opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat")
    await until(lambda: not stored(opened, chain.keys[0]))


async def test_a_damaged_record_is_not_trusted(opened: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    await begin(opened, "good")
    bad = await begin(opened, "bad", some_chain(1, seed=5))
    environment = opened.index._environments[TierName.SSD]
    await environment.put(SESSIONS, [bad.name], lambda: [b"not a session"])

    with caplog.at_level(logging.ERROR):
        again = await reopened(opened)

    assert get(again, "good").revision == 1
    with pytest.raises(SessionNotFound):
        get(again, "bad")
    assert again.index.damaged_sessions == [bad.name]
    assert (await begin(again, "bad")).revision == 1
    await again.close()


# The tail


async def saved(opened: OpenStore, client: Client, chain: BlockChain) -> BlockChain:
    assert not (await opened.save(client, chain, some_images(chain))).refused
    return chain


def stored(opened: OpenStore, key: bytes) -> bool:
    return opened.hits([key]) == 1


async def test_the_old_tail_is_dropped_once_a_fuller_one_is_named(opened: OpenStore, client: Client) -> None:
    chain = await saved(opened, client, some_chain(2, tail_tokens=5))
    longer = await saved(opened, client, some_chain(2, tail_tokens=9)[2:])
    first = await begin(opened, chain=chain)
    longer = BlockChain(first.tip, longer.keys, longer.token_counts)

    with opened.commits_held(TierName.SSD):
        change = asyncio.ensure_future(append(opened, first, longer))
        await some_turns()
        assert stored(opened, chain.keys[-1]), "until the manifest that does not name it is on disk, it stays"
    await change

    await until(lambda: not stored(opened, chain.keys[-1]))
    assert stored(opened, longer.keys[-1])
    assert opened.hits(chain.keys[:2]) == 2, "full blocks are of use to others"


async def test_a_tail_that_a_fork_names_stays_until_the_fork_no_longer_names_it(
    opened: OpenStore, client: Client
) -> None:
    chain = await saved(opened, client, some_chain(2, tail_tokens=5))
    first = await begin(opened, chain=chain)
    fork = await opened.sessions.fork(CALLER, LAYOUT.fingerprint, "chat", "fork", 0)

    await append(opened, first, BlockChain(first.tip, (bytes(32),), (16,)))
    await opened.sessions.truncate(CALLER, LAYOUT.fingerprint, "fork", fork.manifest.revision, [(0, 33)])
    await drops_ended(opened)
    assert stored(opened, chain.keys[-1]), "one of its tokens is in the fork's history"

    again = await reopened(opened)
    assert stored(again, chain.keys[-1])
    await again.store.sessions.end(CALLER, LAYOUT.fingerprint, "fork")
    await until(lambda: not stored(again, chain.keys[-1]))
    await again.close()


async def test_a_tail_that_is_named_again_while_it_is_dropped_stays(opened: OpenStore, client: Client) -> None:
    chain = await saved(opened, client, some_chain(2, tail_tokens=5))
    await begin(opened, chain=chain)

    with opened.commits_held(TierName.SSD):
        end = asyncio.ensure_future(opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat"))
        fork = asyncio.ensure_future(opened.sessions.fork(CALLER, LAYOUT.fingerprint, "chat", "fork", 0))
        await some_turns()
    assert await end
    await fork

    await drops_ended(opened)
    assert stored(opened, chain.keys[-1])


async def test_a_full_block_that_a_session_names_as_its_tail_is_not_dropped(opened: OpenStore, client: Client) -> None:
    chain = await saved(opened, client, some_chain(2))
    await opened.sessions.append(CALLER, LAYOUT.fingerprint, "chat", 0, SessionAppend(chain.parent, chain.keys, 3))

    await opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat")
    await drops_ended(opened)

    assert opened.hits(chain.keys) == 2


async def test_why_a_partial_block_left_is_remembered(opened: OpenStore, client: Client) -> None:
    chain = await saved(opened, client, some_chain(2, tail_tokens=5))
    first = await begin(opened, chain=chain)
    longer = await saved(opened, client, BlockChain(first.tip, some_chain(0, seed=1, tail_tokens=9).keys, (9,)))
    await append(opened, first, longer)
    await until(lambda: not stored(opened, chain.keys[-1]))
    replaced = opened.explain.missing(CALLER, chain.keys[-1])
    assert replaced.event is not None
    assert (replaced.why, replaced.event.detail) == (Miss.DISCARDED, "no session names it any more")

    opened.files.clock.advance(seconds=TTL_S)
    await opened.sessions.expire()
    await until(lambda: not stored(opened, longer.keys[-1]))
    assert opened.explain.missing(CALLER, longer.keys[-1]).why is Miss.EXPIRED


async def test_tails_that_many_sessions_drop_at_once_are_dropped_in_small_steps(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: OpenStore = await open_store(limits=replace(LIMITS, session=SessionLimits(ttl_s=TTL_S)))
    client = opened.store.leases.attach(CALLER, "test")
    chains = [await saved(opened, client, some_chain(0, seed=seed, tail_tokens=3)) for seed in range(70)]
    for number, chain in enumerate(chains):
        await begin(opened, f"chat-{number}", chain)
    steps: list[int] = []
    discard = opened.block_lifecycle.discard

    async def counted(rows: list[int], *arguments: Any) -> None:
        steps.append(len(rows))
        await discard(rows, *arguments)

    monkeypatch.setattr(opened.block_lifecycle, "discard", counted)
    opened.files.clock.advance(seconds=TTL_S)
    await opened.sessions.expire()
    await until(lambda: opened.blocks.live_count == 0)
    assert (sum(steps), max(steps)) == (70, 32), "a millisecond of the event loop each"


async def test_full_blocks_outlive_their_session(opened: OpenStore, client: Client) -> None:
    chain = await saved(opened, client, some_chain(2, tail_tokens=5))
    await begin(opened, chain=chain)

    assert await opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat")
    await until(lambda: not stored(opened, chain.keys[-1]))

    assert opened.hits(chain.keys) == 2
    assert not await opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat")


# Time


async def test_a_session_expires_when_it_was_not_used_for_its_time_to_live(opened: OpenStore) -> None:
    clock = opened.files.clock
    await begin(opened)
    await begin(opened, "other", some_chain(1, seed=1))

    clock.advance(seconds=TTL_S - 1)
    get(opened)
    clock.advance(seconds=1)

    get(opened)
    with pytest.raises(SessionNotFound, match="expired"):
        get(opened, "other")
    await opened.sessions.expire()
    assert opened.sessions.count == 1
    again = await reopened(opened)
    assert again.sessions.count == 1
    await again.close()


async def test_a_use_counts_after_a_restart(opened: OpenStore) -> None:
    await begin(opened)
    opened.files.clock.advance(seconds=TTL_S - 1)
    get(opened)

    again = await reopened(opened)
    opened.files.clock.advance(seconds=TTL_S - 1)
    get(again)
    await again.close()


async def test_the_error_for_a_missing_session_says_why(opened: OpenStore) -> None:
    sessions, clock = opened.sessions, opened.files.clock
    with pytest.raises(SessionNotFound, match="never begun, or it ended before"):
        sessions.find_by_id(CALLER, "chat")
    await begin(opened)
    await begin(opened, "other", some_chain(1, seed=1))
    used_at_ms = get(opened).used_at_ms
    clock.advance(seconds=1)
    assert [each.session_id for each in sessions.find_by_id(CALLER, "chat")] == ["chat"]
    assert sessions._manifests[1, "chat"].used_at_ms == used_at_ms, "to ask is no use of it"

    await sessions.end(CALLER, LAYOUT.fingerprint, "other")
    with pytest.raises(SessionNotFound, match=r"'other': it was ended at \d{4}-"):
        sessions.find_by_id(CALLER, "other")
    clock.advance(seconds=TTL_S)
    with pytest.raises(SessionNotFound, match=r"'chat': it expired at \d{4}-"):
        sessions.find_by_id(CALLER, "chat")
    await sessions.expire()
    with pytest.raises(SessionNotFound, match=r"'chat': it expired at \d{4}-"):
        sessions.find_by_id(CALLER, "chat")


async def test_the_daemon_itself_forgets_what_expired(opened: OpenStore) -> None:
    await begin(opened)
    opened.files.clock.advance(seconds=TTL_S)

    await until(lambda: opened.sessions.count == 0)
    assert opened.counters.sessions_expired == 1


async def test_an_expired_session_may_be_begun_again(opened: OpenStore) -> None:
    await begin(opened)
    opened.files.clock.advance(seconds=TTL_S)

    assert (await begin(opened, chain=some_chain(1, seed=9))).revision == 1
    assert len(get(opened).slices) == 1


async def test_a_session_that_is_begun_again_while_it_is_forgotten_stays(opened: OpenStore) -> None:
    await begin(opened)
    opened.files.clock.advance(seconds=TTL_S)

    with opened.commits_held(TierName.SSD):
        again = asyncio.ensure_future(begin(opened, chain=some_chain(1, seed=9)))
        await some_turns()
        expiry = asyncio.ensure_future(opened.sessions.expire())
        await some_turns()
    await again
    await expiry

    assert len(get(opened).slices) == 1


async def test_uses_that_could_not_be_written_are_written_later(
    opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(opened)
    opened.files.clock.advance(seconds=TTL_S - 1)
    get(opened)

    async def refuse(*arguments: object) -> None:
        raise StorageFailed("the drive is gone")

    with monkeypatch.context() as patch:
        patch.setattr(opened.index, "put_session", refuse)
        with pytest.raises(StorageFailed):
            await opened.sessions.flush()
    await opened.sessions.flush()

    again = await reopened(opened, kill=True)
    opened.files.clock.advance(seconds=TTL_S - 1)
    get(again)
    await again.close()


async def test_a_clock_that_was_set_back_lengthens_no_session_beyond_its_time(opened: OpenStore) -> None:
    await begin(opened)
    files = opened.files
    await opened.close()
    files.clock._wall_offset_ms -= 10**10

    again = files.open()
    assert get(again).expires_at_ms <= files.clock.wall_ms() + TTL_S * 1000
    files.clock.advance(seconds=TTL_S)
    with pytest.raises(SessionNotFound):
        get(again)
    await again.close()


# Limits and names


async def test_no_more_sessions_are_kept_than_allowed(opened: OpenStore) -> None:
    for number in range(4):
        await begin(opened, f"chat-{number}")
    with pytest.raises(SessionsFull, match="4 sessions"):
        await begin(opened, "one-more")
    with pytest.raises(SessionsFull):
        await opened.sessions.fork(CALLER, LAYOUT.fingerprint, "chat-0", "one-more", 0)

    await opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat-3")
    await begin(opened, "one-more")


async def test_sessions_that_are_begun_at_a_time_are_counted_too(opened: OpenStore) -> None:
    for number in range(2):
        await begin(opened, f"over-{number}")
    opened.files.clock.advance(seconds=TTL_S)
    names = [*(f"over-{number}" for number in range(2)), *(f"chat-{number}" for number in range(6))]
    done = await asyncio.gather(*(begin(opened, name) for name in names), return_exceptions=True)
    assert sum(isinstance(each, Manifest) for each in done) == 4
    assert sum(isinstance(each, SessionsFull) for each in done) == 4


async def test_a_truncation_that_keeps_everything_is_a_use_and_no_change(opened: OpenStore) -> None:
    first = await begin(opened)
    opened.files.clock.advance(seconds=1)
    with opened.commits_held(TierName.SSD):
        async with asyncio.timeout(60):
            kept, _ = await opened.sessions.truncate(CALLER, LAYOUT.fingerprint, "chat", 1, [(0, 37)])
    assert same(kept, first)
    assert kept.expires_at_ms == first.expires_at_ms + 1000
    assert opened.counters.sessions_begun == 1


async def test_no_session_has_more_slices_than_allowed(opened: OpenStore) -> None:
    first = await begin(opened, chain=some_chain(15))

    with pytest.raises(SessionsFull, match="17 slices; at most 16"):
        await append(opened, first, BlockChain(first.tip, (bytes(32), bytes(31) + b"1"), (16, 16)))
    keep = [(number * 8, 4) for number in range(30)]
    with pytest.raises(SessionsFull):
        await opened.sessions.truncate(CALLER, LAYOUT.fingerprint, "chat", 1, keep)
    assert same(get(opened), first)


@pytest.mark.parametrize(
    "session_id", ["", "a b", "x" * 201, "ü", "tab\t", "line\n", "nul\0", "quote'", "star*", "back\\slash"]
)
async def test_odd_session_ids_are_refused(opened: OpenStore, session_id: str) -> None:
    for work in (begin(opened, session_id), opened.store.sessions.end(CALLER, LAYOUT.fingerprint, session_id)):
        with pytest.raises(InvalidRequest, match="session_id"):
            await work
    await begin(opened)
    with pytest.raises(InvalidRequest, match="new_session_id"):
        await opened.sessions.fork(CALLER, LAYOUT.fingerprint, "chat", session_id, 0)


@pytest.mark.parametrize("session_id", ["x" * 200, "a", "user/1234:chat@host+3~2=4.5_6-7", ".", "-"])
async def test_sane_session_ids_are_taken(opened: OpenStore, session_id: str) -> None:
    await begin(opened, session_id)

    again = await reopened(opened)
    assert get(again, session_id).session_id == session_id
    await again.close()


async def test_a_session_of_a_layout_that_was_not_opened_is_refused(opened: OpenStore) -> None:
    with pytest.raises(UnknownLayout):
        opened.sessions.get(CALLER, bytes(32), "chat", None)


async def test_pages_go_through_all_sessions_in_the_order_of_beginning(opened: OpenStore) -> None:
    for number in range(4):
        await begin(opened, f"chat-{number}")
    get(opened, "chat-0")  # A use changes when it expires, not its place in the list.

    first, following = await opened.sessions.page(CALLER, 0, 3, "", None)
    assert [each.session_id for each in first] == ["chat-0", "chat-1", "chat-2"]
    assert following is not None
    await opened.store.sessions.end(CALLER, LAYOUT.fingerprint, "chat-1")
    rest, end = await opened.sessions.page(CALLER, following, 3, "", None)
    assert ([each.session_id for each in rest], end) == (["chat-3"], None)
    one, end = await opened.sessions.page(CALLER, 0, 3, "chat-2", None)
    assert ([each.session_id for each in one], end) == (["chat-2"], None)


async def test_a_block_of_another_size_than_the_session_says_is_missing(opened: OpenStore, client: Client) -> None:
    chain = await saved(opened, client, some_chain(2, tail_tokens=5))
    wrong = SessionAppend(chain.parent, chain.keys, 7)
    await opened.sessions.append(CALLER, LAYOUT.fingerprint, "chat", 0, wrong)

    _, usable, runs = opened.store.sessions.get(CALLER, LAYOUT.fingerprint, "chat", None)

    assert usable == sum(count for count, _, _ in runs) == 2


async def test_blocks_after_a_cut_are_no_ordinary_prefix(opened: OpenStore, client: Client) -> None:
    """An ordinary prompt with the same tokens as a history after its cut does not find the blocks after the cut."""
    chain = await saved(opened, client, some_chain(3))
    first = await begin(opened, chain=chain)
    cut, _ = await opened.sessions.truncate(CALLER, LAYOUT.fingerprint, "chat", 1, [(0, 16)])
    tokens = list(range(16))
    after = await saved(opened, client, BlockChain(cut.tip, (block_key(cut.tip, tokens),), (16,)))
    await append(opened, cut, after)

    assert opened.hits([chain.keys[0], block_key(chain.keys[0], tokens)]) == 1
    assert opened.hits([*get(opened).slices["key"].tolist()]) == 2
    assert first.slices["key"][1].tobytes() not in get(opened).slices["key"].tolist()
