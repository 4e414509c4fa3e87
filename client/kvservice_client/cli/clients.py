"""``kvctl clients``: who is attached to the daemon."""

from __future__ import annotations

from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Limit, Timeout, connect, first_of
from kvservice_client.client import DEFAULT_ADDRESS


def clients(
    limit: Limit = 100, address: Address = DEFAULT_ADDRESS, timeout: Timeout = 5.0, as_json: AsJson = False
) -> None:
    """List attached clients, the one that attached first at the top."""
    with connect(address, timeout) as client:
        listed, has_more = first_of(client.admin.list_clients(), limit)
    if as_json:
        output.print_json({"clients": [output.plain(each) for each in listed], "has_more": has_more})
        return
    columns = ("client", "number", "attached", "leases", "leased blocks", "queued requests")
    rows = output.table(*columns, right=columns[1:])
    for each in listed:
        rows.add_row(
            each.name,
            str(each.number),
            output.age(each.attached_at),
            str(each.leases),
            str(each.leased_blocks),
            str(each.queued_requests) if each.sends_hints else "-",
        )
    console = output.console()
    console.print(rows if listed else "no client is attached")
    if has_more:
        console.print(f"... and more; --limit 0 shows all, {limit} are shown")
