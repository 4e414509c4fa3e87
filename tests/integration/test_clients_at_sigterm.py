"""On SIGTERM a daemon finishes the calls that run, accepts no new ones, and exits with 0."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvservice_api.errors import Draining
from kvservice_api.v1 import blocks_pb2
from kvservice_client import Client
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain, save, verify
from tests.integration.wire import Feed, Upload, Wire, refused

_BLOCKS = 128  # 24 MiB: much more than a connection buffers.
NewDaemon = Callable[..., DaemonProcess]


class LoadUnderWay:
    """A load of many blocks of which one frame has been read. A context manager."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.wire = Wire(daemon.address)
        self.wire.attach()
        self.wire.open_layout(LARGE)
        self.wire.open_layout(SMALL)
        self.chain = new_chain(LARGE, _BLOCKS)
        until(lambda: self.wire.status().dram.capacity_bytes > 32 * MIB)
        assert self.wire.save(Upload.of(self.wire, LARGE, self.chain).messages()).stored == _BLOCKS
        lease_id = self.wire.lookup(LARGE, self.chain).lease_id
        request = blocks_pb2.LoadBlocksRequest(client_id=self.wire.client_id, lease_id=lease_id)
        self._load = self.wire.blocks.LoadBlocks(request)
        self._loaded = [next(self._load).payload]

    def rest_is_right(self) -> bool:
        """Read the remaining frames, and compare all bytes."""
        self._loaded += [frame.payload for frame in self._load]
        expected = b"".join(data.tobytes() for layer in layers_of(LARGE, self.chain) for data in layer)
        return b"".join(self._loaded) == expected

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.wire.__exit__(*exc)


def test_what_runs_at_sigterm_completes_while_new_saves_are_refused(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with LoadUnderWay(daemon) as load:
        wire, before, after = load.wire, new_chain(SMALL, 2), new_chain(SMALL, 2)
        messages = Upload.of(wire, SMALL, before).messages()
        feed = Feed(*messages[:3])
        saving = wire.begin_save(feed)
        until(lambda: wire.status().uploads == 2)

        daemon.terminate()
        until(lambda: wire.status().state == "draining")
        health = health_pb2_grpc.HealthStub(wire.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        with refused(Draining, "the daemon is stopping and accepts no new saves"):
            wire.save(Upload.of(wire, SMALL, after).messages())
        with Client(daemon.address) as client, pytest.raises(Draining):
            save(client, SMALL, after)

        feed.send(*messages[3:])
        feed.end()
        assert saving.result().stored == 2
        assert daemon.process.poll() is None, "it left in the middle of a load"
        assert load.rest_is_right()
    assert daemon.wait_for_end() == 0

    daemon.start()
    with Client(daemon.address) as client:
        verify(client, SMALL, before)
        assert client.open_layout(SMALL).contains(after) == 0


def test_a_load_whose_client_does_not_read_is_cut_off_when_the_drain_timeout_is_over(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(server__drain_timeout_s=0.3)
    with LoadUnderWay(daemon) as load:
        assert daemon.stop() == 0
        with pytest.raises(grpc.RpcError) as caught:
            load.rest_is_right()
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert [line for line in daemon.log if "drain timeout" in line["event"]]


def test_clients_that_are_only_attached_do_not_hold_a_daemon_up(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        chain = new_chain(SMALL)
        wire.save(Upload.of(wire, SMALL, chain).messages())
        wire.lookup(SMALL, chain)
        assert daemon.stop() == 0
    assert not [line for line in daemon.log if line["level"] in ("warning", "error")]


def test_what_cannot_be_written_after_sigterm_is_counted_in_the_log(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(server__write_timeout_s=30.0, ssd__capacity_bytes=0)
    chain = new_chain(SMALL, 3)
    with daemon.client() as client:
        assert save(client, SMALL, chain).stored == 3
    assert daemon.stop() == 0
    assert daemon.logged("3 blocks are only in DRAM: SSD has no space for them")


@pytest.mark.parametrize(("timeout_s", "is_written"), [(60.0, True), (0.1, False), (0.0, False)])
def test_what_only_dram_has_is_written_after_sigterm_for_as_long_as_is_set(
    tmp_path: Path, timeout_s: float, is_written: bool
) -> None:
    """On an SSD that needs more than a second for all blocks."""
    slow = ("-m", "benchmarks.placement.limited_daemon")
    daemon = DaemonProcess(tmp_path, program=slow, server__write_timeout_s=timeout_s)
    try:
        daemon.start(environment={"BENCH_SSD_BYTES_PER_S": "10e6"})
        chain = new_chain(LARGE, 80)
        with daemon.client() as client:
            until(lambda: client.admin.status().dram.capacity_bytes > 32 * MIB)
            assert save(client, LARGE, chain).stored == len(chain)
        assert daemon.stop() == 0
        assert bool(daemon.logged("the time is over: some blocks are only in DRAM; raise server.write_timeout_s")) == (
            timeout_s == 0.1
        )
        shutil.rmtree(daemon.arena_folder)
        daemon.start(environment={"BENCH_SSD_BYTES_PER_S": "1e9"})
        with daemon.client() as client:
            assert (client.admin.status().ssd.blocks == len(chain)) is is_written
    finally:
        daemon.remove()
