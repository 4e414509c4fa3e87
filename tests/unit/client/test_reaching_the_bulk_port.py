"""How a client reaches the bulk port of its daemon, or finds that it cannot."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kvservice.config_sections import TlsSettings
from kvservice.rpc.tls import read_identity
from kvservice_api.errors import (
    BulkUnavailable,
    TransferEnded,
)
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import TlsFiles
from kvservice_client.retry import Deadline, TransferDeadline
from kvservice_client.transports.bulk import BulkTransport
from kvservice_client.transports.bulk_connections import BulkConnection, BulkConnections, Endpoint, User
from tests.bulk_daemon import BulkDaemon
from tests.bulk_orders import LARGE, ODD, Large, content, order_of, units_of, whole
from tests.certificates import Authority
from tests.clock import ClientClock
from tests.daemon import SOON_S, until


class TestThePort:
    def test_without_a_listener_is_reported_once_and_tried_again_later(self, caplog: pytest.LogCaptureFixture) -> None:
        order, clock = order_of(ODD, [96]), ClientClock()
        with BulkDaemon(units_of(order, content(order))) as daemon:
            daemon.stop_listening()
            transport = BulkTransport(daemon.connection(clock))
            for _ in range(2):
                with pytest.raises(BulkUnavailable, match="cannot be reached"):
                    next(transport.load(order, whole()))
            with pytest.raises(BulkUnavailable):
                transport.check_offered(whole())
            assert len([each for each in caplog.records if "cannot be reached" in each.message]) == 1
            clock.advance(seconds=31)
            transport.check_offered(whole())
            assert not daemon.opened, "a transfer would hold memory until its tickets expire"

    def test_that_refuses_a_new_ticket_is_another_daemons_and_not_used_for_a_while(
        self, connections: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        order, clock = order_of(LARGE, [512] * 4), ClientClock()
        with BulkDaemon(units_of(order, content(order))) as daemon:
            daemon.forgets_tickets = True
            transport = BulkTransport(daemon.connection(clock))
            with pytest.raises(TransferEnded):
                list(transport.load(order, whole()))
            for _ in range(2):
                with pytest.raises(BulkUnavailable, match="leads to another daemon"):
                    list(transport.load(order, whole()))
            assert len([each for each in caplog.records if "another daemon" in each.message]) == 1
            assert len(daemon.opened) == 1
            clock.advance(seconds=31)
            transport.check_offered(whole())
            transport.close()

    def test_that_does_not_answer_costs_a_second_at_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order = order_of(ODD, [96])
        monkeypatch.setattr("kvservice_client.transports.bulk_connections.CONNECT_S", 0.1)
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, BulkDaemon() as daemon:
            port = full.getsockname()[1]
            waiting = [socket.socket() for _ in range(4)]  # They fill the backlog: more connections get no answer.
            for each in waiting:
                each.setblocking(False)
                each.connect_ex(("127.0.0.1", port))
            daemon.port = port
            transport = BulkTransport(daemon.connection())
            begin_s = time.monotonic()
            with pytest.raises(BulkUnavailable):
                next(transport.load(order, whole()))
            assert time.monotonic() - begin_s < SOON_S
            until(lambda: transport._pool._unreachable is not None)
            client: Any = transport._connection
            for layer_s, idle_s in [(0.1, None), (SOON_S, 0.01)]:
                other = BulkTransport(daemon.connection())
                deadline = TransferDeadline(layer_s, client.clock, client.watchdog, idle_s)
                with deadline.layer(), pytest.raises(BulkUnavailable, match="not ready"):
                    next(other.load(order, deadline))
                assert deadline.remaining_s, "the next transport has time left"
                until(lambda other=other: other._pool._unreachable is not None)  # type: ignore[misc]
            for each in waiting:
                each.close()
            assert not daemon.opened

    def test_whose_name_is_found_slowly_is_used_by_the_next_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order, found, real = order_of(ODD, [96]), threading.Event(), socket.getaddrinfo

        def slow(*args: Any, **options: Any) -> Any:
            found.wait(SOON_S)
            return real(*args, **options)

        with BulkDaemon(units_of(order, content(order))) as daemon:
            transport = BulkTransport(daemon.connection())
            monkeypatch.setattr(socket, "getaddrinfo", slow)
            for _ in range(2):
                with pytest.raises(BulkUnavailable, match="not ready"):
                    next(transport.load(order, TransferDeadline(0.1, Deadline(1).clock)))
            found.set()
            until(lambda: bool(transport._pool._idle))
            assert all(map(np.array_equal, transport.load(order, whole()), content(order)))
            assert daemon.accepted == 1
            transport.close()

    def test_that_is_reached_as_its_user_gives_up_is_kept_for_one_transfer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two that shared a connection would read each other's bytes."""
        has_given_up = threading.Event()
        with BulkDaemon() as daemon:
            client = daemon.connection()
            pool = BulkConnections(client, lambda: False)
            connected = pool.connected

            def late(endpoint: Endpoint) -> BulkConnection:
                assert has_given_up.wait(SOON_S)
                return connected(endpoint)

            class Changed(threading.Condition):
                """The thread that connects does all of its work where its user has just looked for a result."""

                looks = 0

                def __exit__(self, *exc: Any) -> None:
                    super().__exit__(*exc)
                    if threading.current_thread() is threading.main_thread():
                        self.looks += 1
                        if self.looks == 2:
                            has_given_up.set()
                            until(lambda: bool(pool._idle))

            user = SimpleNamespace(changed=Changed(), is_over=False, check_not_over=lambda: None)
            monkeypatch.setattr(pool, "connected", late)
            deadline = Deadline(0.1, ClientClock())  # It stands still.
            with pytest.raises(BulkUnavailable, match="not ready"):
                pool.take(pool.endpoint(client.limits(deadline)), deadline, cast(User, user))
            assert len(pool._idle) == 1
            pool.close()

    def test_is_reached_at_the_second_address_of_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order, real = order_of(ODD, [96]), BulkConnection.connect
        limits = []

        def connect(self: BulkConnection, address: Any, context: Any, limit: Deadline) -> None:
            limits.append(limit.allowed_s)
            if len(limits) == 1:
                raise TimeoutError
            real(self, address, context, limit)

        monkeypatch.setattr(BulkConnection, "connect", connect)
        with BulkDaemon(units_of(order, content(order))) as daemon:
            transport = BulkTransport(daemon.connection(ClientClock()))
            both = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", daemon.port))] * 2
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
            assert all(map(np.array_equal, transport.load(order, whole()), content(order)))
            transport.close()
        assert limits == [0.5, 1.0], "each address has its part of the second"

    def test_is_connected_to_again_after_the_daemon_has_closed_or_was_restarted(self, large: Large) -> None:
        daemon, transport, order, layers = large
        assert all(map(np.array_equal, transport.load(order, whole()), layers))
        before = daemon.accepted
        daemon.drop_connections()
        until(lambda: all(each.is_stale for each in transport._pool._idle))
        assert all(map(np.array_equal, transport.load(order, whole()), layers))
        daemon.boot_epoch += 1
        assert all(map(np.array_equal, transport.load(order, whole()), layers))
        assert daemon.accepted == 3 * before

    def test_is_connected_to_again_if_the_tls_files_or_the_daemon_change_while_a_transfer_is_opened(self) -> None:
        order = order_of(ODD, [96])
        layers = content(order)

        class Changing(BulkDaemon):
            def open(self, request: pb.OpenTransferRequest) -> pb.OpenTransferResponse:
                self.boot_epoch = 2
                return super().open(request)

        with Changing(units_of(order, layers)) as daemon:
            transport = BulkTransport(daemon.connection())
            assert all(map(np.array_equal, transport.load(order, whole()), layers))
            assert daemon.accepted == 2
            transport.close()

    def test_with_tls_that_was_reached_too_late_is_used_by_the_next_load(self, tmp_path: Path) -> None:
        """The daemon's certificate context, which sends nothing after the handshake by itself."""
        authority = Authority()
        certificate, key = authority.issue().write(tmp_path)
        ca = authority.write(tmp_path, "ca")
        context = read_identity(TlsSettings(certificate=str(certificate), key=str(key))).context
        order = order_of(ODD, [96])
        layers = content(order)
        with BulkDaemon(units_of(order, layers), context=context) as daemon:
            transport = BulkTransport(daemon.connection(tls=(TlsFiles(ca).read(), "127.0.0.1")))
            pool = transport._pool
            pool.put_back(pool.connected(pool.endpoint(transport._connection.limits(whole()))))
            until(lambda: len(daemon._connections) == 2)  # The second is made after the handshake.
            assert all(map(np.array_equal, transport.load(order, whole()), layers))
            assert daemon.accepted == 1
            transport.close()

    def test_with_tls_shows_the_certificate_of_its_name_or_is_not_used(self, tmp_path: Path, connections: int) -> None:
        authority = Authority()
        pair, mine = authority.issue().write(tmp_path), authority.issue("client").write(tmp_path, "client")
        ca = authority.write(tmp_path, "ca")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*pair)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
        order = order_of(LARGE, [512] * 2)
        layers, contents = content(order), TlsFiles(ca, *mine).read()
        with BulkDaemon(units_of(order, layers), context=context) as daemon:
            transport = BulkTransport(daemon.connection(tls=(contents, "127.0.0.1")))
            for _ in range(2):
                assert all(map(np.array_equal, transport.load(order, whole()), layers))
            assert daemon.accepted == connections
            transport.close()
            other = BulkTransport(daemon.connection(tls=(contents, "kv.example.com")))
            with pytest.raises(BulkUnavailable, match="certificate"):
                next(other.load(order, whole()))
