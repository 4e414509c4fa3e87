"""A policy is replaced while a store works."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy import DAEMON_POLICIES, daemon_policy
from kvservice.store.hints.queue_mirror import HintSubject
from kvservice.store.leases import Client
from kvservice.store.mover.evictor import Watermarks
from kvservice_api.errors import InvalidRequest
from tests.clock import HandClock
from tests.stores import CALLER, KIB, LAYOUT, MIB, OpenStore, caller_of, some_chain, some_images, until

_SESSIONS, _BLOCKS = 24, 4
_CHAINS = [some_chain(_BLOCKS, seed=seed) for seed in range(_SESSIONS)]
_IMAGES = some_images(_CHAINS[0])


@pytest.fixture
async def small(open_store: Callable[..., Any]) -> OpenStore:
    """DRAM for a third of the sessions."""
    opened: OpenStore = await open_store(
        dram_bytes=_SESSIONS * _BLOCKS * 12 * KIB // 3, ssd_bytes=4 * MIB, watermarks=Watermarks(0.05, 0.1)
    )
    return opened


async def turns(opened: OpenStore, client: Client, seed: int, count: int) -> int:
    """Lookups, loads, prefetches and saves. Returns how many turns found their whole history."""
    random, found = np.random.default_rng(seed), 0
    for _ in range(count):
        chain = _CHAINS[int(random.integers(_SESSIONS))]
        lease = opened.lookup(client, chain.keys)
        if lease is None:
            await opened.save(client, chain, _IMAGES)
        else:
            if random.random() < 0.3:
                await opened.store.moves.prefetch(CALLER, chain.keys, within_s=0.0, wait=False)
            layers = await opened.load(lease)
            assert sum(map(len, layers)) == sum(map(len, _IMAGES[: len(lease.rows)]))
            found += len(lease.rows) == _BLOCKS
            await opened.store.leases.release(caller_of(client), lease.lease_id)
        await asyncio.sleep(0)
    return found


def placement_threads() -> int:
    return sum(thread.name.startswith("placement") for thread in threading.enumerate())


async def leases_known(opened: OpenStore) -> tuple[list[int], list[int]]:
    """Leases per row as the policy knows them, and as they are."""
    ranking = opened.store._policy.items
    assert ranking is not None
    known = await ranking.on_thread(lambda items, now_s: items._leases.copy())
    end = opened.blocks.row_end
    return known[:end].tolist(), opened.blocks.leases[:end].tolist()


async def test_policies_are_switched_under_load_and_nothing_is_lost(small: OpenStore) -> None:
    policies, client = small.store.policies, small.store.leases.attach(CALLER, "engine")
    held = _CHAINS[0]
    await small.save(client, held, _IMAGES, on_ssd=True)
    lease = small.lookup(client, held.keys, ttl_s=300)
    assert lease is not None
    before, listeners = placement_threads(), len(small.blocks.listeners)
    load = [asyncio.create_task(turns(small, client, seed, 20)) for seed in range(3)]
    switches = 0
    while not all(task.done() for task in load):
        name = DAEMON_POLICIES[switches % len(DAEMON_POLICIES)]
        shadow = ("none", *DAEMON_POLICIES)[switches // 2 % 6]
        facts = await policies.set(CALLER, name, shadow)
        switches += 1
        assert (facts.name, facts.configured, facts.shadow is None) == (name, "lru", shadow == "none")
        running = [small.store._policy.items, small.store._policy.shadow]
        assert len(small.blocks.listeners) == listeners + sum(each is not None for each in running)
    assert switches >= 10
    assert sum([await task for task in load]) > 0
    assert small.leases.count == 1, "no lease was lost, and none is left"
    assert len(await small.load(lease)) == 2
    await small.settle()

    await policies.set(CALLER, "foresight", "none")
    known, real = await leases_known(small)
    assert known == real
    assert sum(real) == _BLOCKS
    await small.store.leases.release(caller_of(client), lease.lease_id)
    known, real = await leases_known(small)
    assert known == real
    assert not any(real), "a lease that began before the switch ends under the new policy"
    evicted = small.counters.evicted_dram_blocks
    await turns(small, client, 9, 20)
    assert small.counters.evicted_dram_blocks > evicted, "decisions continue"

    await policies.set(CALLER, "lru", "")
    await until(lambda: placement_threads() == before)
    assert len(small.blocks.listeners) == listeners


async def test_a_ranking_of_the_policy_before_is_not_used(small: OpenStore) -> None:
    """It was asked for before the switch, and answers after it."""
    client, policy = small.store.leases.attach(CALLER, "engine"), small.store._policy
    for chain in _CHAINS[:5]:
        await small.save(client, chain, _IMAGES, on_ssd=True)
    await small.store.policies.set(CALLER, "fifo", "")
    assert policy.items is not None
    may_go_on = threading.Event()
    busy = asyncio.create_task(policy.items.on_thread(lambda items, now_s: may_go_on.wait()))
    await asyncio.sleep(0)
    rows = small.blocks.live_rows()
    asked = asyncio.create_task(policy.lowest(small.blocks.first_tier, rows, 4))
    await asyncio.sleep(0)
    policy.use(None)
    may_go_on.set()
    await busy
    ranked = await asked
    assert len(set(ranked.scores.tolist())) == 4, "by recency every block has its own score; by item they share one"


@pytest.mark.parametrize("mended_by", ["switch", "drain"])
async def test_what_a_policy_has_refused_is_written_later(
    small: OpenStore, monkeypatch: pytest.MonkeyPatch, mended_by: str
) -> None:
    client, policy = small.store.leases.attach(CALLER, "engine"), daemon_policy("foresight")
    assert policy is not None
    await small.store._policy.switch(policy)
    monkeypatch.setattr(small.store._policy.items, "wanted_on_ssd", _refuse)
    await small.save(client, _CHAINS[0], _IMAGES)
    await small.settle()
    rows = small.blocks.rows_of_keys(_CHAINS[0].keys)
    assert not small.blocks.lie_in(rows, TierName.SSD).any()

    if mended_by == "switch":
        await small.store.policies.set(CALLER, "lru", "")
    else:
        small.store.drain.begin(CALLER)
        async for progress in small.store.drain.progress(CALLER):
            last = progress
        assert (last.done, last.only_in_dram) == (True, 0)
    await until(lambda: bool(small.blocks.lie_in(rows, TierName.SSD).all()))


async def _refuse(rows: Rows) -> NDArray[np.bool_]:
    return np.zeros(len(rows), np.bool_)


async def test_what_ssd_evicts_while_the_policy_is_asked_is_not_written(small: OpenStore) -> None:
    await small.store.policies.set(CALLER, "foresight", "")
    client = small.store.leases.attach(CALLER, "engine")
    may_go_on, items = threading.Event(), small.store._policy.items
    assert items is not None
    busy = asyncio.create_task(items.on_thread(lambda items, now_s: may_go_on.wait()))
    await small.save(client, _CHAINS[0], _IMAGES)
    writing = small.store._write_behind
    assert writing is not None
    await until(lambda: not writing._queue)  # The policy is asked about all of them.
    rows = small.blocks.rows_of_keys(_CHAINS[0].keys)
    small.blocks.unwanted[1, rows[:2]] = True
    may_go_on.set()
    await busy
    await small.settle()
    assert small.blocks.lie_in(rows, TierName.SSD).tolist() == [False, False, True, True]


async def test_an_unknown_policy_is_refused_and_changes_nothing(small: OpenStore) -> None:
    policies = small.store.policies
    await policies.set(CALLER, "s3fifo", "")
    for name, shadow in (("belady", ""), ("lru", "belady"), ("none", ""), ("LRU", "")):
        with pytest.raises(InvalidRequest, match="choose among lru, fifo, s3fifo, lookahead, foresight"):
            await policies.set(CALLER, name, shadow)
    assert (await policies.show(CALLER)).name == "s3fifo"


async def test_an_empty_request_shows_what_the_policy_knows(small: OpenStore) -> None:
    client = small.store.leases.attach(CALLER, "engine")
    since_ms = (await small.store.policies.show(CALLER)).since_ms
    small.files.clock.advance(seconds=60)
    await small.store.policies.set(CALLER, "lookahead", "")
    for chain in _CHAINS[:3]:
        await small.save(client, chain, _IMAGES)
    facts = await small.store.policies.show(CALLER)
    assert (facts.name, facts.configured, facts.items, facts.blocks) == ("lookahead", "lru", 3, 3 * _BLOCKS)
    assert facts.since_ms == since_ms + 60_000
    assert (facts.queued, facts.read_ahead_bytes, facts.shadow) == (0, 0, None)
    again = await small.store.policies.set(CALLER, "lookahead", "")
    assert again.since_ms == facts.since_ms, "it decides already, and stays"


async def test_a_new_policy_gets_the_queue_that_there_is(small: OpenStore) -> None:
    """Engines send changes of their queues alone."""
    policies, client = small.store.policies, small.store.leases.attach(CALLER, "engine")
    for chain in _CHAINS[:2]:
        await small.save(client, chain, _IMAGES, on_ssd=True)
    with small.store.hints.open(caller_of(client)) as stream:
        for name, chain in zip("ab", _CHAINS[:2], strict=True):
            stream.put(name, HintSubject(LAYOUT.fingerprint, "", b"".join(chain.keys)), None, 0, "")
        for name in ("lookahead", "foresight", "lru", "lookahead"):
            facts = await policies.set(CALLER, name, "fifo")
            async with asyncio.timeout(30):
                while name != "lru" and facts.queued < 2:
                    await asyncio.sleep(0.01)
                    facts = await policies.show(CALLER)
            assert name == "lru" or facts.queued == 2


async def test_a_policy_that_fails_is_logged_once_and_the_store_works(
    small: OpenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = daemon_policy("foresight")
    assert policy is not None

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    for method in ("retention", "wants_on_ssd"):
        monkeypatch.setattr(type(policy), method, fail)
    await small.store._policy.switch(policy)
    client = small.store.leases.attach(CALLER, "engine")
    with caplog.at_level(logging.ERROR):
        for chain in _CHAINS:
            assert not (await small.save(client, chain, _IMAGES)).refused
        await small.settle()
    assert small.counters.evicted_dram_blocks > _BLOCKS
    assert sum(small.hits(chain.keys) == _BLOCKS for chain in _CHAINS) == _SESSIONS, "all are on SSD"
    assert len([each for each in caplog.records if "failed: blocks" in each.getMessage()]) == 1
    assert small.counters.policy_failures > 1


async def test_no_report_of_an_engine_lasts(small: OpenStore) -> None:
    policy = small.store._policy
    for bytes_per_s in (math.inf, math.nan, 1e300, 1e-300):
        policy.computed(bytes_per_s)
    for _ in range(400):
        policy.computed(1e9)
    assert policy._computed_bytes_per_s == pytest.approx(1e9, rel=0.01)
    policy.computed(math.inf)
    assert policy._computed_bytes_per_s < 1.2e9


async def test_a_policy_whose_thread_is_stuck_can_be_replaced(open_store: Callable[..., Any]) -> None:
    clock = HandClock()
    opened: OpenStore = await open_store(clock=clock, policy=daemon_policy("foresight"))
    client, stuck, may_go_on = (
        opened.store.leases.attach(CALLER, "engine"),
        opened.store._policy.items,
        threading.Event(),
    )
    assert stuck is not None
    busy = asyncio.create_task(stuck.on_thread(lambda items, now_s: may_go_on.wait()))
    switching = asyncio.create_task(opened.store.policies.set(CALLER, "fifo", ""))
    while not switching.done():
        await asyncio.sleep(0.001)
        clock.advance(seconds=1)
    assert (await switching).name == "fifo"
    assert not (await opened.save(client, _CHAINS[0], _IMAGES)).refused
    may_go_on.set()
    await busy
