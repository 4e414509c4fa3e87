"""File calls of a store that fail where the test says so."""

from __future__ import annotations

import pytest

from tests.file_faults import FaultyCalls


@pytest.fixture
def calls() -> FaultyCalls:
    return FaultyCalls()
