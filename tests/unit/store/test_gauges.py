"""What the store holds and does, for the metrics; and what lookups count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import BlockTable, Extent, TierName
from kvservice.policy import daemon_policy
from kvservice_api.layout import Shard
from tests.stores import CALLER, KIB, LAYOUT, OpenStore, some_chain, some_images, until

BLOCK = 12 * KIB  # Of the tests' layout.
HEADER = 4 * KIB


async def test_blocks_that_only_dram_holds_are_unwritten_until_their_copy_is_recorded(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store()
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(3)
    with opened.commits_held(TierName.SSD):
        await opened.save(client, chain, some_images(chain))
        await until(lambda: opened.store.gauges.read().write_queue == {"ssd": 3})
        gauges = opened.store.gauges.read()
        assert gauges.blocks == {"dram": 3, "ssd": 0}
        assert (gauges.unwritten_blocks, gauges.unwritten_bytes) == (3, 3 * BLOCK)
    await until(lambda: opened.store.gauges.read().write_queue == {"ssd": 0})
    gauges = opened.store.gauges.read()
    assert gauges.blocks == {"dram": 3, "ssd": 3}
    assert (gauges.unwritten_blocks, gauges.unwritten_bytes) == (0, 0)
    assert [(layout.model_id, count) for layout, count in gauges.layouts.values()] == [("test", 3)]


async def test_without_an_ssd_tier_all_blocks_are_unwritten(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(ssd_bytes=0)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    await opened.save(client, chain, some_images(chain))

    gauges = opened.store.gauges.read()
    assert (gauges.unwritten_blocks, gauges.write_queue, gauges.promoting_blocks) == (2, {}, 0)


async def test_evictions_have_the_tier_and_what_got_the_space(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * BLOCK + HEADER, ssd_bytes=0, history_events=0)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(4)
    await opened.save(client, chain, some_images(chain))
    await opened.store.moves.evict(CALLER, chain.keys[3:], TierName.DRAM)
    other = some_chain(3, seed=1)
    await opened.save(client, other, some_images(other))

    evicted = opened.store.gauges.read().evicted
    assert (evicted["dram", "request"], evicted["dram", "save"], sum(evicted.values())) == (1, 2, 3)
    assert evicted["dram", "read_ahead"] == 0, "it begins with 0, so that its first increase is seen"


async def test_a_pinned_block_and_a_drain_are_seen(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(policy=daemon_policy("lookahead"))
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(3)
    await opened.save(client, chain, some_images(chain))
    await opened.store.pins.pin(CALLER, chain.keys[:2], 1000)
    assert (opened.store.gauges.read().pinned_blocks, opened.store.gauges.read().pinned_bytes) == (2, 2 * BLOCK)
    assert (opened.store.gauges.read().state, opened.store.gauges.read().policy) == ("serving", "lookahead")

    opened.files.clock.advance(seconds=2)
    opened.store.begin_stop()
    assert (opened.store.gauges.read().pinned_blocks, opened.store.gauges.read().state) == (0, "stopping")


async def test_a_lookup_counts_full_blocks_and_the_partial_one_at_their_end(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store()
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(3, tail_tokens=5)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    await opened.store.moves.evict(CALLER, chain.keys[1:2], TierName.DRAM)
    assert opened.hits([*chain.keys, bytes(32)]) == len(chain)

    counters = opened.counters
    assert sum(counters.asked_blocks.values()) == counters.lookup_blocks_asked == len(chain) + 1
    assert {tier: count for (_, tier), count in counters.hit_blocks.items()} == {"dram": len(chain) - 1, "ssd": 1}
    assert list(counters.hit_tokens.values()) == [sum(chain.token_counts)]
    assert [(reason, count) for (_, reason), count in counters.misses.items()] == [("never_stored", 1)]
    assert sum(counters.lookup_times.counts()) == 1


@pytest.mark.parametrize("count", [0, 1, 7])
def test_rows_are_counted_by_their_fastest_tier(count: int) -> None:
    tiers = [TierName("dram"), TierName("ssd"), TierName("disk")]
    blocks = BlockTable(tiers=tiers)
    shard, copies = Shard.whole(LAYOUT), [{0}, {0, 1}, {1}, {1, 2}, {2}, {0, 2}, set()]
    for number, there in enumerate(copies[:count]):
        key = number.to_bytes(32)
        row = blocks.add(
            key,
            shard,
            parent_key=bytes(32),
            layout_id=1,
            tenant=0,
            token_count=1,
            size_bytes=1,
            trailer_checksum=0,
            now_ms=1,
        )
        for position in there:
            blocks.set_extent(row, tiers[position], Extent(0, 0, 4096))
    expected = {0: [0, 0, 0], 1: [1, 0, 0], 7: [3, 2, 1]}[count]
    assert blocks.count_by_fastest(np.arange(count)) == expected
