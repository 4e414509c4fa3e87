"""Lookups in the background: the caller never waits, and a result that is not wanted leaves no lease."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

import pytest

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError, LeaseExpired, Overloaded
from kvservice_client import Client, FoundPrefix, PendingLookup
from tests.daemon import NEVER_S, SOON_S, DaemonProcess, until
from tests.forking import in_child
from tests.integration.known_blocks import SMALL, compare, new_chain, save

# Python 3.12 and later warn of forks of processes with threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

STORED = new_chain(SMALL, 3, "stored before all lookups")


@pytest.fixture
def daemon(new_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    return new_daemon(ssd__capacity_bytes=0)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """An attached client, which has stored blocks."""
    with daemon.client() as client:
        save(client, SMALL, STORED)
        yield client


@contextmanager
def stopped(daemon: DaemonProcess) -> Iterator[None]:
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def result(pending: PendingLookup) -> FoundPrefix:
    assert pending.wait(SOON_S)
    found = pending.poll()
    assert found is not None
    return found


def error_of(pending: PendingLookup) -> type[KVError]:
    assert pending.wait(SOON_S)
    with pytest.raises(KVError) as raised:
        pending.poll()
    return raised.type


def until_leases_are(client: Client, count: int) -> None:
    """Open tickets count as well."""
    until(lambda: client.admin.status().leases == count)


def blocks_asked(client: Client) -> float:
    return client.admin.status().counters["lookup_blocks_asked"]


class Relay:
    """Carries the bytes between clients and a daemon, and counts those for the daemon. A context manager."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.bytes_to_daemon = 0
        self._sockets = [listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept, listener)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                daemon = socket.create_connection(("127.0.0.1", self._daemon.port))
                self._sockets += [client, daemon]
                self._start(self._carry, client, daemon, True)
                self._start(self._carry, daemon, client, False)

    def _carry(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                self.bytes_to_daemon += len(data) * counts
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()


class TestTheResult:
    def test_is_that_of_a_lookup(self, client: Client) -> None:
        found = result(client.open_layout(SMALL).begin_lookup(STORED, request_id="begun"))

        compare(found.lease, SMALL, STORED)
        assert (found.lease.hit_blocks, found.ticket) == (3, b"")
        found.lease.release()
        until_leases_are(client, 0)

    def test_has_a_ticket_that_others_adopt(self, client: Client, daemon: DaemonProcess) -> None:
        found = result(client.open_layout(SMALL).begin_lookup(STORED, adoptions=2))
        found.lease.release()
        with daemon.client() as other:
            for _ in range(2):
                with other.open_layout(SMALL).adopt(found.ticket) as adopted:
                    compare(adopted, SMALL, STORED)
        until_leases_are(client, 0)

    @pytest.mark.parametrize("blocks", [0, 2])
    def test_of_a_miss_has_no_ticket(self, client: Client, blocks: int) -> None:
        found = result(client.open_layout(SMALL).begin_lookup(new_chain(SMALL, blocks), adoptions=2))

        assert (found.lease.hit_blocks, found.ticket) == (0, b"")
        assert client.admin.status().leases == 0

    def test_is_the_same_at_each_poll(self, client: Client) -> None:
        pending = client.open_layout(SMALL).begin_lookup(STORED)

        assert result(pending) is pending.poll()

    def test_of_a_client_that_is_not_attached_arrives_too(self, client: Client, daemon: DaemonProcess) -> None:
        with daemon.client() as new:
            assert result(new.open_layout(SMALL).begin_lookup(STORED)).lease.hit_blocks == 3

    def test_of_many_at_once_is_each_ones_own(self, client: Client) -> None:
        blocks = client.open_layout(SMALL)
        begun = [blocks.begin_lookup(STORED[: 1 + at % 3]) for at in range(40)]

        assert [result(each).lease.hit_blocks for each in begun] == [1 + at % 3 for at in range(40)]

    def test_stays_the_callers_when_the_lookup_is_dropped(self, client: Client) -> None:
        pending = client.open_layout(SMALL).begin_lookup(STORED)
        found = result(pending)
        del pending
        result(client.open_layout(SMALL).begin_lookup(new_chain(SMALL)))  # Later work of the same threads is done.

        assert client.admin.status().leases == 1
        compare(found.lease, SMALL, STORED)

    def test_without_the_ticket_that_was_wanted_is_an_error_and_leaves_no_lease(
        self, new_daemon: Callable[..., DaemonProcess]
    ) -> None:
        daemon = new_daemon(ssd__capacity_bytes=0, leases__per_client_max=1)
        with daemon.client() as client:
            save(client, SMALL, STORED)
            blocks = client.open_layout(SMALL)
            result(blocks.begin_lookup(STORED, adoptions=1)).lease.release()

            assert error_of(blocks.begin_lookup(STORED, adoptions=1)) is Overloaded
            until_leases_are(client, 1)  # The first ticket.


class TestADaemonThatIsStopped:
    def test_is_not_waited_for(self, client: Client, daemon: DaemonProcess) -> None:
        blocks = client.open_layout(SMALL)
        with stopped(daemon):
            begun = [blocks.begin_lookup(STORED, timeout_s=NEVER_S) for _ in range(20)]
            assert [each.poll() for each in begun] == [None] * 20
            assert not begun[0].wait(0.0)
            assert len(client._connection.background._threads) == 4
        assert {result(each).lease.hit_blocks for each in begun} == {3}

    @pytest.mark.parametrize("is_attached", [True, False])
    def test_makes_each_lookup_fail_at_its_own_time_also_those_that_wait_for_a_thread(
        self, client: Client, daemon: DaemonProcess, is_attached: bool
    ) -> None:
        with daemon.client() as other:
            blocks = (client if is_attached else other).open_layout(SMALL)
            with stopped(daemon):
                first = [blocks.begin_lookup(STORED, timeout_s=NEVER_S) for _ in range(4)]
                late = [blocks.begin_lookup(STORED, timeout_s=0.1) for _ in range(8)]
                assert {error_of(each) for each in late} == {DeadlineExceeded}
                assert [each.poll() for each in first] == [None] * 4
                del first
        until_leases_are(client, 0)

    def test_leaves_no_lease_of_a_lookup_that_was_cancelled_meanwhile(
        self, client: Client, daemon: DaemonProcess
    ) -> None:
        asked = blocks_asked(client)
        with Relay(daemon) as relay, Client(relay.address, timeout_s=NEVER_S) as other:
            blocks = other.open_layout(SMALL)
            blocks.ping()
            with stopped(daemon):
                sent = relay.bytes_to_daemon
                pending = blocks.begin_lookup(STORED, lease_ttl_s=NEVER_S, adoptions=3)
                until(lambda: relay.bytes_to_daemon > sent)
                pending.cancel()
                assert error_of(pending) is LeaseExpired
            until(lambda: blocks_asked(client) == asked + 3)
            until_leases_are(client, 0)

    def test_does_not_hold_up_the_close_of_a_client(self, client: Client, daemon: DaemonProcess) -> None:
        blocks = client.open_layout(SMALL)
        with stopped(daemon):
            begun = [blocks.begin_lookup(STORED, timeout_s=NEVER_S) for _ in range(20)]
            client.close()
            assert {error_of(each) for each in begun} == {DaemonUnavailable}
            assert error_of(blocks.begin_lookup(STORED, timeout_s=NEVER_S)) is DaemonUnavailable

    @pytest.mark.parametrize("is_attached", [True, False])
    def test_does_not_hold_up_the_end_of_a_program(self, daemon: DaemonProcess, is_attached: bool) -> None:
        program = (
            "import os, signal, sys\n"
            "from kvservice_client import Client\n"
            "from tests.integration.known_blocks import SMALL, new_chain\n"
            f"blocks = Client('{daemon.address}', timeout_s={SOON_S}).open_layout(SMALL)\n"
            f"{'blocks.ping()' if is_attached else ''}\n"
            f"os.kill({daemon.process.pid}, signal.SIGSTOP)\n"
            f"begun = [blocks.begin_lookup(new_chain(SMALL, 2), timeout_s={NEVER_S}) for _ in range(8)]\n"
            "blocks.peek(new_chain(SMALL, 2))\n"
        )
        try:
            ran = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
            )
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert (ran.returncode, ran.stderr) == (0, "")


def test_a_killed_daemon_is_an_error_and_its_successor_answers(client: Client, daemon: DaemonProcess) -> None:
    blocks = client.open_layout(SMALL)
    with stopped(daemon):
        begun = [blocks.begin_lookup(STORED, timeout_s=NEVER_S) for _ in range(8)]
        daemon.kill()
    assert {error_of(each) for each in begun} == {DaemonUnavailable}

    daemon.start()

    def answers() -> bool:
        pending = blocks.begin_lookup(STORED, timeout_s=SOON_S)
        assert pending.wait(SOON_S)
        try:
            return pending.poll() is not None
        except DaemonUnavailable:
            return False  # gRPC connects again after a pause.

    until(answers)


class TestALookupThatIsNotWanted:
    @pytest.mark.parametrize("adoptions", [0, 3])
    def test_releases_what_it_has_found(self, client: Client, adoptions: int) -> None:
        pending = client.open_layout(SMALL).begin_lookup(STORED, lease_ttl_s=NEVER_S, adoptions=adoptions)
        assert pending.wait(SOON_S)
        assert client.admin.status().leases == (2 if adoptions else 1)

        pending.cancel()

        until_leases_are(client, 0)
        with pytest.raises(LeaseExpired, match="cancelled"):
            pending.poll()
        pending.cancel()

    @pytest.mark.parametrize("adoptions", [0, 3])
    def test_does_so_when_it_is_dropped(self, client: Client, adoptions: int) -> None:
        pending = client.open_layout(SMALL).begin_lookup(STORED, lease_ttl_s=NEVER_S, adoptions=adoptions)
        assert pending.wait(SOON_S)

        del pending

        until_leases_are(client, 0)

    def test_leaves_no_lease_whenever_it_is_dropped_or_cancelled(self, client: Client) -> None:
        blocks, asked = client.open_layout(SMALL), blocks_asked(client)
        for at in range(60):
            pending = blocks.begin_lookup(STORED, lease_ttl_s=NEVER_S, adoptions=at % 2)
            pending.wait(at % 10 * 1e-4)
            if at % 3:
                pending.cancel()
            del pending
        last = result(blocks.begin_lookup(STORED))
        last.lease.release()

        until_leases_are(client, 0)
        assert blocks_asked(client) > asked

    def test_can_be_cancelled_on_another_thread(self, client: Client) -> None:
        pending = client.open_layout(SMALL).begin_lookup(STORED, lease_ttl_s=NEVER_S)
        thread = threading.Thread(target=pending.cancel)
        thread.start()

        assert error_of(pending) is LeaseExpired
        thread.join()
        until_leases_are(client, 0)

    def test_releases_the_lease_that_was_polled_and_leaves_the_ticket(
        self, client: Client, daemon: DaemonProcess
    ) -> None:
        pending = client.open_layout(SMALL).begin_lookup(STORED, lease_ttl_s=NEVER_S, adoptions=1)
        found = result(pending)

        pending.cancel()

        until_leases_are(client, 1)
        with daemon.client() as other, other.open_layout(SMALL).adopt(found.ticket) as adopted:
            compare(adopted, SMALL, STORED)
        assert found.lease.remaining_s == 0


class TestAForkedChild:
    def test_begins_lookups_of_its_own_and_leaves_the_parents_alone(self, client: Client) -> None:
        blocks = client.open_layout(SMALL)
        pending = [blocks.begin_lookup(STORED, lease_ttl_s=NEVER_S)]
        assert pending[0].wait(SOON_S)

        def work() -> int:
            for use in (pending[0].poll, lambda: pending[0].wait(NEVER_S)):
                with pytest.raises(DaemonUnavailable, match=r"before fork.*begin it again"):
                    use()
            pending.pop().cancel()
            found = result(blocks.begin_lookup(STORED))
            compare(found.lease, SMALL, STORED)
            found.lease.release()
            return found.lease.hit_blocks

        assert in_child(work) == 3
        compare(result(pending[0]).lease, SMALL, STORED)

    def test_of_a_process_whose_threads_all_wait_has_threads_of_its_own(
        self, client: Client, daemon: DaemonProcess
    ) -> None:
        blocks = client.open_layout(SMALL)
        with stopped(daemon):
            begun = [blocks.begin_lookup(STORED, timeout_s=NEVER_S) for _ in range(8)]
            with pytest.raises(DeadlineExceeded):
                in_child(lambda: blocks.lookup(STORED, timeout_s=0.1))
        assert in_child(lambda: result(blocks.begin_lookup(STORED)).lease.hit_blocks) == 3
        assert {result(each).lease.hit_blocks for each in begun} == {3}
