"""The contract of every placement policy. Subclass it, provide `policy`, inherit the specification."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, Extent, TierName
from kvservice.policy import POLICIES, Policy
from kvservice_api.layout import Shard

NOW_S = 12_345.0
_WHOLE = Shard(0, 2, 0, 2)


def some_blocks(count: int, *, seed: int = 0) -> BlockTable:
    """Blocks in both tiers, used at different times and differently often."""
    table, random = BlockTable(), np.random.default_rng(seed)
    for number in range(count):
        row = table.add(
            random.bytes(32), _WHOLE, parent_key=bytes(32), layout_id=1, tenant=0,
            token_count=int(random.integers(1, 17)), size_bytes=4096, trailer_checksum=number, now_ms=1000 + number,
        )  # fmt: skip
        for tier in (TierName.DRAM, TierName.SSD):
            table.set_extent(row, tier, Extent(0, number * 4096, 4096))
        table.link(row)
    for _ in range(3 * count):
        used = random.integers(0, count, 3)
        table.touch(np.unique(used), 2000)
        table.hits[used] += 1
    return table


class PolicyContract:
    @pytest.fixture
    def blocks(self) -> BlockTable:
        return some_blocks(50)

    def test_it_is_known_by_its_name(self, policy: Policy[BlockTable]) -> None:
        assert POLICIES[policy.name] is type(policy)

    @pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
    def test_every_row_has_one_worth(self, policy: Policy[BlockTable], blocks: BlockTable, tier: TierName) -> None:
        for rows in (blocks.live_rows(), blocks.live_rows()[::3], np.empty(0, np.int64)):
            worth = policy.scores(blocks, tier, NOW_S)(rows)
            assert worth.shape == rows.shape and worth.dtype == np.float64
            assert np.isfinite(worth).all()

    @pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
    def test_a_rows_worth_depends_on_the_state_alone(
        self, policy: Policy[BlockTable], blocks: BlockTable, tier: TierName
    ) -> None:
        rows = blocks.live_rows()
        worth = policy.scores(blocks, tier, NOW_S)(rows)
        order = np.random.default_rng(1).permutation(len(rows))
        assert (policy.scores(blocks, tier, NOW_S)(rows[order]) == worth[order]).all(), "not on the order of asking"
        assert (policy.scores(blocks, tier, NOW_S)(rows[5:9]) == worth[5:9]).all(), "nor on who else is asked about"
        assert (type(policy)().scores(blocks, tier, NOW_S)(rows) == worth).all(), "nor on what it was asked before"

    @pytest.mark.parametrize("tier", [TierName.DRAM, TierName.SSD])
    def test_a_prefix_is_worth_no_less_than_what_continues_it(
        self, policy: Policy[BlockTable], blocks: BlockTable, tier: TierName
    ) -> None:
        """A suffix is useless without its prefix, so the prefix must not be evicted first."""
        chain = blocks.live_rows()[10:30]
        blocks.touch(chain, 3000)
        worth = policy.scores(blocks, tier, NOW_S)(chain)
        assert (np.diff(worth) <= 0).all()

    def test_it_answers_for_every_row_and_changes_nothing(self, policy: Policy[BlockTable], blocks: BlockTable) -> None:
        columns = [column for column in vars(blocks).values() if isinstance(column, np.ndarray)]
        for column in columns:
            column.flags.writeable = False
        for row in blocks.live_rows().tolist():
            assert policy.wants_in_dram(blocks, row, NOW_S) in (True, False)
            assert policy.wants_on_ssd(blocks, row, NOW_S) in (True, False)
        policy.scores(blocks, TierName.DRAM, NOW_S)(blocks.live_rows())

    def test_it_may_be_asked_from_another_thread(self, policy: Policy[BlockTable], blocks: BlockTable) -> None:
        rows = blocks.live_rows()
        answers: list[NDArray[np.float64]] = []
        ask = threading.Thread(target=lambda: answers.append(policy.scores(blocks, TierName.SSD, NOW_S)(rows)))
        ask.start()
        ask.join()
        assert (answers[0] == policy.scores(blocks, TierName.SSD, NOW_S)(rows)).all()
