"""The bulk port with TLS: the daemon's certificate, clients' certificates, and tickets that are bound to them."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvservice_api.bulk import PREFACE
from kvservice_api.errors import TransferEnded
from tests.certificates import Authority, Pair, replace
from tests.daemon import DaemonProcess
from tests.integration.bulk_wire import BulkSocket, Received, checksums_of, open_load, open_save, read_load
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain
from tests.integration.wire import Upload, Wire


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("client")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[DaemonProcess]:
    """One that asks clients for certificates."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = authority.issue().write(folder)
    process = DaemonProcess(
        folder / "daemon",
        tls__certificate=certificate,
        tls__key=key,
        tls__client_ca=replace(folder / "clients.pem", authority.certificate),
    ).start()
    yield process
    process.remove()


@pytest.fixture
def wire(daemon: DaemonProcess, authority: Authority, pair: Pair) -> Iterator[Wire]:
    with Wire(daemon.address, grpc.ssl_channel_credentials(authority.certificate, pair.key, pair.certificate)) as wire:
        wire.attach()
        wire.open_layout(LARGE)
        wire.open_layout(SMALL)
        yield wire


def encrypted(wire: Wire, authority: Authority, pair: Pair | None, folder: Path) -> BulkSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.certificate.decode())
    if pair is not None:
        context.load_cert_chain(*pair.write(folder, "shown"))
    connection = BulkSocket(wire, b"")
    try:
        connection.socket = context.wrap_socket(connection.socket, server_hostname="localhost")
        connection.socket.sendall(PREFACE)
    except OSError:
        connection.socket.close()
        raise
    return connection


def test_a_load_and_a_save_are_encrypted(wire: Wire, authority: Authority, pair: Pair, tmp_path: Path) -> None:
    chain = new_chain(LARGE, 30)
    opened = open_save(wire, LARGE, chain)
    with encrypted(wire, authority, pair, tmp_path) as connection:
        connection.hello(*opened.tickets)
        for layer, slices in enumerate(layers_of(LARGE, chain)):
            connection.put(layer, 0, np.concatenate(slices).tobytes())
        connection.commit(checksums_of(LARGE, chain, opened.blocks))
        assert connection.result().stored == 30
        received = Received(LARGE, chain)
        read_load(connection.hello(*open_load(wire, LARGE, chain)), received)
    assert received.is_right()


def test_a_ticket_is_of_use_only_with_the_certificate_that_opened_it(
    wire: Wire, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    chain = new_chain(SMALL, 2)
    wire.save(Upload.of(wire, SMALL, chain).messages())
    (ticket,) = open_load(wire, SMALL, chain)
    with encrypted(wire, authority, authority.issue("another client"), tmp_path) as stranger:
        assert isinstance(stranger.hello(ticket).error(), TransferEnded)
    received = Received(SMALL, chain)
    with encrypted(wire, authority, pair, tmp_path) as owner:
        read_load(owner.hello(ticket), received)
    assert received.is_right()


def test_no_plain_byte_and_no_stranger_gets_an_answer(wire: Wire, authority: Authority, tmp_path: Path) -> None:
    with BulkSocket(wire) as plain:
        assert plain.is_closed()
    for pair in (None, Authority("another CA").issue("client")):
        with pytest.raises((ssl.SSLError, ConnectionError)), encrypted(wire, authority, pair, tmp_path) as stranger:
            stranger.receive(1)  # With TLS 1.3 a client learns of it after its own handshake.


def test_handshakes_that_stop_hold_up_no_other(wire: Wire, authority: Authority, pair: Pair, tmp_path: Path) -> None:
    chain = new_chain(SMALL, 2)
    wire.save(Upload.of(wire, SMALL, chain).messages())
    stopped = [BulkSocket(wire, b"\x16\x03\x01\x02\x00") for _ in range(20)]  # The first bytes of a handshake.
    received = Received(SMALL, chain)
    with encrypted(wire, authority, pair, tmp_path) as connection:
        read_load(connection.hello(*open_load(wire, SMALL, chain)), received)
    assert received.is_right()
    for each in stopped:
        each.socket.close()
