"""Upgrade to the daemon of today and back to an earlier one, on the same store, with the bytes of blocks compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice.index.identity import SCHEMA_WITH_LOWER_TIERS
from kvservice_client import BlockChain, Durability, Layout
from tests import earlier_daemon
from tests.daemon import MIB
from tests.earlier_daemon import TwoVersions
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, verify
from tests.killed_starts import deaths


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the earlier daemon. Unpacked once, so that Python compiles it once."""
    folder = tmp_path_factory.mktemp("earlier")
    earlier_daemon.unpack(folder)
    return folder


@pytest.fixture
def daemon(tmp_path: Path, code: Path) -> Iterator[TwoVersions]:
    daemon = TwoVersions(tmp_path, code, dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=16 * MIB)
    try:
        yield daemon
    finally:
        daemon.remove()


class Saved:
    """Chains of two layouts, of which each has one in DRAM and one on SSD too, and a session over one of them."""

    def __init__(self, daemon: TwoVersions) -> None:
        self._daemon = daemon
        self._chains: list[tuple[Layout, BlockChain]] = []
        self._sessions: dict[str, int] = {}  # Their tokens.

    def more(self) -> None:
        with self._daemon.client() as client:
            for layout in (LARGE, SMALL):
                for durability in Durability:
                    chain = new_chain(layout, 3)
                    assert save(client, layout, chain, durability).is_complete
                    self._chains.append((layout, chain))
            name = f"chat-{len(self._sessions)}"
            self._sessions[name] = client.session(SMALL, name).append(chain).token_count

    def verify(self) -> None:
        with self._daemon.client() as client:
            for layout, chain in self._chains:
                verify(client, layout, chain)
            for name, tokens in self._sessions.items():
                with client.session(SMALL, name).lookup() as history:
                    assert history.tokens == tokens


def tier_below_ssd(folder: Path) -> str:
    """The value of a setting that raises the store's schema to `SCHEMA_WITH_LOWER_TIERS`."""
    (folder / "archive").mkdir()
    return json.dumps([{"name": "archive", "path": str(folder / "archive"), "capacity_bytes": "16MiB"}])


def contents(folder: Path) -> dict[str, str]:
    """The digest of each file of the store and of its arena; the lock's content is its last holder."""
    files = sorted(each for each in folder.rglob("*") if each.is_file() and each.name != "lock")
    return {str(each): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def test_blocks_and_sessions_are_there_after_an_upgrade_after_going_back_and_after_another(daemon: TwoVersions) -> None:
    saved = Saved(daemon)
    for earlier in (True, False, True, False):
        daemon.start_version(earlier=earlier)
        assert earlier or not daemon.logged("the DRAM tier starts empty")
        saved.more()
        saved.verify()
        assert daemon.stop() == 0
    assert daemon.check().returncode == 0


def test_an_earlier_daemon_refuses_a_store_that_uses_something_new_names_the_version_and_changes_nothing(
    daemon: TwoVersions, tmp_path: Path
) -> None:
    saved = Saved(daemon)
    daemon.start_version(earlier=True)
    saved.more()
    assert daemon.stop() == 0
    daemon.settings["tiers.below_ssd"] = tier_below_ssd(tmp_path)
    daemon.start_version(earlier=False)
    assert daemon.stop() == 0

    before = contents(daemon.store) | contents(daemon.shared_memory)
    below_ssd = daemon.settings.pop("tiers.below_ssd")  # The earlier one has no such setting.
    daemon.launch_version(earlier=True)
    assert daemon.wait_for_end() == 1
    schemas = f"version {SCHEMA_WITH_LOWER_TIERS}; this program knows versions up to {earlier_daemon.SCHEMA}"
    assert schemas in daemon.lines[-1]
    after = contents(daemon.store) | contents(daemon.shared_memory)
    assert before.keys() == after.keys()
    assert not [each for each in before if after[each] != before[each]]

    daemon.settings["tiers.below_ssd"] = below_ssd
    daemon.start_version(earlier=False)
    saved.verify()


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_an_upgrade_that_is_killed_at_any_point_loses_nothing_and_is_finished_by_the_next_start(
    daemon: TwoVersions, tmp_path: Path, step: int
) -> None:
    saved = Saved(daemon)
    daemon.start_version(earlier=True)
    saved.more()
    daemon.kill()
    daemon.settings["tiers.below_ssd"] = tier_below_ssd(tmp_path)
    daemon.program = ("-m", "tests.dying_daemon")
    assert deaths(daemon, first=1, step=step) >= 10 // step

    daemon.start_version(earlier=False)
    saved.verify()
    assert daemon.stop() == 0
    assert daemon.check().returncode == 0
