"""The paper's policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvservice.policy import LookaheadPolicy, Placement
from tests.contracts.placement import PlacementContract


class TestLookahead(PlacementContract):
    @pytest.fixture
    def make(self) -> Callable[[], Placement]:
        return LookaheadPolicy
