"""Addresses that cannot be listened on, with the setting that names them and the reason."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
from pathlib import Path

from kvservice_api.address import parse_listen_address

log = logging.getLogger(__name__)


class AddressUnusable(RuntimeError):
    """A setting names an address where the daemon cannot listen. The message says which, and why."""

    def __init__(self, setting: str, address: object, why: str) -> None:
        super().__init__(f"{setting} {address}: {why}")


def expect_usable(setting: str, address: str) -> None:
    """Raises AddressUnusable if the daemon cannot listen on this host:port now. Tries it, and closes it again."""
    if why := _tried(address):
        raise AddressUnusable(setting, address, why)


def why_unusable(address: str) -> str:
    """Why gRPC could not listen on this host:port: gRPC itself gives no reason."""
    return _tried(address) or "the address could not be listened on"


def _tried(address: str) -> str:
    """Why a socket cannot listen there; empty if it can."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            *parse_listen_address(address), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        return reason(error)
    return ""


def listen_for_bulk(setting: str, address: str, grpc_port: int) -> socket.socket | None:
    """A bound socket for the bulk port: at `setting`, or beside gRPC's `address` if that is empty.

    None if it is `off`, or if it is empty and something else listens there. Raises AddressUnusable.
    """
    if setting == "off":
        return None
    host, port = parse_listen_address(setting or address)
    if not setting:
        port = port and grpc_port + 1
    elif host not in (parse_listen_address(address).host, "0.0.0.0", "::"):
        log.warning(
            "server.bulk_address %s: clients connect to the bulk port at the host of their gRPC address, and "
            "server.address is %s; those that do not reach it there use gRPC for KV bytes too. Name the host of "
            "server.address, 0.0.0.0 or [::]",
            setting,
            address,
        )
    try:
        return _bound(host, port)
    except (OSError, OverflowError) as error:
        why = reason(error) if isinstance(error, OSError) else "there is no such port"
        if setting:
            raise AddressUnusable("server.bulk_address", setting, why) from error
        log.warning("no bulk transport: port %d, beside server.address: %s; set server.bulk_address", port, why)
        return None


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        return listener
    except BaseException:
        listener.close()
        raise


def reason(error: OSError) -> str:
    """The error for an address: the reason, and the remedy if one is known."""
    if error.errno == errno.EADDRINUSE:
        return "something else listens there; stop it, or name another address"
    return error.strerror or str(error)


class SocketLock:
    """Keeps other daemons from taking a UNIX socket over: making a socket removes an earlier one.

    A lock on a file beside the socket, which the kernel drops when its holder dies, so that the socket
    of a dead daemon is replaced. The file stays. Raises AddressUnusable if a daemon or any other
    program listens on the socket.
    """

    def __init__(self, path: Path) -> None:
        lock = path.with_name(path.name + ".lock")
        try:
            self._fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, f"{lock} cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            expect_no_listener(path)  # Not every program that listens there takes the lock.
        except BlockingIOError:
            os.close(self._fd)
            raise _unusable(path, "another daemon listens there; name another socket, or `off`") from None
        except BaseException:
            os.close(self._fd)
            raise

    def release(self) -> None:
        os.close(self._fd)


def expect_no_listener(path: Path) -> None:
    """Raises AddressUnusable if a program listens on this UNIX socket, or if another kind of file has its path."""
    try:
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return  # Usually there is no file.
    if not is_socket:
        raise _unusable(path, "a file that is not a socket has this path; move it, or name another socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # Non-blocking: a busy listener answers EAGAIN instead of blocking us.
        if probe.connect_ex(str(path)) in (0, errno.EAGAIN):
            raise _unusable(path, "another daemon or another program listens there; stop it, or name another socket")


def _unusable(path: Path, why: str) -> AddressUnusable:
    return AddressUnusable("server.unix_socket", path, why)
