"""SSD tiers on files of the test's folder, with calls that can fail."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from kvservice.tiers.ssd import SsdTier
from tests.file_faults import FaultyCalls
from tests.ssd_tiers import CAPACITY, STORE, Direct, OpenTier


@pytest.fixture
def calls() -> FaultyCalls:
    return FaultyCalls()


@pytest.fixture
def open_tier(tmp_path: Path, calls: FaultyCalls) -> Iterator[OpenTier]:
    """Opens the tier of files in `tmp_path`, and closes it at the end."""
    opened: list[SsdTier] = []

    def open_tier(
        files: int = 1,
        store_id: bytes = STORE,
        capacity_bytes: int = CAPACITY,
        direct: Direct = "auto",
        io_threads: int = 4,
        folder: Path = tmp_path,
        leaving: Collection[int] = (),
    ) -> SsdTier:
        paths = [folder / f"drive-{number}" / f"ssd-{number:03}.kv" for number in range(files)]
        opened.append(
            SsdTier.open(
                paths,
                store_id=store_id,
                capacity_bytes=capacity_bytes,
                io_threads=io_threads,
                calls=calls,
                direct=direct,
                leaving=leaving,
            )
        )
        return opened[-1]

    yield open_tier
    for tier in opened:
        tier.close()


@pytest.fixture(params=["auto", "off"])
def tier(open_tier: OpenTier, request: pytest.FixtureRequest) -> SsdTier:
    return open_tier(direct=request.param)
