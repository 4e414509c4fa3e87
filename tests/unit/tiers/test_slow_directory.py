"""A class outside of the product passes the same specification as its own tiers, so a new tier is one class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice.blocks import TierName
from kvservice.tiers.base import DurableTier
from kvservice.tiers.files import FileCalls
from kvservice.tiers.kinds import TierOptions
from tests.contracts.tier import MIB, TierContract
from tests.slow_directory import SlowDirectory


class TestSlowDirectory(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DurableTier]:
        tier = SlowDirectory.open(
            TierOptions(
                path=tmp_path,
                name=TierName("slow"),
                store_id=bytes(16),
                capacity_bytes=16 * MIB,
                io_threads=4,
                calls=FileCalls(),
                may_create=True,
            )
        )
        yield tier
        tier.close()
