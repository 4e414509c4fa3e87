"""The client with a daemon that is away, returns, or hangs: bounded waits, and no stale lease."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, LeaseExpired
from kvservice_client import Client, Clock, Lease
from tests.clock import ClientClock
from tests.daemon import NEVER_S, SOON_S, DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain, same, small_layout

NewDaemon = Callable[..., DaemonProcess]


def test_after_a_kill_and_a_restart_the_same_client_uses_the_blocks_that_survived(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(), small_layout()
    with Client(daemon.address) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, 3 * layout.block_tokens)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers)
        lease = blocks.lookup(chain)
        first_epoch = client.capabilities().boot_epoch

        daemon.kill()
        daemon.start()

        with blocks.lookup(chain) as after:
            assert same([layer.data for layer in after.load()], layers)
        assert client.capabilities().boot_epoch != first_epoch
        assert lease.remaining_s == 0
        with pytest.raises(LeaseExpired):
            next(lease.load())
        with pytest.raises(LeaseExpired):
            lease.renew()
        lease.release()


def test_a_lost_daemon_is_one_line_in_the_log_with_its_reason(
    new_daemon: NewDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = new_daemon()
    with Client(daemon.address, reconnect_wait_s=0.0) as client:
        blocks, chain = client.open_layout(small_layout()), new_chain(small_layout(), 64)
        blocks.ping()
        daemon.kill()
        for _ in range(20):
            with pytest.raises(DaemonUnavailable):
                blocks.lookup(chain)
        until(lambda: bool(caplog.messages))
        (line,) = caplog.messages
        assert line.startswith(f"the daemon at {daemon.address} was lost, and with it this client's leases: ")
        assert f"no answer from the daemon at {daemon.address}: " in line


def test_a_client_that_is_closed_says_nothing_of_a_lost_daemon(
    new_daemon: NewDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(new_daemon().address) as client:
        client.open_layout(small_layout()).ping()
    assert caplog.messages == []


def test_the_client_opens_the_layout_again_in_a_daemon_with_an_empty_store(new_daemon: NewDaemon) -> None:
    layout = small_layout()
    first = new_daemon()
    with Client(first.address) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))
        first.kill()

        other = new_daemon(server__address=first.address)
        assert other.address == first.address
        assert blocks.save(chain, layers_of(blocks, chain)).stored == 1


def test_while_the_daemon_is_away_calls_fail_soon_and_clearly(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(), small_layout()
    with Client(daemon.address, timeout_s=NEVER_S, reconnect_wait_s=0.2) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))
        daemon.kill()

        for call in (
            lambda: blocks.lookup(chain),
            lambda: blocks.contains(chain),
            lambda: blocks.save(chain, layers_of(blocks, chain)),
            client.capabilities,
            client.admin.status,
            lambda: client.evict(chain, "dram"),
        ):
            start_s = time.monotonic()
            with pytest.raises(DaemonUnavailable, match=r"no answer from the daemon at|ended this attachment"):
                call()
            assert time.monotonic() - start_s < SOON_S

        daemon.start()
        assert blocks.contains(chain) == 1


def test_a_load_that_a_kill_cuts_off_raises_and_what_it_yielded_is_right(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(server__frame_bytes=4096), small_layout(layers=512)
    with Client(daemon.address, transport="grpc") as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, 64 * layout.block_tokens)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers, timeout_s=60.0)  # 32,768 frames, on a machine that may be busy.
        load = blocks.lookup(chain).load()
        loaded = [next(load)]
        daemon.kill()
        with pytest.raises(DaemonUnavailable):
            loaded.extend(load)
        assert same([layer.data for layer in loaded], layers[: len(loaded)])


def test_where_nothing_listens_the_first_call_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    layout = small_layout()
    client, chain = Client(f"127.0.0.1:{port}", reconnect_wait_s=0.1), new_chain(layout, layout.block_tokens)
    blocks = client.open_layout(layout)
    with pytest.raises(DaemonUnavailable, match=f"no answer from the daemon at 127.0.0.1:{port}.*refused"):
        blocks.lookup(chain)
    client.close()
    with pytest.raises(DaemonUnavailable, match="the client is closed"):
        blocks.lookup(chain)


@pytest.fixture
def hanging(new_daemon: NewDaemon) -> Iterator[Callable[[], DaemonProcess]]:
    """A daemon that can be made to hang."""
    made: list[DaemonProcess] = []
    daemon = new_daemon()

    def hang() -> DaemonProcess:
        if made:
            os.kill(daemon.process.pid, signal.SIGSTOP)
        made.append(daemon)
        return daemon

    yield hang
    os.kill(daemon.process.pid, signal.SIGCONT)


def test_a_daemon_that_hangs_costs_no_more_than_the_timeout(hanging: Callable[[], DaemonProcess]) -> None:
    daemon, layout = hanging(), small_layout()
    with Client(daemon.address, timeout_s=0.3, transport="grpc") as client:  # In memory, a load needs no daemon.
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers, timeout_s=60)
        lease = blocks.lookup(chain, lease_ttl_s=300, timeout_s=60)
        hanging()

        for call in (
            lambda: blocks.lookup(chain),
            lambda: next(lease.load()),
            lambda: blocks.save(chain, layers),
            lambda: client.prefetch(chain, timeout_s=0.1),
        ):
            start_s = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                call()
            assert time.monotonic() - start_s < SOON_S
        start_s = time.monotonic()
        lease.release()
        assert time.monotonic() - start_s < SOON_S


def test_a_lease_lives_by_renewal_and_ends_by_time_and_by_release(daemon: DaemonProcess) -> None:
    layout = small_layout()
    with Client(daemon.address) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))

        lease = blocks.lookup(chain, lease_ttl_s=30)
        assert lease.renew(300.0) == 300.0
        assert lease.remaining_s > 200
        lease.release()
        lease.release()
        with pytest.raises(LeaseExpired):
            next(lease.load())

        short = blocks.lookup(chain, lease_ttl_s=0.05)
        until(lambda: short.remaining_s == 0)
        with pytest.raises(LeaseExpired):
            next(short.load())


def test_a_slow_reader_keeps_its_lease(daemon: DaemonProcess) -> None:
    layout, clock = small_layout(), ClientClock()
    with Client(daemon.address, clock=clock) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))

        with blocks.lookup(chain, lease_ttl_s=300) as lease:
            for _ in lease.load(timeout_s=NEVER_S * 10):
                clock.advance(seconds=200)  # The engine computes meanwhile.
            assert layout.layers * 200 > 2 * 300
            assert lease.remaining_s > 0


def leases_of(client: Client) -> int:
    return client.admin.status().leases


def test_a_call_on_a_closed_client_fails_at_once_and_is_not_tried_again(daemon: DaemonProcess) -> None:
    layout, pauses_s = small_layout(), []

    class PausesNoted(Clock):
        def sleep(self, seconds: float) -> None:
            pauses_s.append(seconds)
            super().sleep(seconds)

    client = Client(daemon.address, clock=PausesNoted())
    blocks = client.open_layout(layout)
    blocks.ping()
    client.close()
    pauses_s.clear()
    with pytest.raises(DaemonUnavailable):
        blocks.lookup(new_chain(layout, layout.block_tokens))
    assert not pauses_s


def test_leases_end_with_their_client_closed_or_forgotten(daemon: DaemonProcess) -> None:
    layout = small_layout()
    with Client(daemon.address) as watcher:
        blocks, chain = watcher.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))

        def held(client: Client) -> Lease:
            lease = client.open_layout(layout).lookup(chain, lease_ttl_s=300)
            assert leases_of(watcher) == 1
            return lease

        client = Client(daemon.address)
        lease = held(client)
        client.close()
        until(lambda: leases_of(watcher) == 0)  # Far sooner than by time.
        assert lease.remaining_s == 0

        client = Client(daemon.address)
        held(client)
        del client
        until(lambda: leases_of(watcher) == 0)  # Far sooner than by time.


@pytest.mark.slow
def test_an_idle_client_stays_attached(daemon: DaemonProcess) -> None:
    layout = small_layout()
    with Client(daemon.address) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))
        with blocks.lookup(chain, lease_ttl_s=300.0) as lease:
            time.sleep(130)  # Six keepalive pings: a daemon that treats them as abuse closes the connection after four.
            assert lease.remaining_s > 0
            assert list(lease.load())


def test_a_client_that_outlives_its_daemons_keeps_no_thread_of_each(daemon: DaemonProcess) -> None:
    layout = small_layout()
    with Client(daemon.address, reconnect_wait_s=5.0) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers)
        threads = threading.active_count()

        for _ in range(3):
            daemon.kill()
            daemon.start()
            until(lambda: blocks.save(chain, layers, timeout_s=10).is_complete)

        until(lambda: threading.active_count() <= threads)
