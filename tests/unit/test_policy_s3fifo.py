"""S3-FIFO."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvservice.policy import Placement, S3FifoPolicy
from tests.contracts.placement import PlacementContract


class TestS3Fifo(PlacementContract):
    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return S3FifoPolicy
