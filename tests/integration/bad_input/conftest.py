"""Invalid input is refused, and the refusal costs no block and no space."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvservice_api.keys import BlockChain
from tests.daemon import DaemonProcess
from tests.integration.wire import Wire, unharmed


@pytest.fixture
def kept(daemon: DaemonProcess) -> Iterator[BlockChain]:
    """Blocks in both tiers of the file's daemon. The test ends with all of them there, and no other space taken."""
    with unharmed(daemon.address) as chain:
        yield chain


@pytest.fixture
def wire(kept: BlockChain, wire: Wire) -> Wire:
    """At the end of the test, the store has exactly the blocks of `kept`."""
    return wire
