"""A repair of the durable index is killed at every step of the replacement of the old index."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvservice_client import BlockChain, Durability
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import LARGE, new_chain, save, verify
from tests.integration.test_damaged_index import flip_root

# Ends by SIGKILL before the given step of the exchange. Arguments: the store, the step, "exchange" where the file
# system can exchange two names in one step.
_DYING_CHECK = """
import os, sys
from pathlib import Path
from kvservice import check
from kvservice.index import replacement

store, left, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
exchange = replacement._exchange if kind == "exchange" else lambda one, other: False
put_in_place = replacement.put_in_place

def dying(function):
    def call(*arguments, **options):
        global left
        if not left:
            os.kill(os.getpid(), 9)
        left -= 1
        return function(*arguments, **options)
    return call

def put_in_place_until_killed(store):
    Path.rename, Path.unlink, replacement._exchange = dying(Path.rename), dying(Path.unlink), dying(exchange)
    return put_in_place(store)

replacement.put_in_place = put_in_place_until_killed
sys.exit(check.main([store, "--rebuild"]))
"""
# The fast tests have one step before the new index is in place and one after it, of a kind each.
_FAST = {("exchange", 1), ("rename", 4)}
_STEPS = [
    pytest.param(kind, step, marks=() if (kind, step) in _FAST else pytest.mark.slow)
    for kind, count in (("exchange", 5), ("rename", 6))
    for step in range(count)
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DaemonProcess, BlockChain]]:
    """A stopped daemon with four blocks."""
    chain = new_chain(LARGE, 4)
    folder = tmp_path_factory.mktemp("interrupted")
    with DaemonProcess(folder, dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=32 * MIB) as daemon:
        with daemon.client() as client:
            assert save(client, LARGE, chain, Durability.SSD).is_complete
        daemon.stop()
        yield daemon, chain


@pytest.mark.parametrize(("kind", "step"), _STEPS)
def test_a_repair_that_was_killed_at_any_step_is_named_at_the_start_and_ended_by_the_next(
    stored: tuple[DaemonProcess, BlockChain], kind: str, step: int
) -> None:
    daemon, chain = stored
    flip_root(daemon.store / "index")
    ended = subprocess.run([sys.executable, "-c", _DYING_CHECK, str(daemon.store), str(step), kind], check=False)
    was_killed = (kind, step) not in (("exchange", 4), ("rename", 5))
    assert ended.returncode == (-signal.SIGKILL if was_killed else 1), "the last step is the last"
    new = daemon.store / "index.new"

    daemon.launch()
    serves = daemon.serves()
    said = [line["event"] for line in daemon.log if "was interrupted" in line["event"]]
    assert bool(said) == new.exists(), daemon.lines
    assert all(f"`kvservice check {daemon.store} --repair`" in line for line in said)
    assert serves == ((kind, step) in (("exchange", 2), ("exchange", 3), ("exchange", 4), ("rename", 4), ("rename", 5)))
    if serves:
        with daemon.client() as client:
            verify(client, LARGE, chain)
        daemon.stop()
    assert daemon.wait_for_end() == (0 if serves else 1)

    looked = daemon.check()
    assert ("was interrupted" in looked.stdout) == bool(said), looked.stdout
    daemon.check("--repair")
    assert not new.exists()
    assert {path.name for path in (daemon.store / "index").iterdir()} == {"data.mdb"}
    clean = daemon.check()
    assert (clean.returncode, "4 blocks" in clean.stdout) == (0, True), clean.stdout + clean.stderr
    daemon.start()
    with daemon.client() as client:
        verify(client, LARGE, chain)
    daemon.stop()


def test_a_sound_index_that_changed_after_a_rebuild_was_killed_is_not_replaced_by_the_older_one(
    stored: tuple[DaemonProcess, BlockChain],
) -> None:
    daemon, chain = stored
    killed = subprocess.run([sys.executable, "-c", _DYING_CHECK, str(daemon.store), "1", "exchange"], check=False)
    assert killed.returncode == -signal.SIGKILL
    later = new_chain(LARGE, 2)
    daemon.start()
    assert any("is as it was" in line["event"] for line in daemon.log)
    with daemon.client() as client:
        assert save(client, LARGE, later, Durability.SSD).is_complete
    daemon.stop()

    repaired = daemon.check("--repair")
    assert (repaired.returncode, "is undone" in repaired.stdout) == (0, True), repaired.stdout
    assert not (daemon.store / "index.new").exists()
    daemon.start()
    with daemon.client() as client:
        verify(client, LARGE, chain)
        verify(client, LARGE, later)
        client.admin.discard(later)
    daemon.stop()
