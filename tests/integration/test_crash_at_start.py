"""A daemon that dies while it creates or opens a store leaves one that the next daemon can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvservice_client import Durability
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save, verify
from tests.killed_starts import deaths


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_store_whose_creation_was_killed_at_any_point_can_be_used(tmp_path: Path, step: int) -> None:
    """Each start finds the state that the earlier kills left; the last starts find a complete store."""
    sizes = {"dram__capacity_bytes": 8 * MIB, "ssd__capacity_bytes": 8 * MIB}
    dying = DaemonProcess(tmp_path, program=("-m", "tests.dying_daemon"), **sizes)
    try:
        died = deaths(dying, first=0, step=step)
        assert died >= 20 // step
        assert dying.check().returncode == 0
        dying.start(environment={"TEST_DIES_AT": "-1"})
        with dying.client() as client:
            for durability in Durability:
                chain = new_chain(SMALL, 3)
                assert save(client, SMALL, chain, durability).is_complete
                verify(client, SMALL, chain)
    finally:
        dying.remove()


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_store_whose_opening_was_killed_at_any_point_keeps_its_blocks(tmp_path: Path, step: int) -> None:
    daemon = DaemonProcess(tmp_path, program=("-m", "tests.dying_daemon"), dram__capacity_bytes=8 * MIB)
    chains = {durability: new_chain(SMALL, 5) for durability in Durability}
    try:
        daemon.start(environment={"TEST_DIES_AT": "-1"})
        with daemon.client() as client:
            for durability, chain in chains.items():
                assert save(client, SMALL, chain, durability).is_complete
        daemon.kill()
        assert deaths(daemon, first=1, step=step) >= 10 // step
        assert daemon.check().returncode == 0
        daemon.start(environment={"TEST_DIES_AT": "-1"})
        with daemon.client() as client:
            for chain in chains.values():
                verify(client, SMALL, chain)
    finally:
        daemon.remove()
