"""Arguments that several verbs share."""

from __future__ import annotations

import math
import re
from typing import Annotated

import typer

from kvservice_api.keys import KEY_BYTES
from kvservice_client.admin import Tier
from kvservice_client.client import Client

_SPAN_MAX_S = 1e9  # Some thirty years.

Address = Annotated[
    str,
    typer.Option("--address", envvar="KVCTL_ADDRESS", help="The daemon: host:port, or the path of a UNIX socket."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds that one request may take.")]
TierOption = Annotated[Tier | None, typer.Option("--tier", help="Only this tier.")]
LayoutOption = Annotated[str, typer.Option("--layout", metavar="FINGERPRINT", help="Only blocks of this layout.")]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Block keys, 64 hexadecimal digits each.")]


_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)")


def seconds(text: str, what: str) -> float:
    """A span of time from text such as ``90s``, ``15min``, ``2h`` or ``7d``."""
    found = _SPAN.fullmatch(text.strip())
    span_s = float(found[1]) * _UNITS_S[found[2]] if found else math.inf
    if span_s > _SPAN_MAX_S:
        raise typer.BadParameter(f"{what} {text!r} is no span of time such as 90s, 15min, 2h or 7d")
    return span_s


def connect(address: str, timeout_s: float) -> Client:
    return Client(address, name="kvctl", timeout_s=timeout_s)


def digest(text: str, what: str) -> bytes:
    """32 bytes from their hexadecimal form."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != KEY_BYTES:
        raise typer.BadParameter(f"{what} {text!r} is not {2 * KEY_BYTES} hexadecimal digits")
    return value
