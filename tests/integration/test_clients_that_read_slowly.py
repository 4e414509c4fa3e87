"""Clients that request much and read little cost the daemon a few frames each, and do not slow other clients."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvservice_api.errors import DeadlineExceeded
from kvservice_api.v1 import blocks_pb2
from kvservice_client import Client, Durability, Layout
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, new_chain, save
from tests.integration.wire import Upload, Wire, refused

_BLOCKS = 192  # 36 MiB for each reader.
# One frame that is being built, one that waits for its turn, one in gRPC's buffers, and their overhead.
_FRAMES_PER_READER_MAX = 4
_FRAME_BYTES = MIB
_LATE_S = 0.02
_ROUNDS = 10


@contextmanager
def slow_readers(daemon: DaemonProcess, salt: str, count: int) -> Iterator[None]:
    """Clients that load the same blocks, read one frame, and stop."""
    with ExitStack() as opened, ThreadPoolExecutor(count) as threads:
        loads = []

        def start(wire: Wire) -> None:
            wire.attach("slow")
            lease_id = wire.lookup(LARGE, new_chain(LARGE, _BLOCKS, salt)).lease_id
            request = blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=lease_id)
            loads.append(wire.blocks.LoadBlocks(request))
            next(loads[-1])

        wires = [opened.enter_context(Wire(daemon.address)) for _ in range(count)]
        list(threads.map(start, wires))
        until_still(wires[0])
        yield


def until_still(wire: Wire) -> None:
    """Wait until the daemon sends no more."""
    sent = [-1.0] * 50

    def is_still() -> bool:
        sent.append(wire.status().counters["load_bytes"])
        return sent[-1] == sent[-50]

    until(is_still)


def private_bytes(daemon: DaemonProcess) -> int:
    """The daemon's memory without the arena."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def late_beats(daemon: DaemonProcess) -> int:
    """How many heartbeats were more than 20 ms late because of work on the event loop."""
    port = daemon.wait_for_log("serving")["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    beats = dict(re.findall(r'kvservice_event_loop_own_delay_seconds_bucket\{le="(\S+)"\} (\S+)', text))
    return int(float(beats["+Inf"]) - float(beats[f"{_LATE_S:g}"]))


def keeps_time(daemon: DaemonProcess, *works: Callable[[], object]) -> None:
    """No heartbeat is late while one of `works` runs. A round runs each of them, in order.

    Work that blocks the event loop blocks it in every round. A delay because the machine is busy, while one of the
    daemon's threads holds the interpreter lock, does not repeat. So one round without a late heartbeat is enough
    for each of them.
    """
    late: list[list[int]] = [[] for _ in works]
    for _ in range(_ROUNDS):
        for work, counts in zip(works, late, strict=True):
            before = late_beats(daemon)
            work()
            counts.append(late_beats(daemon) - before)
        if all(0 in counts for counts in late):
            return
    pytest.fail(f"late heartbeats, of each work in {_ROUNDS} rounds: {late}")


@pytest.mark.parametrize("readers", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_slow_readers_cost_bounded_memory_and_no_heartbeat_comes_late(
    new_daemon: Callable[..., DaemonProcess], readers: int
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0, server__metrics_address="127.0.0.1:0", server__frame_bytes=_FRAME_BYTES)
    with Wire(daemon.address) as wire:
        wire.attach("quick")
        wire.open_layout(LARGE)
        chain = new_chain(LARGE, _BLOCKS, "read slowly")
        until(lambda: wire.status().dram.capacity_bytes > 48 * MIB)
        assert wire.save(Upload.of(wire, LARGE, chain).messages()).stored == _BLOCKS
        assert wire.has(LARGE, chain)
        before, own_bytes = wire.state(), private_bytes(daemon)

        def read_slowly() -> None:
            with slow_readers(daemon, "read slowly", readers):
                assert wire.status().leases == wire.status().clients - 1 == readers
                assert private_bytes(daemon) - own_bytes < readers * _FRAMES_PER_READER_MAX * _FRAME_BYTES
                assert wire.has(LARGE, chain[:64])  # A client that reads is served meanwhile.
            until(lambda: wire.state() == before)

        keeps_time(daemon, read_slowly)


@pytest.mark.parametrize("count", [2048, pytest.param(8192, marks=pytest.mark.slow)])
def test_a_lookup_of_thousands_of_blocks_does_not_delay_other_clients(
    new_daemon: Callable[..., DaemonProcess], count: int
) -> None:
    layout = Layout("tiny", "uint8", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
    daemon = new_daemon(server__metrics_address="127.0.0.1:0")
    with Client(daemon.address, timeout_s=60) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, count)
        assert save(client, layout, chain, Durability.SSD).stored == len(chain)
        until(lambda: client.admin.status().ssd.blocks == len(chain))

        def load() -> None:
            with blocks.lookup(chain) as lease:
                assert sum(len(layer.data) for layer in lease.load()) == layout.layers * len(chain) * 64

        def evict() -> None:
            assert client.evict(chain, "dram").held == 0

        def prefetch() -> None:
            assert client.prefetch(chain, wait=True).promoted == len(chain)

        def list_them() -> None:
            assert len(list(client.admin.list_blocks())) == len(chain)

        keeps_time(daemon, load, evict, prefetch, list_them)


def test_a_load_whose_client_does_not_read_ends_and_releases_its_blocks(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(server__transfer_idle_s=3, server__loads_max=1)
    chain = new_chain(LARGE, _BLOCKS, "unread")
    with Client(daemon.address) as client, Wire(daemon.address) as wire:
        save(client, LARGE, chain)
        wire.attach("stalled")
        lease_id = wire.lookup(LARGE, chain).lease_id
        request = blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=lease_id)
        load = wire.blocks.LoadBlocks(request)
        next(load)
        wire.blocks.ReleaseLease(blocks_pb2.ReleaseLeaseRequest(client_id=wire.client_id, lease_id=lease_id))
        assert client.evict(chain.keys, "dram").held == _BLOCKS, "the load itself keeps them"

        until(lambda: client.evict(chain.keys, "dram").held == 0)
        with client.open_layout(LARGE).lookup(chain) as lease:
            for _ in lease.load():
                pass  # There is a place for it.
        with refused(DeadlineExceeded, "read nothing for 3 s"):
            for _ in load:
                pass  # Frames that were sent before still arrive.
