"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_api.keys import KEY_BYTES
from kvservice_client.admin import Tier
from kvservice_client.client import Client

Address = Annotated[
    str,
    typer.Option("--address", envvar="KVCTL_ADDRESS", help="The daemon: host:port, or the path of a UNIX socket."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds that one request may take.")]
TierOption = Annotated[Tier | None, typer.Option("--tier", help="Only this tier.")]
LayoutOption = Annotated[str, typer.Option("--layout", metavar="FINGERPRINT", help="Only blocks of this layout.")]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Block keys, 64 hexadecimal digits each.")]


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
