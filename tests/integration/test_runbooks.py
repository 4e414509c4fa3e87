"""The commands of ops/runbooks, as they stand there: on a daemon that is well, and in the state of an alert."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice_api.errors import LeaseExpired
from kvservice_client import Durability
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save
from tests.integration.media import arena, flip_data
from tests.integration.test_faults_disk import Faults
from tests.integration.wire import Wire, refused

RUNBOOKS = Path(__file__).parents[2] / "ops" / "runbooks"


def commands(page: str) -> list[str]:
    """Those of a page, in their order."""
    blocks = re.findall(r"(?sm)^ *```sh\n(.*?)^ *```", (RUNBOOKS / f"{page}.md").read_text())
    return [line.strip() for block in blocks for line in block.splitlines()]


EVERY = sorted({command for page in RUNBOOKS.glob("KVService*.md") for command in commands(page.stem)})


def run(daemon: DaemonProcess, command: str, code: int = 0) -> str:
    """What a command prints in an operator's shell. A `grep` without a match fails."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "KVCTL_ADDRESS": str(daemon.socket_path),
        "METRICS": f"http://127.0.0.1:{daemon.wait_for_log('serving')['metrics_port']}/metrics",
        "STORE": str(daemon.store),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def do(daemon: DaemonProcess, page: str, begin: str) -> str:
    """Run the page's command that begins so; it must be there."""
    return run(daemon, next(command for command in commands(page) if command.startswith(begin)))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One that is well, and has had a miss and a call with an error."""
    settings: dict[str, object] = {"server__metrics_address": "127.0.0.1:0", "dram__capacity_bytes": 16 * MIB}
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), **settings) as process:
        with process.client() as client:
            save(client, SMALL, new_chain(SMALL, 3))
            client.open_layout(SMALL).lookup(new_chain(SMALL)).release()
        with Wire(process.address) as wire:
            wire.attach()
            with refused(LeaseExpired, ""):
                wire.load(1)
        yield process


@pytest.mark.parametrize("command", EVERY)
def test_a_command_of_a_runbook_runs(daemon: DaemonProcess, command: str) -> None:
    assert run(daemon, command)


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path / "faults")


@pytest.fixture
def faulty(faults: Faults, tmp_path: Path) -> Iterator[DaemonProcess]:
    process = DaemonProcess(
        tmp_path,
        program=("-m", "tests.faulty_daemon"),
        server__metrics_address="127.0.0.1:0",
        dram__capacity_bytes=16 * MIB,
        ssd__capacity_bytes=32 * MIB,
        mover__policy="lru",
    )
    try:
        yield process.start(environment={"TEST_FAULTS": str(faults.folder)})
    finally:
        process.remove()


def test_down(faulty: DaemonProcess) -> None:
    faulty.kill()
    page = "KVServiceDown"
    status, metrics, health = commands(page)
    assert "no daemon answers" in run(faulty, status, code=1)
    assert "Failed to connect" in run(faulty, metrics, code=1)
    faulty.start()
    assert run(faulty, health) == "serving\n"


def test_tier_refuses_blocks(faulty: DaemonProcess, faults: Faults) -> None:
    page = "KVServiceTierRefusesBlocks"
    with faulty.client() as client:
        faults.set("pwritev", "ENOSPC")
        save(client, LARGE, new_chain(LARGE, 3))
        until(lambda: client.admin.status().ssd.refusing_because != "")
        status = do(faulty, page, "kvctl status")
        assert "SSD takes no new blocks" in status
        assert "No space left on device" in status
        faults.clear()
        until(lambda: client.admin.status().ssd.refusing_because == "")
    over = do(faulty, page, "curl")
    assert 'kvservice_tier_refusing{tier="ssd"} 0.0' in over
    assert "takes no new blocks" not in do(faulty, page, "kvctl status")


def test_blocks_quarantined(faulty: DaemonProcess) -> None:
    page = "KVServiceBlocksQuarantined"
    chain = new_chain(SMALL)
    with faulty.client() as client:
        save(client, SMALL, chain, Durability.SSD)
    flip_data(arena(faulty), SMALL, chain.keys[0], random.Random(1))
    count, scrub, scrub_again = commands(page)
    first = run(faulty, scrub, code=1)
    assert "1" in first
    assert run(faulty, count) == "kvservice_quarantined_blocks_total 1.0\n"
    assert "quarantined" in run(faulty, f"kvctl explain {chain.keys[0].hex()}")
    run(faulty, scrub_again)


def test_draining_for_long(faulty: DaemonProcess) -> None:
    page = "KVServiceDrainingForLong"
    run(faulty, "kvctl drain")
    assert "draining" in do(faulty, page, "kvctl status")
    assert 'kvservice_state{state="draining"} 1.0' in do(faulty, page, "curl")
    do(faulty, page, "kvctl drain --undo")
    assert do(faulty, page, "kvctl health") == "serving\n"
