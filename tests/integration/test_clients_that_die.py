"""A client that is killed leaves nothing behind: no lease, no load, no upload, no space."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from kvservice_api.v1 import blocks_pb2, types_pb2
from tests.daemon import MIB, SOON_S, DaemonProcess, until
from tests.integration import doomed_client
from tests.integration.known_blocks import LARGE, new_chain
from tests.integration.wire import Upload, Wire

_BLOCKS = 64  # 12 MiB: more than the connection buffers of a load whose client does not read.
_CLIENTS = 3


@pytest.fixture
def doomed() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts clients with a lease, a running load and a running save."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", doomed_client.__name__, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_client_killed_in_the_middle_of_a_save_leaves_nothing_and_its_leases_end_long_before_their_time(
    new_daemon: Callable[..., DaemonProcess], doomed: Callable[..., subprocess.Popen[str]]
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with Wire(daemon.address) as wire:
        wire.attach("watcher")
        wire.open_layout(LARGE)
        chain = new_chain(LARGE, _BLOCKS, salt="leased")
        until(lambda: wire.status().dram.capacity_bytes > 32 * MIB)
        assert wire.save(Upload.of(wire, LARGE, chain).messages()).stored == _BLOCKS
        before = wire.state()

        for _ in range(_CLIENTS):
            client = doomed(daemon.address, "leased", _BLOCKS)
            assert client.stdout is not None
            assert client.stdout.readline() == "in the middle\n"
            state = wire.state()
            assert (state["clients"], state["leases"], state["uploads"]) == (2, 1, 8)
            assert state["DRAM bytes"] > before["DRAM bytes"]

            client.kill()
            client.wait()
            until(lambda: not wire.status().leases, SOON_S)
            until(lambda: wire.state() == before)

        never = new_chain(LARGE, 8, "of leased, never to be stored")
        assert wire.lookup(LARGE, never).hit_blocks == 0
        evict = blocks_pb2.EvictRequest(keys=chain.packed_keys, tier=types_pb2.TIER_DRAM)
        until(lambda: wire.blocks.Evict(evict).held == 0)  # No load holds them any more.
        assert wire.status().dram.used_bytes == 0
        assert wire.save(Upload.of(wire, LARGE, never).messages()).stored == 8
        assert wire.has(LARGE, never)
    assert not [line for line in daemon.log if line["level"] == "error"]
