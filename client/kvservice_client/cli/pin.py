"""``kvctl pin``: protect blocks from eviction, for a time."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Keys, Timeout, checked_digits, connect, keys_of, seconds
from kvservice_client.client import DEFAULT_ADDRESS


def pin(
    keys: Keys,
    ttl: Annotated[str, typer.Option(metavar="TIME", help="For how long, such as 90s, 15min, 2h or 7d.")],
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Protect blocks from eviction, also over restarts. Exit code 1 if some of them are not stored."""
    wanted = [checked_digits(key, "key") for key in keys]
    ttl_s = seconds(ttl, "--ttl")
    with connect(address, timeout) as client:
        answer = client.admin.pin(keys_of(client, wanted), ttl_s)
    if as_json:
        output.print_json(output.plain(answer))
    else:
        taken, allowed = output.size(answer.pinned_bytes), output.size(answer.pinned_bytes_max)
        until = output.when(answer.pinned_until)
        print(f"pinned {answer.pinned} until {until}, {answer.missing} were not stored")
        print(f"all pins take {taken} of at most {allowed}")
    if answer.missing:
        raise typer.Exit(1)
