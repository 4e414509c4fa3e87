"""``kvctl evict``: drop blocks from one tier."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Keys, Timeout, checked_digits, connect, keys_of
from kvservice_client.client import DEFAULT_ADDRESS


def evict(
    keys: Keys,
    tier: Annotated[str, typer.Option(help="The tier to drop them from: dram, ssd, or the name of a tier below SSD.")],
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Drop blocks from one tier. Leased and busy ones stay."""
    wanted = [checked_digits(key, "key") for key in keys]
    with connect(address, timeout) as client:
        result = client.evict(keys_of(client, wanted), tier)
    if as_json:
        output.print_json(result._asdict())
    else:
        print(f"evicted {result.evicted} from {tier}, {result.held} are in use, {result.missing} were not stored")
