"""Arguments that several verbs share."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import typer

from kvservice_api.address import parse_address
from kvservice_api.errors import BlockNotFound, InvalidRequest, KVError, UnknownLayout
from kvservice_api.keys import KEY_BYTES
from kvservice_client.cli.unreachable import why_unreachable
from kvservice_client.client import Client
from kvservice_client.tls import TlsFiles

T = TypeVar("T")

_SPAN_MAX_S = 1e9  # Some thirty years.


def checked_address(text: str) -> str:
    """The address, if a client can connect to it. Wrong usage otherwise."""
    try:
        parse_address(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="KVCTL_ADDRESS",
        help="The daemon: host:port, or the path of a UNIX socket.",
        callback=checked_address,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds that one request may take.")]
TierOption = Annotated[
    str | None, typer.Option("--tier", help="Only this tier: dram, ssd, or the name of a tier below SSD.")
]
LayoutOption = Annotated[
    str,
    typer.Option(
        "--layout", metavar="FINGERPRINT", help="Only blocks of this layout: its fingerprint, or how that begins."
    ),
]
Limit = Annotated[int, typer.Option(min=0, help="Most rows shown; 0 means all.")]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys of stored blocks, or how they begin.")]

_FOUND_MAX = 1000
_DIGITS_MIN = 6  # Fewer would be a slip of the finger.
_BEGINNING = re.compile(f"[0-9a-fA-F]{{{_DIGITS_MIN},{2 * KEY_BYTES}}}")

_PANEL = "TLS, for a daemon at host:port"

_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)")


def seconds(text: str, what: str) -> float:
    """A duration from text such as ``90s``, ``15min``, ``2h`` or ``7d``."""
    found = _SPAN.fullmatch(text.strip())
    span_s = float(found[1]) * _UNITS_S[found[2]] if found else math.inf
    if span_s > _SPAN_MAX_S:
        raise typer.BadParameter(f"{what} {text!r} is not a duration such as 90s, 15min, 2h or 7d")
    return span_s


def first_of(found: Iterator[T], limit: int) -> tuple[list[T], bool]:
    """The first `limit` of them, or all if it is 0; and whether there are more."""
    return list(islice(found, limit or None)), next(found, None) is not None


def _tls_option(flag: str, text: str, metavar: str = "FILE") -> Any:
    return Annotated[
        str, typer.Option(flag, envvar=_variable(flag), metavar=metavar, help=text, rich_help_panel=_PANEL)
    ]


def _variable(flag: str) -> str:
    return f"KVCTL_{flag.removeprefix('--').replace('-', '_').upper()}"


TLS_OPTIONS: dict[str, Any] = {  # Options of every verb that has an --address.
    "tls_ca": _tls_option("--tls-ca", "CA certificates that signed the daemon's certificate; use TLS."),
    "tls_certificate": _tls_option("--tls-certificate", "This client's certificate, if the daemon requires one."),
    "tls_key": _tls_option("--tls-key", "The private key of this client's certificate."),
    "tls_server_name": _tls_option("--tls-server-name", "The name in the daemon's certificate.", "NAME"),
}


VARIABLES = frozenset({_variable("--address"), *(_variable(name) for name in TLS_OPTIONS)})  # Of the environment.

_tls: ContextVar[TlsFiles | None] = ContextVar("tls", default=None)
_connected_to: ContextVar[str] = ContextVar("connected_to", default="")


def with_tls_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with TLS_OPTIONS, if it has an --address. `connect` uses the options, not the verb itself."""
    signature = inspect.signature(verb, eval_str=True)
    if "address" not in signature.parameters:
        return verb

    @functools.wraps(verb)
    def run(**arguments: Any) -> None:
        ca, certificate, key, server_name = (arguments.pop(name) for name in TLS_OPTIONS)
        is_wanted = ca or certificate or key or server_name
        _tls.set(TlsFiles(ca, certificate, key, server_name) if is_wanted else None)
        verb(**arguments)

    def option(name: str, kind: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="", annotation=kind)

    ours = [option(name, kind) for name, kind in TLS_OPTIONS.items()]
    # Typer reads a verb's options from this attribute, as `inspect` does; function types do not declare it.
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *ours])  # type: ignore[attr-defined]
    return run


def connect(
    address: str, timeout_s: float, *, name: str = "kvctl", transport: Literal["auto", "shm", "bulk", "grpc"] = "auto"
) -> Client:
    """A client with the TLS options of the running verb."""
    _connected_to.set(address)
    return Client(address, name=name, timeout_s=timeout_s, tls=_tls.get(), transport=transport)


def uses_tls() -> bool:
    """Whether the clients of `connect` use TLS."""
    return _tls.get() is not None


def why_no_answer() -> str:
    """What to do if the last client of `connect` could not reach the daemon. Tests the connection."""
    return why_unreachable(parse_address(_connected_to.get()), with_tls=uses_tls())


def checked_digits(text: str, what: str) -> str:
    """The digits of 32 bytes, or the first ones of them. Wrong usage otherwise."""
    if not _BEGINNING.fullmatch(text):
        most = 2 * KEY_BYTES
        raise typer.BadParameter(f"{what} {text!r} is not {most} hexadecimal digits, or {_DIGITS_MIN} or more of them")
    return text.lower()


def keys_of(client: Client, texts: Iterable[str]) -> list[bytes]:
    """The keys, of which a text may have the first digits. Raises BlockNotFound, or InvalidRequest if several stored
    blocks have keys that begin so.
    """
    return [
        _only(
            text,
            "stored block's key",
            (block.key for block in client.admin.list_blocks(key_prefix=text)),
            BlockNotFound,
        )
        for text in texts
    ]


def layout_of(client: Client, text: str) -> bytes:
    """The fingerprint, of which the text may have the first digits; empty for an empty text. Raises UnknownLayout, or
    InvalidRequest as `keys_of`.
    """
    if not text:
        return b""
    fingerprints = (each.fingerprint for each in client.admin.list_layouts())
    return _only(text, "layout's fingerprint", fingerprints, UnknownLayout)


def _only(text: str, what: str, found: Iterator[bytes], missing: type[KVError]) -> bytes:
    if len(text) == 2 * KEY_BYTES:
        return bytes.fromhex(text)
    begins = (each for each in found if each.hex().startswith(text))  # An older daemon lists all.
    different = list(dict.fromkeys(islice(begins, _FOUND_MAX)))[:3]  # One per shard is found.
    if not different:
        raise missing(f"no {what} begins with {text}")
    if len(different) > 1:
        raise InvalidRequest(f"more than one {what} begins with {text}, such as {', '.join(map(bytes.hex, different))}")
    return different[0]
