"""Addresses of a daemon: ``host:port``, ``[IPv6]:port``, or the path of a UNIX socket. One rule for all programs.

    parse_address("10.0.0.7:7070")            TcpAddress("10.0.0.7", 7070)
    parse_address("[::1]:7070")               TcpAddress("::1", 7070)
    parse_address("/run/kv/kvservice.sock")   UnixAddress("/run/kv/kvservice.sock")
    parse_address("unix:kvservice.sock")      UnixAddress("kvservice.sock")

Nothing is looked up: a host name that does not exist is a valid address.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import quote

SOCKET_PATH_BYTES_MAX = 107  # What Linux allows, less the zero byte at the end.
_PORT_MAX = 65535

_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\.?\Z")
_NUMBERS = re.compile(r"([^.]*\.)*([0-9]+|0[xX][0-9A-Fa-f]*)\.?\Z")  # No name ends in a number: RFC 1123, URL standard.
_PORT = re.compile(r"[0-9]{1,5}\Z")

_RULE = (
    "an address is host:port (127.0.0.1:7070, kv.example.org:7070, [::1]:7070) "
    "or the path of a UNIX socket (/run/kvservice.sock, ./kvservice.sock, unix:kvservice.sock)"
)
_TCP_RULE = "an address to listen on is host:port, such as 127.0.0.1:7070, 0.0.0.0:7070 or [::1]:7070"
_SOCKET_RULE = "a UNIX socket to listen on is named by its path, such as /run/kvservice.sock or ./kvservice.sock"


class TcpAddress(NamedTuple):
    """A host and a port. `host` is a name or an IP address, IPv6 without its brackets."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it. Of names, only ``localhost`` is known."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def target(self) -> str:
        """The address as gRPC takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """The path of a UNIX socket, absolute or relative to the working directory."""

    path: str

    @property
    def target(self) -> str:
        """The address as gRPC takes it: a URI, so what has a meaning in URIs is escaped."""
        return f"unix:{quote(self.path)}"


Address = TcpAddress | UnixAddress


def parse_address(text: object) -> Address:
    """The address that a client connects to. Raises ValueError, whose message has the rule and examples."""
    with _refused(text, _RULE):
        text = _text(text)
        if text.startswith("unix:"):
            return _unix(text.removeprefix("unix:"))
        if "/" in text and "://" not in text:
            if re.match(r"[^/]+:[0-9]+/", text):
                raise ValueError("nothing may follow the port")
            return _unix(text)
        return _tcp(text, port_min=1)


def parse_listen_address(text: object) -> TcpAddress:
    """A TCP address that a daemon listens on; port 0 takes any free port. Raises ValueError, with the rule."""
    with _refused(text, _TCP_RULE):
        return _tcp(_text(text), port_min=0)


def parse_listen_socket(text: object) -> UnixAddress:
    """A UNIX socket that a daemon listens on: its path, with or without ``unix:``. Raises ValueError, with the rule."""
    with _refused(text, _SOCKET_RULE):
        return _unix(_text(text).removeprefix("unix:"))


@contextmanager
def _refused(text: object, rule: str) -> Iterator[None]:
    """One message for all that is no address: what it is, the reason, and the rule."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_shown(text)} is not an address: {error}; {rule}") from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it is of type {type(value).__name__}, not text")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _tcp(text: str, *, port_min: int) -> TcpAddress:
    if not text:
        raise ValueError("it is empty")
    if "://" in text:
        raise ValueError("it is a URL: leave the scheme out")
    host, separator, port = text.rpartition(":")
    if not separator or port.endswith("]"):
        raise ValueError("it has no port")
    if not _PORT.match(port) or not port_min <= int(port) <= _PORT_MAX:
        raise ValueError(f"a port is a number from {port_min} to {_PORT_MAX}")
    return TcpAddress(_host(host), int(port))


def _host(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1]
        try:
            ipaddress.IPv6Address(inner)
        except ValueError:
            raise ValueError("what stands in the brackets is not an IPv6 address") from None
        return inner
    if ":" in text:
        raise ValueError("an IPv6 address stands in brackets")
    if not text:
        raise ValueError("it has no host")
    if _NUMBERS.match(text):
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            raise ValueError("its host is not an IPv4 address") from None
    elif not _NAME.match(text):
        raise ValueError("its host is not a host name of ASCII letters, digits, dots and hyphens")
    return text


def _unix(path: str) -> UnixAddress:
    if not path or path.endswith("/"):
        raise ValueError("it names no socket")
    if not path.isprintable():
        raise ValueError("its path has characters that cannot be printed")
    if len(path.encode(errors="surrogateescape")) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"the path of a socket has at most {SOCKET_PATH_BYTES_MAX} bytes")
    return UnixAddress(path)
