"""All policies keep the contract, and the store executes their decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import BlockTable, TierName
from kvservice.policy import LruPolicy, Policy
from kvservice.policy.base import Recency
from tests.contracts.policy import NOW_S, PolicyContract
from tests.stores import CALLER, OpenStore, some_chain, some_images


class TestLru(PolicyContract):
    @pytest.fixture
    def policy(self) -> Policy[BlockTable]:
        return LruPolicy()

    def test_what_was_used_longest_ago_is_worth_least(self, policy: Policy[BlockTable], blocks: BlockTable) -> None:
        rows = blocks.live_rows()
        blocks.touch(rows[7:8], 5000)
        blocks.touch(rows[3:4], 5001)
        order = rows[np.argsort(policy.scores(blocks, TierName.DRAM, NOW_S)(rows))]
        assert order[-2:].tolist() == [rows[7], rows[3]]

    def test_how_often_a_block_was_used_changes_nothing(self, policy: Policy[BlockTable], blocks: BlockTable) -> None:
        rows = blocks.live_rows()
        before = policy.scores(blocks, TierName.SSD, NOW_S)(rows)
        blocks.hits[rows[0]] = 1_000_000
        assert (policy.scores(blocks, TierName.SSD, NOW_S)(rows) == before).all()

    async def test_what_was_evicted_from_ssd_is_written_there_again_once_it_was_used(self, opened: OpenStore) -> None:
        client, chain = opened.store.attach(CALLER, "test"), some_chain(1)
        [key] = chain.keys
        await opened.save(client, chain, some_images(chain), on_ssd=True)
        await opened.store.evict(CALLER, [key], TierName.SSD)
        row = int(opened.blocks.rows_of_keys([key])[0])
        policy = LruPolicy()
        assert not policy.wants_on_ssd(opened.blocks, row, NOW_S)

        assert opened.hits([key]) == 1
        assert policy.wants_on_ssd(opened.blocks, row, NOW_S)


class Refusing(LruPolicy):
    """Wants nothing anywhere."""

    def wants_in_dram(self, items: Recency, row: int, now_s: float) -> bool:
        return False

    def wants_on_ssd(self, items: Recency, row: int, now_s: float) -> bool:
        return False


async def test_the_mover_copies_nothing_that_the_policy_does_not_want(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(policy=Refusing())
    client, chain = opened.store.attach(CALLER, "test"), some_chain(3)
    images = some_images(chain)
    await opened.save(client, chain, images)
    await opened.settle()
    assert opened.residency(chain.keys[0]) == {TierName.DRAM}

    await opened.save(client, chain, images, on_ssd=True)  # A client's request does not depend on the policy.
    await opened.store.evict(CALLER, chain.keys, TierName.DRAM)
    assert (await opened.store.prefetch(CALLER, chain.keys, within_s=0, wait=True)).failed == 3
    assert opened.residency(chain.keys[0]) == {TierName.SSD}
