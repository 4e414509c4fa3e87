"""TLS contexts that read ahead, where the C extension can set that; elsewhere they are as `ssl` makes them."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvservice_api import copying
from kvservice_api.tls_contexts import new_context
from tests.certificates import Authority

Make = Callable[[int], ssl.SSLContext]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    certificate, key = Authority().issue().write(tmp_path)
    return str(certificate), str(key)


@pytest.fixture
def reading_ahead() -> None:
    if copying.native is None or "/libssl.so.3" not in Path("/proc/self/maps").read_text():
        pytest.skip("needs the C extension, and an OpenSSL 3 that Python loads as a library")


@contextmanager
def connected(
    certificate: tuple[str, str], of_client: ssl.SSLContext, of_daemon: ssl.SSLContext
) -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    of_daemon.load_cert_chain(*certificate)
    of_daemon.num_tickets = 0
    of_client.check_hostname, of_client.verify_mode = False, ssl.CERT_NONE
    near, far = socket.socketpair()
    accepted: list[ssl.SSLSocket] = []
    shaking = threading.Thread(target=lambda: accepted.append(of_daemon.wrap_socket(far, server_side=True)))
    shaking.start()
    with of_client.wrap_socket(near) as client:
        shaking.join()
        with accepted[0] as daemon:
            yield client, daemon


def is_readable(one: socket.socket) -> bool:
    readable = select.poll()
    readable.register(one, select.POLLIN)
    return bool(readable.poll(0))


def reads_ahead(certificate: tuple[str, str], of_client: ssl.SSLContext) -> bool:
    """Whether the read of a byte takes another record from the socket, too."""
    with connected(certificate, of_client, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) as (client, daemon):
        for record in (b"some", b"more"):
            daemon.sendall(record)
        assert client.recv(4) == b"some"
        has_taken_it = not is_readable(client)
        assert client.recv(4) == b"more"
        return has_taken_it


@pytest.mark.usefixtures("reading_ahead")
@pytest.mark.parametrize("is_client", [True, False])
def test_a_read_takes_the_records_that_have_come(certificate: tuple[str, str], is_client: bool) -> None:
    of_client = new_context(ssl.PROTOCOL_TLS_CLIENT)
    with connected(certificate, of_client, new_context(ssl.PROTOCOL_TLS_SERVER)) as pair:
        reader, writer = pair if is_client else pair[::-1]
        for record in (b"a" * 16384, b"b" * 16000):
            writer.sendall(record)
        assert is_readable(reader)
        assert reader.recv(1) == b"a"
        assert not is_readable(reader)
        for record in (b"c" * 16384, b"d"):
            writer.sendall(record)
        expected, rest = b"a" * 16383 + b"b" * 16000 + b"c" * 16384 + b"d", b""
        while len(rest) < len(expected):
            rest += reader.recv(1 << 16)
        assert rest == expected


@pytest.mark.usefixtures("reading_ahead")
def test_other_contexts_of_the_process_are_left_alone(certificate: tuple[str, str]) -> None:
    assert reads_ahead(certificate, new_context(ssl.PROTOCOL_TLS_CLIENT))
    assert not reads_ahead(certificate, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


@pytest.mark.usefixtures("reading_ahead")
def test_contexts_that_threads_make_at_the_same_time_all_read_ahead(certificate: tuple[str, str]) -> None:
    made: dict[int, list[ssl.SSLContext]] = {0: [], 1: []}

    def make(kind: int) -> None:
        one: Make = new_context if kind else ssl.SSLContext
        made[kind] += [one(ssl.PROTOCOL_TLS_CLIENT) for _ in range(20)]

    threads = [threading.Thread(target=make, args=(number % 2,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(reads_ahead(certificate, each) for each in made[1])
    assert not any(reads_ahead(certificate, each) for each in made[0])


@pytest.mark.usefixtures("implementation")
def test_a_context_verifies_as_the_one_of_ssl() -> None:
    made, expected = new_context(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert made.verify_mode == ssl.CERT_REQUIRED and made.check_hostname
    assert made.verify_flags == expected.verify_flags
    assert (made.minimum_version, made.maximum_version) == (expected.minimum_version, expected.maximum_version)
    assert (made.options, made.get_ciphers()) == (expected.options, expected.get_ciphers())


@pytest.mark.usefixtures("implementation")
def test_the_reason_why_no_context_was_made_is_raised() -> None:
    with pytest.raises(ValueError, match="protocol"):
        new_context(99)


def test_the_extension_makes_no_guess_if_several_contexts_were_made(certificate: tuple[str, str]) -> None:
    if copying.native is None:
        pytest.skip("the C extension is not built here")
    made = [ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)]

    def two() -> ssl.SSLContext:
        made[:] = [ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)]
        return made[0]

    assert copying.native.read_ahead(two, 1 << 16) is made[0]
    assert not any(reads_ahead(certificate, each) for each in made)
    assert copying.native.read_ahead(lambda: None, 1 << 16) is None
    with pytest.raises(ValueError, match="negative"):
        copying.native.read_ahead(two, -1)
