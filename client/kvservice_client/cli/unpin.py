"""``kvctl unpin``: end the protection of blocks from eviction."""

from __future__ import annotations

from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Keys, Timeout, checked_digits, connect, keys_of
from kvservice_client.client import DEFAULT_ADDRESS


def unpin(keys: Keys, address: Address = DEFAULT_ADDRESS, timeout: Timeout = 30.0, as_json: AsJson = False) -> None:
    """End pins before their time."""
    wanted = [checked_digits(key, "key") for key in keys]
    with connect(address, timeout) as client:
        answer = client.admin.unpin(keys_of(client, wanted))
    if as_json:
        output.print_json(output.plain(answer))
    else:
        print(f"unpinned {answer.unpinned}, {answer.not_pinned} were not pinned, {answer.missing} were not stored")
