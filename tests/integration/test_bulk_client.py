"""Loads and saves through the bulk port of a real daemon: with TLS, and when daemon, port or network fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import (
    BulkUnavailable,
    ChecksumMismatch,
    DaemonUnavailable,
    DeadlineExceeded,
    KVError,
    LeaseExpired,
)
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_client import Client, TlsFiles
from kvservice_client.transports import bulk_transfer
from tests.certificates import Authority
from tests.contracts.transport import TransportContract, flip
from tests.daemon import MIB, NEVER_S, SOON_S, DaemonProcess, until
from tests.forking import in_child
from tests.integration.conversations import large_layout, layers_of, new_chain, same

LAYOUT = large_layout()


class TlsDaemon(DaemonProcess):
    """With a certificate, and for clients that have one of the same authority."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = Authority()
        ca = self.authority.write(folder, "ca")
        certificate, key = self.authority.issue().write(folder)
        self.files = TlsFiles(ca, *self.authority.issue("client").write(folder, "client"))
        settings |= {"tls__certificate": certificate, "tls__key": key, "tls__client_ca": ca}
        super().__init__(folder, **settings)

    def client(self, name: str = "test", **options: Any) -> Client:
        return super().client(name, **{"tls": self.files, **options})


@pytest.fixture(scope="module")
def tls_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsDaemon]:
    with TlsDaemon(tmp_path_factory.mktemp("tls"), dram__capacity_bytes=128 * MIB) as daemon:
        yield daemon


class TestBulkWithTls(TransportContract):
    transport = "bulk"

    @pytest.fixture
    def daemon(self, tls_daemon: TlsDaemon) -> DaemonProcess:
        return tls_daemon

    @pytest.fixture
    def new_daemon(self, tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
        made: list[TlsDaemon] = []

        def start(**settings: Any) -> DaemonProcess:
            made.append(TlsDaemon(tmp_path / f"{len(made)}", **settings))
            made[-1].start()
            return made[-1]

        yield start
        for each in made:
            each.remove()


class Stored:
    """36 MiB in a daemon of its own: more than sockets hold, and a client of it."""

    def __init__(self, daemon: DaemonProcess, **options: Any) -> None:
        self.daemon = daemon
        self.client = daemon.client(transport="bulk", **options)
        self.blocks = self.client.open_layout(LAYOUT)
        self.chain = new_chain(LAYOUT, 3 * LAYOUT.block_tokens)
        self.layers = layers_of(self.blocks, self.chain)
        self.blocks.save(self.chain, self.layers)

    def is_on_ssd(self) -> bool:
        with self.blocks.lookup(self.chain) as lease:
            return all(run.ssd for run in lease.residency)

    def check_loaded(self) -> None:
        with self.blocks.lookup(self.chain) as lease:
            assert same([layer.data for layer in lease.load()], self.layers)


@pytest.fixture(params=[1, 2], ids=["one connection", "two connections"])
def stored(
    request: pytest.FixtureRequest, new_daemon: Callable[..., DaemonProcess], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stored]:
    monkeypatch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: request.param)
    stored = Stored(new_daemon())
    yield stored
    stored.client.close()


def test_a_layer_says_by_which_transport_it_came(stored: Stored) -> None:
    with stored.blocks.lookup(stored.chain) as lease:
        assert {layer.transport for layer in lease.load()} == {"bulk"}
    assert set(stored.client.stats().loaded_bytes) == {"bulk"}


def test_a_bit_that_flips_on_the_way_is_found_and_the_layer_comes_again(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    flips = [1]
    summed = SocketBuffers.receive

    def receive(buffers: SocketBuffers, *args: Any) -> tuple[int, int]:
        found = summed(buffers, *args)
        if buffers.is_done and len(buffers.sums) and flips:
            buffers.sums[0] ^= flips.pop()
        return found

    monkeypatch.setattr(SocketBuffers, "receive", receive)
    stored.check_loaded()
    stats = stored.client.stats()
    assert not flips and stats.transports["bulk"].mismatches == 1
    assert stats.loaded_bytes["grpc"] > 0
    stored.check_loaded()
    assert stored.client.stats().loaded_bytes["grpc"] == stats.loaded_bytes["grpc"], "the daemon has lost nothing"


def test_a_bit_that_flips_in_the_daemon_is_found_and_its_block_dropped(stored: Stored) -> None:
    until(stored.is_on_ssd)  # Otherwise the write to SSD may find the damage first.
    flip(stored.daemon, stored.layers[2][:4096].tobytes())
    with stored.blocks.lookup(stored.chain) as lease:
        load = lease.load()
        assert same([next(load).data, next(load).data], stored.layers[:2])
        with pytest.raises(ChecksumMismatch):
            next(load)
    assert stored.client.stats().transports["bulk"].mismatches == 1
    assert stored.blocks.contains(stored.chain) == 0


def test_a_daemon_that_is_killed_in_a_load_ends_it_as_over_grpc(stored: Stored) -> None:
    with stored.blocks.lookup(stored.chain) as lease:
        load = lease.load()
        assert np.array_equal(next(load).data, stored.layers[0])
        stored.daemon.kill()
        with pytest.raises((DaemonUnavailable, LeaseExpired)):
            list(load)
        stored.daemon.start()
        with pytest.raises(LeaseExpired):
            list(lease.load())
    stored.check_loaded()
    assert stored.client.stats().transports["bulk"].loads, "the restarted daemon's port is used again"


def test_a_daemon_that_stops_in_a_load_ends_it_at_its_time(stored: Stored) -> None:
    with stored.blocks.lookup(stored.chain, lease_ttl_s=NEVER_S) as lease:
        for load in (lease.load(timeout_s=1.0), lease.load(layer_timeout_s=NEVER_S, idle_timeout_s=0.3)):
            next(load)
            with stored.daemon.stopped(), pytest.raises(DeadlineExceeded):
                list(load)
    stored.check_loaded()


def test_cancel_ends_a_load_of_a_daemon_that_has_stopped_in_it(stored: Stored) -> None:
    with ThreadPoolExecutor() as threads, stored.blocks.lookup(stored.chain, lease_ttl_s=NEVER_S) as lease:
        load = lease.load(timeout_s=NEVER_S)
        next(load)
        with stored.daemon.stopped():
            rest = threads.submit(list, load)
            with pytest.raises(TimeoutError):
                rest.result(0.2)
            lease.cancel()
            with pytest.raises(KVError, match="cancelled"):
                rest.result(SOON_S)
    stored.check_loaded()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_within_a_load_leaves_the_parents_load_alone(stored: Stored) -> None:
    with stored.blocks.lookup(stored.chain) as lease:
        load = lease.load()
        loaded = [next(load)]
        in_child(stored.check_loaded)
        loaded += load
        assert same([layer.data for layer in loaded], stored.layers)
    stored.check_loaded()
    assert set(stored.client.stats().loaded_bytes) == {"bulk"}


def test_a_daemon_without_the_port_is_used_by_grpc_unless_the_port_is_demanded(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(server__bulk_address="off", dram__share="off")
    chain = new_chain(LAYOUT, LAYOUT.block_tokens)
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        blocks.save(chain, layers_of(blocks, chain))
        assert set(client.stats().saved_bytes) == {"grpc"}
        assert "no bulk port" in client.stats().bulk_refused_because
    with daemon.client(transport="bulk") as client, pytest.raises(BulkUnavailable):
        client.open_layout(LAYOUT).save(chain, layers_of(blocks, chain))
    with Client(str(daemon.socket_path), transport="bulk") as client, pytest.raises(BulkUnavailable, match="UNIX"):
        client.open_layout(LAYOUT).save(chain, layers_of(blocks, chain))


def test_large_orders_go_by_the_port_without_being_asked_and_small_ones_by_grpc(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(dram__share="off")
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        large, small = new_chain(LAYOUT, LAYOUT.block_tokens), new_chain(LAYOUT, 8)
        for chain, name in ((large, "bulk"), (small, "grpc")):
            blocks.save(chain, layers_of(blocks, chain))
            with blocks.lookup(chain) as lease:
                assert {layer.transport for layer in lease.load()} == {name}
        assert client.stats().transports["bulk"].fallbacks == 0


def test_changed_tls_files_are_used_by_the_next_connections(tmp_path: Path) -> None:
    with TlsDaemon(tmp_path / "daemon", server__bulk_address="127.0.0.1:0") as daemon:
        stored = Stored(daemon)
        former = stored.client._transports._transports[0]._pool._idle  # type: ignore[attr-defined]
        kept = list(former)
        assert kept
        daemon.authority.issue("another client").write(daemon.folder, "client")
        stored.client._connection.channel._tls.look_soon()  # type: ignore[union-attr]
        stored.check_loaded()
        now = stored.client._transports._transports[0]._pool._idle  # type: ignore[attr-defined]
        assert now and not set(now) & set(kept)
        stored.client.close()
