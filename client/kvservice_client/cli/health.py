"""``kvctl health``: whether the daemon serves, as an exit code."""

from __future__ import annotations

import typer

from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS


def health(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """Exit with 0 while the daemon serves, and with 1 if it drains or does not answer."""
    with connect(address, timeout) as client:
        state = client.admin.status().state
    if as_json:
        output.print_json({"state": state})
    else:
        print(state)
    if state != "serving":
        raise typer.Exit(1)
