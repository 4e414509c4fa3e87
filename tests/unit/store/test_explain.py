"""Why a block is in its tiers, or missing, on a store whose clock the test moves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvservice.blocks import TierName
from kvservice.policy import PLACEMENTS
from kvservice.policy.lru import LruPolicy
from kvservice.rpc import explained
from kvservice.store.leases import Client
from kvservice.store.miss_reasons import Reason, SpaceFor
from kvservice.store.operations.explain import Arrival, Miss, OtherLayout, TierPlace, differences
from kvservice.store.operations.requests import ReportRecord, Requests
from kvservice.store.types import SessionAppend
from kvservice_api.errors import Draining, InvalidRequest, RequestNotFound
from kvservice_api.image import PAGE_BYTES
from kvservice_api.layout import Layout, Rotary, Shard
from tests.clock import TickingClock
from tests.layouts import changed
from tests.stores import (
    CALLER,
    KIB,
    LAYOUT,
    LIMITS,
    WHOLE,
    OpenStore,
    StoreFiles,
    at_once,
    caller_of,
    frames_of,
    some_chain,
    some_images,
    until,
)

BLOCK = 12 * KIB  # Of the tests' layout.
HEADER = 4 * KIB


async def saved(opened: OpenStore, client: Client, blocks: int, *, seed: int = 0, on_ssd: bool = True) -> list[bytes]:
    chain = some_chain(blocks, seed=seed)
    outcome = await opened.save(client, chain, some_images(chain, seed=seed), on_ssd=on_ssd)
    assert not outcome.refused
    return list(chain.keys)


def places(opened: OpenStore, key: bytes) -> list[TierPlace]:
    (row,) = opened.explain.rows(CALLER, key)
    return opened.explain.places(CALLER, row)


@pytest.mark.parametrize("history_events", [0, 1000])
async def test_an_answer_tells_one_time_since_when_all_is_remembered(
    open_store: Callable[..., Any], history_events: int
) -> None:
    """Without a history that is the time of the call, which must be read once."""
    opened = await open_store(clock=TickingClock(), history_events=history_events)
    key = some_chain(1).keys[0]
    answer = explained.block(key, await opened.store.operators.explain_block(CALLER, key))
    assert answer.remembers_since == answer.miss.remembers_since
    assert answer.remembers_since.ToMilliseconds() > 0


# Stored blocks


async def test_each_copy_tells_how_and_when_it_came(opened: OpenStore, client: Client) -> None:
    clock = opened.files.clock
    saved_ms = clock.wall_ms()
    (key,) = await saved(opened, client, 1, on_ssd=False)
    assert places(opened, key)[0] == TierPlace(TierName.DRAM, Arrival.SAVED, saved_ms)
    await opened.settle()
    assert [place.arrival for place in places(opened, key)] == [Arrival.SAVED, Arrival.WRITTEN_BEHIND]

    await opened.store.moves.evict(CALLER, [key], TierName.DRAM)
    clock.advance(seconds=60)
    await opened.store.moves.prefetch(CALLER, [key], within_s=0, wait=True)
    assert places(opened, key)[0] == TierPlace(TierName.DRAM, Arrival.PROMOTED, saved_ms + 60_000)
    (event,) = opened.explain.events(CALLER, key)
    assert (event.reason, event.tier, event.last_copy) == (Reason.EVICTED_ON_REQUEST, TierName.DRAM, False)


async def test_blocks_of_an_earlier_start_are_explained_as_kept(store_files: Callable[..., StoreFiles]) -> None:
    files = store_files()
    opened = files.open()
    await opened.store.layouts.open(CALLER, LAYOUT)
    (key,) = await saved(opened, opened.store.leases.attach(CALLER, "test"), 1)
    await opened.kill()
    opened = files.open()
    expected = [TierPlace(TierName.DRAM, Arrival.KEPT, 0), TierPlace(TierName.SSD, Arrival.KEPT, 0)]
    assert places(opened, key) == expected
    await opened.close()


# Missing blocks


async def test_an_eviction_after_a_pins_end_is_explained_by_the_expiry(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0)
    client, clock = opened.store.leases.attach(CALLER, "test"), opened.files.clock
    pinned, other = await saved(opened, client, 2, on_ssd=False)
    pin = await opened.store.pins.pin(CALLER, [pinned], 60_000)
    clock.advance(seconds=100)
    await saved(opened, client, 4, seed=1, on_ssd=False)
    found = opened.explain.missing(CALLER, pinned)
    assert found.why is Miss.EXPIRED
    assert found.event is not None
    assert (found.event.pin_ended_ms, found.event.detail) == (pin.until_ms, "lru")
    assert opened.explain.missing(CALLER, other).why is Miss.EVICTED


async def test_a_block_whose_save_runs_is_being_saved(opened: OpenStore, client: Client) -> None:
    chain = some_chain(1)
    async with opened.begin_save(client, chain):
        assert opened.explain.missing(CALLER, chain.keys[0]).why is Miss.BEING_SAVED
    found = opened.explain.missing(CALLER, chain.keys[0])
    assert found.why is Miss.DROPPED_AT_SAVE
    assert found.event is not None
    assert found.event.reason is Reason.ABANDONED


async def test_saves_that_a_draining_daemon_refuses_are_explained(opened: OpenStore, client: Client) -> None:
    opened.drain.begin(CALLER)
    chain = some_chain(1)
    with pytest.raises(Draining, match="draining"):
        opened.begin_save(client, chain)
    found = opened.explain.missing(CALLER, chain.keys[0])
    assert found.why is Miss.DROPPED_AT_SAVE
    assert found.event is not None
    assert found.event.detail == "DRAINING"


async def test_of_a_dram_tier_that_is_gone_only_the_time_is_known(store_files: Callable[..., StoreFiles]) -> None:
    files = store_files(ssd_bytes=0)
    opened = files.open()
    await opened.store.layouts.open(CALLER, LAYOUT)
    assert opened.explain.dram_emptied is None, "nothing was lost by the store's first start"
    (key,) = await saved(opened, opened.store.leases.attach(CALLER, "test"), 1, on_ssd=False)
    await opened.close()
    files.clock.advance(seconds=50)
    files.lose_power()
    for _ in range(2):  # It is still known after another start of the daemon.
        opened = files.open()
        found = opened.explain.missing(CALLER, key)
        assert (found.why, found.event) == (Miss.NEVER_STORED_OR_LOST, None)
        assert found.dram_emptied is not None
        assert found.dram_emptied.why == "there is no arena"
        emptied_ms = found.dram_emptied.at_ms
        await opened.close()
        files.clock.advance(seconds=50)
    assert emptied_ms == files.clock.wall_ms() - 100_000


async def test_of_an_arena_that_was_replaced_each_block_is_known(store_files: Callable[..., StoreFiles]) -> None:
    files = store_files()
    opened = files.open()
    await opened.store.layouts.open(CALLER, LAYOUT)
    only_dram, both = await saved(opened, opened.store.leases.attach(CALLER, "test"), 2)
    await opened.store.moves.evict(CALLER, [only_dram], TierName.SSD)
    arena = opened.arena.directory / "arena"
    await opened.close()
    os.truncate(arena, PAGE_BYTES)
    opened = files.open()
    found = opened.explain.missing(CALLER, only_dram)
    assert found.why is Miss.LOST_IN_RESTART
    assert found.event is not None
    assert found.event.tier == TierName.DRAM
    assert found.dram_emptied is not None
    assert f"it has {PAGE_BYTES} bytes" in found.dram_emptied.why
    assert [place.tier for place in places(opened, both)] == [TierName.SSD]
    await opened.close()


async def test_a_save_that_waits_in_line_for_another_one_does_not_count_as_its_end(
    opened: OpenStore, client: Client
) -> None:
    chain = some_chain(1)
    images = some_images(chain)
    async with opened.begin_save(client, chain) as upload:
        second = asyncio.create_task(opened.save(client, chain, images))
        await until(lambda: opened.claims.waiting_for(chain.keys[0]) == 2)
        for frame in frames_of(LAYOUT, WHOLE, chain, images):
            upload.write(frame)
    await second
    assert opened.explain.rows(CALLER, chain.keys[0]), "the second one stored it"


# Requests


def ask(
    opened: OpenStore, keys: list[bytes], request_id: str = "r", *, layout: Layout = LAYOUT, shard: Shard = WHOLE
) -> Any:
    at_once(opened.store.lookups.lookup(CALLER, layout.fingerprint, shard, keys, 0, request_id))
    return requests_of(opened, request_id)[-1]


def requests_of(opened: OpenStore, request_id: str = "r") -> list[Any]:
    return list(opened.explain.lookups(CALLER, opened.requests.get(CALLER, request_id)))


async def test_a_miss_is_explained_as_of_the_time_of_the_lookup(opened: OpenStore, client: Client) -> None:
    clock = opened.files.clock
    keys = await saved(opened, client, 2)
    await opened.store.operators.discard(CALLER, keys[1:])
    clock.advance(seconds=1)
    first = ask(opened, keys)
    assert (first.record.hit, first.missing.key, first.missing.why) == (1, keys[1], Miss.DISCARDED)
    assert first.missing.stored_since_ms == 0

    clock.advance(seconds=1)
    await saved(opened, client, 2)  # As an engine saves after a miss.
    await opened.settle()
    await opened.store.moves.evict(CALLER, keys[1:], TierName.DRAM)
    await opened.store.moves.evict(CALLER, keys[1:], TierName.SSD)
    (again,) = requests_of(opened)
    assert again.missing.why is Miss.DISCARDED, "what came later does not count"
    assert opened.explain.missing(CALLER, keys[1]).why is Miss.EVICTED


async def test_a_block_that_was_stored_after_the_miss_says_so(opened: OpenStore, client: Client) -> None:
    keys = list(some_chain(1).keys)
    assert ask(opened, keys).missing.why is Miss.NEVER_STORED
    opened.files.clock.advance(seconds=5)
    await saved(opened, client, 1)
    (lookup,) = requests_of(opened)
    assert lookup.missing.why is Miss.NEVER_STORED
    assert lookup.missing.stored_since_ms == lookup.record.at_ms + 5000


async def test_a_block_of_which_only_other_shards_are_stored_is_there_in_part(
    opened: OpenStore, client: Client
) -> None:
    half = Shard(0, 2, 0, 1)
    chain = some_chain(1)
    await opened.save(client, chain, some_images(chain, shard=half), shard=half)
    assert ask(opened, list(chain.keys)).missing.why is Miss.IN_PART
    assert ask(opened, list(chain.keys), shard=half).missing is None


async def test_other_layout_is_the_reason_only_if_this_layout_has_no_blocks_and_another_of_the_model_has(
    opened: OpenStore, client: Client
) -> None:
    await saved(opened, client, 2)
    other = changed(LAYOUT, dtype="float16", block_tokens=32)
    stranger = replace(LAYOUT, model_id="another")
    for layout in (other, stranger):
        await opened.store.layouts.open(CALLER, layout)
    chain = some_chain(2, layout=other)
    lookup = ask(opened, list(chain.keys), layout=other)
    assert lookup.missing.why is Miss.OTHER_LAYOUT
    assert lookup.other_layouts == [
        OtherLayout(LAYOUT, {"dtype": ("float32", "float16"), "block_tokens": ("16", "32")})
    ]
    assert ask(opened, list(some_chain(1, layout=stranger).keys), layout=stranger).missing.why is Miss.NEVER_STORED

    await opened.save(client, chain, some_images(chain, layout=other), layout=other)
    absent = list(some_chain(1, seed=9, layout=other).keys)
    assert ask(opened, absent, layout=other).missing.why is Miss.NEVER_STORED, "the layout has blocks of its own"
    (before, *_) = requests_of(opened)
    assert before.missing.why is Miss.OTHER_LAYOUT, "as of then"


async def test_other_layout_is_the_reason_for_an_emptied_layout_and_after_a_restart(
    store_files: Callable[..., StoreFiles],
) -> None:
    other = changed(LAYOUT, dtype="float16")
    chain = some_chain(2, layout=other)
    files = store_files()
    opened = files.open()
    client = opened.store.leases.attach(CALLER, "test")
    for layout in (LAYOUT, other):
        await opened.store.layouts.open(CALLER, layout)
    await saved(opened, client, 2)
    await opened.save(client, chain, some_images(chain, layout=other), layout=other)
    await opened.store.operators.discard_layout(CALLER, other.fingerprint)
    absent = list(some_chain(1, seed=9, layout=other).keys)
    assert ask(opened, absent, layout=other).missing.why is Miss.OTHER_LAYOUT
    await opened.kill()
    opened = files.open()
    assert ask(opened, absent, layout=other).missing.why is Miss.OTHER_LAYOUT
    await opened.close()


def test_layouts_differ_in_the_fields_of_their_rotation_too() -> None:
    rotated = changed(LAYOUT, rotary=Rotary("yarn", dims=8, base=5e5, parameters=(("factor", 4.0),)))
    assert differences(rotated, LAYOUT) == {
        "rotary.kind": ("yarn", "none"),
        "rotary.dims": ("8", "0"),
        "rotary.base": ("500000.0", "0.0"),
        "rotary.parameters": ("(('factor', 4.0),)", "()"),
    }


async def test_only_the_last_requests_are_remembered_and_only_so_much_of_each(
    open_store: Callable[..., Any],
) -> None:
    opened = await open_store(limits=replace(LIMITS, requests_remembered=3))
    client, store = opened.store.leases.attach(CALLER, "test"), opened.store
    keys = await saved(opened, client, 1)
    for number in range(5):
        ask(opened, keys, f"request {number}")
    with pytest.raises(RequestNotFound, match="'request 1'"):
        opened.requests.get(CALLER, "request 1")
    lease = at_once(store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, keys, 30, "request 2")).lease
    assert lease is not None
    for _ in range(100):
        ask(opened, keys, "request 2")
    found = opened.requests.get(CALLER, "request 2")
    assert len(found.lookups) + found.lookups_more == 102
    assert len(found.lookups) == 64
    for number in range(3):
        ask(opened, keys, f"later {number}")
    assert not opened.requests._by_lease, "what is forgotten is forgotten whole"
    with opened.requests.load(CALLER, lease, range(1), range(2)):
        pass  # A load whose lookup is not in the history any more.


async def test_no_request_is_remembered_where_the_operator_wants_none(open_store: Callable[..., Any]) -> None:
    opened = await open_store(limits=replace(LIMITS, requests_remembered=0))
    at_once(opened.store.lookups.lookup(CALLER, LAYOUT.fingerprint, WHOLE, some_chain(1).keys, 0, "none"))
    with pytest.raises(RequestNotFound):
        opened.store.operators.explain_request(CALLER, "none")


def report(report_id: int = 0, plan: str = "load") -> ReportRecord:
    return ReportRecord(report_id, 0, plan, "done", None)


async def test_reports_are_bounded_and_one_that_comes_twice_counts_once(opened: OpenStore) -> None:
    requests = Requests(opened.blocks, opened.files.clock, 2)
    for report_id in (1, 2, 1, 0, 0):
        requests.note_report(CALLER, "r", report(report_id))
    assert [each.report_id for each in requests.get(CALLER, "r").reports] == [1, 2, 0, 0]
    assert requests.reported == {("load", "done"): 4}
    for _ in range(100):
        requests.note_report(CALLER, "r", report(plan="mixed"))
    found = requests.get(CALLER, "r")
    assert (len(found.reports), found.reports_more) == (64, 40)
    assert requests.reported["mixed", "done"] == 100

    requests.note_report(CALLER, "s", report())
    requests.note_report(CALLER, "t", report())
    with pytest.raises(RequestNotFound, match="'r'"):
        requests.get(CALLER, "r")

    none = Requests(opened.blocks, opened.files.clock, 0)
    none.note_report(CALLER, "r", report(1))
    assert none.reported == {("load", "done"): 1}
    with pytest.raises(RequestNotFound):
        none.get(CALLER, "r")


async def test_a_report_stands_beside_the_lookups_of_its_request(opened: OpenStore, client: Client) -> None:
    keys = await saved(opened, client, 1)
    opened.requests.note_report(CALLER, "r", report(1))
    ask(opened, keys, "r")
    opened.requests.note_report(CALLER, "r", report(2))
    found = opened.requests.get(CALLER, "r")
    assert (len(found.lookups), len(found.reports)) == (1, 2)


async def test_a_request_id_that_is_too_long_is_refused(opened: OpenStore) -> None:
    with pytest.raises(InvalidRequest, match="200"):
        at_once(opened.store.lookups.lookup(CALLER, LAYOUT.fingerprint, WHOLE, list(some_chain(1).keys), 0, "x" * 201))


async def test_how_loads_ended_is_remembered_with_their_lookup(opened: OpenStore, client: Client) -> None:
    keys = await saved(opened, client, 2)
    await opened.store.moves.evict(CALLER, keys[1:], TierName.DRAM)
    store = opened.store
    lease = at_once(store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, keys, 30, "r")).lease
    assert lease is not None
    with opened.requests.load(CALLER, lease, range(2), range(2)) as record:
        record.sent_bytes = 7
        opened.files.clock.advance(seconds=2)
    with pytest.raises(InvalidRequest), opened.requests.load(CALLER, lease, range(1), range(2)):
        raise InvalidRequest("as it happens")
    with pytest.raises(asyncio.CancelledError), opened.requests.load(CALLER, lease, range(1, 2), range(1)):
        raise asyncio.CancelledError
    (lookup,) = opened.requests.get(CALLER, "r").lookups
    outcomes = [(load.outcome, load.from_dram, load.from_ssd, load.sent_bytes) for load in lookup.loads]
    assert outcomes == [("done", 1, 1, 7), ("invalid_request", 1, 0, 0), ("cancelled", 0, 1, 0)]
    assert lookup.loads[0].took_ms == pytest.approx(2000)


async def test_a_session_tells_its_worth_and_what_got_its_space_in_dram(open_store: Callable[..., Any]) -> None:
    opened = await open_store(dram_bytes=8 * BLOCK, policy=PLACEMENTS["fifo"]())
    client = opened.store.leases.attach(CALLER, "engine")
    chain = some_chain(4, seed=1)
    await opened.save(client, chain, some_images(chain, seed=1), on_ssd=True)
    turn = SessionAppend(chain.parent, chain.keys)
    await opened.store.sessions.append(CALLER, LAYOUT.fingerprint, "talk", 0, turn)
    (found,) = await opened.store.operators.explain_session(CALLER, "talk")
    assert (found.left_dram, found.missing, found.worth.policy) == (None, None, "fifo")
    assert [value.tier for value in found.worth.values] == [TierName.DRAM, TierName.SSD]
    assert found.worth.values[0].inputs["size_bytes"] == 4 * BLOCK

    at_ms = opened.files.clock.wall_ms()
    opened.files.clock.advance(seconds=5)
    await saved(opened, client, 6, seed=2)
    (found,) = await opened.store.operators.explain_session(CALLER, "talk")
    assert found.left_dram is not None
    key, event = found.left_dram
    assert key in chain.keys
    assert event is not None
    assert (event.reason, event.space_for, event.at_ms) == (Reason.EVICTED, SpaceFor.SAVE, at_ms + 5000)
    assert event.score == 1.0, "of the item that came first"


async def test_without_items_a_block_is_worth_its_place_by_recency(opened: OpenStore, client: Client) -> None:
    first, second = await saved(opened, client, 2)
    found = [await opened.store.operators.explain_block(CALLER, key) for key in (first, second)]
    assert [each.worth.policy for each in found] == ["lru", "lru"]
    before = [each.worth.values[0].inputs["blocks_before_it"] for each in found]
    assert sorted(before) == [0.0, 1.0]


async def test_a_policy_that_fails_to_explain_leaves_the_rest_of_the_answer(
    open_store: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(LruPolicy):
        def explain(self, *of: Any) -> dict[str, float]:
            raise ArithmeticError

    opened = await open_store(policy=Silent())
    (key,) = await saved(opened, opened.store.leases.attach(CALLER, "engine"), 1)
    found = await opened.store.operators.explain_block(CALLER, key)
    assert len(found.shards) == 1
    assert found.worth.values == []
    assert any("failed to explain" in record.getMessage() for record in caplog.records)
