"""The commands of ops/runbooks, as they stand there: on a daemon that is well, and in the state of an alert."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvservice_api.errors import LeaseExpired
from kvservice_client import Durability
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save
from tests.integration.media import arena, flip_data
from tests.integration.test_faults_disk import Faults
from tests.integration.wire import Wire, refused

Kvctl = Callable[..., subprocess.CompletedProcess[str]]

RUNBOOKS = Path(__file__).parents[2] / "ops" / "runbooks"


def commands(page: str) -> list[str]:
    """Those of a page, in their order."""
    blocks = re.findall(r"(?sm)^ *```sh\n(.*?)^ *```", (RUNBOOKS / f"{page}.md").read_text())
    return [line.strip() for block in blocks for line in block.splitlines()]


EVERY = sorted({command for page in RUNBOOKS.glob("KVService*.md") for command in commands(page.stem)})


class Operator:
    """An operator's shell on a daemon's host. `kvctl` runs in this process, where it starts faster."""

    def __init__(self, kvctl: Kvctl, daemon: DaemonProcess) -> None:
        self._kvctl = kvctl
        self._daemon = daemon

    def run(self, command: str, code: int = 0) -> str:
        """What the command prints. A `grep` without a match fails."""
        program, _, arguments = command.partition(" ")
        if program == "kvctl":
            done = self._kvctl(*shlex.split(arguments), "--address", str(self._daemon.socket_path))
        else:
            shell = ["bash", "-euo", "pipefail", "-c", command]
            done = subprocess.run(shell, env=self._environment(), capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        return output

    def do(self, page: str, begin: str) -> str:
        """Run the page's command that begins so; it must be there."""
        return self.run(next(command for command in commands(page) if command.startswith(begin)))

    def _environment(self) -> dict[str, str]:
        port = self._daemon.wait_for_log("serving")["metrics_port"]
        metrics = f"http://127.0.0.1:{port}/metrics"
        return {**os.environ, "METRICS": metrics, "STORE": str(self._daemon.store)}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One that is well, and has had a miss and a call with an error."""
    settings: dict[str, Any] = {"server__metrics_address": "127.0.0.1:0", "dram__capacity_bytes": 16 * MIB}
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
def test_a_command_of_a_runbook_runs(daemon: DaemonProcess, kvctl_here: Kvctl, command: str) -> None:
    assert Operator(kvctl_here, daemon).run(command)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults") / "faults")


@pytest.fixture(scope="module")
def faulty(faults: Faults) -> Iterator[DaemonProcess]:
    process = DaemonProcess(
        faults.folder.parent,
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


@pytest.fixture
def operator(faulty: DaemonProcess, kvctl_here: Kvctl) -> Operator:
    return Operator(kvctl_here, faulty)


def test_tier_refuses_blocks(faulty: DaemonProcess, faults: Faults, operator: Operator) -> None:
    page = "KVServiceTierRefusesBlocks"
    with faulty.client() as client:
        faults.set("pwritev", "ENOSPC")
        save(client, LARGE, new_chain(LARGE, 3))
        until(lambda: client.admin.status().ssd.refusing_because != "")
        status = operator.do(page, "kvctl status")
        assert "SSD takes no new blocks" in status
        assert "No space left on device" in status
        faults.clear()
        until(lambda: client.admin.status().ssd.refusing_because == "")
    assert 'kvservice_tier_refusing{tier="ssd"} 0.0' in operator.do(page, "curl")
    assert "takes no new blocks" not in operator.do(page, "kvctl status")


def test_blocks_quarantined(faulty: DaemonProcess, operator: Operator) -> None:
    chain = new_chain(SMALL)
    with faulty.client() as client:
        save(client, SMALL, chain, Durability.SSD)
    flip_data(arena(faulty), SMALL, chain.keys[0], random.Random(1))
    count, scrub, scrub_again = commands("KVServiceBlocksQuarantined")

    assert "damaged" in operator.run(scrub, code=1)
    assert operator.run(count) == "kvservice_quarantined_blocks_total 1.0\n"
    assert "quarantined" in operator.run(f"kvctl explain {chain.keys[0].hex()}")
    operator.run(scrub_again)


def test_draining_for_long(operator: Operator) -> None:
    page = "KVServiceDrainingForLong"
    operator.run("kvctl drain")
    assert "draining" in operator.do(page, "kvctl status")
    assert 'kvservice_state{state="draining"} 1.0' in operator.do(page, "curl")
    operator.do(page, "kvctl drain --undo")
    assert operator.do(page, "kvctl health") == "serving\n"


def test_down(faulty: DaemonProcess, faults: Faults, operator: Operator) -> None:
    status, metrics, health = commands("KVServiceDown")
    faulty.kill()
    assert "No process listens" in operator.run(status, code=1)
    assert "Failed to connect" in operator.run(metrics, code=1)
    faulty.start(environment={"TEST_FAULTS": str(faults.folder)})
    assert operator.run(health) == "serving\n"
