"""What the tests of the SSD tier share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from kvservice.tiers.ssd import SsdTier
from tests.contracts.tier import MIB

STORE, OTHER_STORE = bytes(range(16)), bytes(range(16, 32))
CAPACITY = 16 * MIB

Direct = Literal["auto", "off"]
OpenTier = Callable[..., SsdTier]


def path_of(tmp_path: Path, number: int = 0) -> Path:
    return tmp_path / f"drive-{number}" / f"ssd-{number:03}.kv"
