"""A policy in the shadow of another one: it changes nothing, and tells what it would have done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import TierName
from kvservice.placement.shadow import ShadowStore
from kvservice.store.operations.policies import PolicyFacts
from tests.clock import HandClock
from tests.stores import CALLER, KIB, MIB, PATIENT, OpenStore, caller_of, some_chain, some_images, until

_BLOCKS, _SESSIONS, _AWAY_S = 4, 20, 60.0
_CHAINS = [some_chain(_BLOCKS, seed=seed) for seed in range(_SESSIONS)]
_IMAGES = some_images(_CHAINS[0])
_SIZE = _BLOCKS * 12 * KIB


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def opened(open_store: Callable[..., Any], clock: HandClock) -> OpenStore:
    """DRAM for a fifth of the sessions, and SSD for all. Without a policy: by recency."""
    store: OpenStore = await open_store(
        clock=clock, dram_bytes=_SESSIONS * _SIZE // 5, ssd_bytes=16 * MIB, limits=PATIENT
    )
    return store


async def looked(opened: OpenStore, clock: HandClock, seconds: float = 1.0) -> None:
    """Time passes, and the shadow has heard of all that happened."""
    shadow = opened.store._policy.shadow
    assert shadow is not None
    for _ in range(2):
        before = shadow.looks
        clock.advance(seconds=seconds / 2)
        await until(lambda before=before: shadow.looks > before)  # type: ignore[misc]


async def test_a_shadow_that_fails_at_its_begin_keeps_no_notes(
    opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    listeners = len(opened.blocks.listeners)
    monkeypatch.setattr(ShadowStore, "begin", fail)
    await opened.store.policies.set(CALLER, "", "lookahead")
    shadow = opened.store._policy.shadow
    assert shadow is not None
    await until(lambda: len(opened.blocks.listeners) == listeners)
    shadow.events.take()
    client = opened.store.leases.attach(CALLER, "engine")
    await opened.save(client, _CHAINS[0], _IMAGES)
    opened.lookup(client, _CHAINS[0].keys, ttl_s=300)
    assert not shadow.events.take()
    assert (await opened.store.policies.set(CALLER, "", "none")).shadow is None


async def rounds(opened: OpenStore, clock: HandClock, count: int) -> PolicyFacts:
    """Each user returns after exactly the same time, after all the others."""
    client = opened.store.leases.attach(CALLER, "engine")
    for _ in range(count):
        for chain in _CHAINS:
            lease = opened.lookup(client, chain.keys, ttl_s=300)
            if lease is None:
                await opened.save(client, chain, _IMAGES, on_ssd=True)
            else:
                await opened.store.moves.prefetch(CALLER, chain.keys, within_s=0.0, wait=True)
                await opened.store.leases.release(caller_of(client), lease.lease_id)
            for _ in range(round(_AWAY_S / _SESSIONS)):
                await looked(opened, clock)
    return await opened.store.policies.show(CALLER)


async def test_a_shadow_of_the_same_policy_finds_what_is_found(opened: OpenStore, clock: HandClock) -> None:
    await opened.store.policies.set(CALLER, "", "lru")
    facts = await rounds(opened, clock, 3)
    assert facts.shadow is not None and facts.name == "lru"
    real, shadow = facts.shadow.real, facts.shadow.shadow
    assert facts.shadow.requests == 2 * _SESSIONS, "the first round finds nothing"
    total = 2 * _SESSIONS * _SIZE
    for found in (real, shadow):
        assert found.dram_bytes + found.ssd_bytes + found.missing_bytes == total
        assert (found.requests_in_dram, found.dram_bytes) == (0, 0), "by recency, all the others come before"


async def test_a_better_policy_in_the_shadow_shows_it(opened: OpenStore, clock: HandClock) -> None:
    """And the real tiers are as without it."""
    await opened.store.policies.set(CALLER, "", "foresight")
    facts = await rounds(opened, clock, 6)
    assert facts.shadow is not None
    real, shadow = facts.shadow.real, facts.shadow.shadow
    assert real.dram_bytes == 0
    assert shadow.dram_bytes > 0.25 * facts.shadow.requests * _SIZE, facts.shadow
    assert shadow.read_ahead_bytes >= shadow.dram_bytes - _SESSIONS * _SIZE
    assert (facts.read_ahead_bytes, opened.counters.read_ahead_blocks) == (0, 0)
    assert opened.dram.used_bytes <= opened.dram.capacity_bytes


async def test_a_shadow_begins_with_what_the_tiers_have(opened: OpenStore, clock: HandClock) -> None:
    client = opened.store.leases.attach(CALLER, "engine")
    for chain in _CHAINS[:3]:
        await opened.save(client, chain, _IMAGES, on_ssd=True)
    await opened.store.moves.evict(CALLER, _CHAINS[0].keys, TierName.DRAM)
    await opened.store.policies.set(CALLER, "", "fifo")
    await until(lambda: opened.store._policy.shadow is not None and opened.store._policy.shadow.looks > 0)
    for chain in _CHAINS[:2]:
        lease = opened.lookup(client, chain.keys)
        assert lease is not None
        await opened.store.leases.release(caller_of(client), lease.lease_id)
    await looked(opened, clock)
    facts = await opened.store.policies.show(CALLER)
    assert facts.shadow is not None and facts.shadow.requests == 2
    for found in (facts.shadow.real, facts.shadow.shadow):
        assert (found.requests_in_dram, found.dram_bytes, found.ssd_bytes) == (1, _SIZE, _SIZE)
    facts = await opened.store.policies.set(CALLER, "", "none")
    assert facts.shadow is None


async def test_a_shadow_of_lru_agrees_with_lru(open_store: Callable[..., Any], clock: HandClock) -> None:
    """For sessions of which some return much more often than others."""
    opened: OpenStore = await open_store(
        clock=clock, dram_bytes=_SESSIONS * _SIZE // 2, ssd_bytes=16 * MIB, limits=PATIENT
    )
    await opened.store.policies.set(CALLER, "", "lru")
    client, random = opened.store.leases.attach(CALLER, "engine"), np.random.default_rng(7)
    popularity = 1 / np.arange(1, _SESSIONS + 1)
    for number in random.choice(_SESSIONS, 300, p=popularity / popularity.sum()).tolist():
        clock.advance(seconds=1)
        lease = opened.lookup(client, _CHAINS[number].keys, ttl_s=300)
        if lease is None:
            await opened.save(client, _CHAINS[number], _IMAGES, on_ssd=True)
        else:
            await opened.store.moves.prefetch(CALLER, _CHAINS[number].keys, within_s=0.0, wait=True)
            await opened.store.leases.release(caller_of(client), lease.lease_id)
    facts = await opened.store.policies.show(CALLER)
    assert facts.shadow is not None
    real, shadow = facts.shadow.real, facts.shadow.shadow
    used_bytes = facts.shadow.requests * _SIZE
    assert 0.2 < real.dram_bytes / used_bytes < 0.8, "the comparison is of something"
    assert abs(real.dram_bytes - shadow.dram_bytes) < 0.08 * used_bytes, "DRAM has space for ten of them"
