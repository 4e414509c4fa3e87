"""``kvctl sessions``: the sessions that the daemon stores."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_client.cli import output
from kvservice_client.cli.options import (
    Address,
    AsJson,
    LayoutOption,
    Limit,
    Timeout,
    checked_digits,
    connect,
    first_of,
    layout_of,
)
from kvservice_client.client import DEFAULT_ADDRESS


def sessions(
    session: Annotated[str, typer.Argument(metavar="[SESSION]", help="Only this id; without it, all.")] = "",
    layout: LayoutOption = "",
    limit: Limit = 100,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """List sessions, one row per session and layout, in the order of their creation."""
    digits = checked_digits(layout, "layout") if layout else ""
    with connect(address, timeout) as client:
        found = client.admin.list_sessions(session, layout_of(client, digits))
        listed, has_more = first_of(found, limit)
    if as_json:
        without = ("slices",)  # Lists have no slices.
        documents = [{k: v for k, v in output.plain(each).items() if k not in without} for each in listed]
        output.print_json({"sessions": documents, "has_more": has_more})
        return
    numbers = ("tokens", "slices", "tail", "cuts", "revision", "used", "expires in")
    columns = ("session", "layout", "tokens", "slices", "tail", "cuts", "revision", "used", "expires in")
    rows = output.table(*columns, right=numbers)
    for each in listed:
        rows.add_row(
            each.session_id,
            each.layout_fingerprint.hex()[:8],
            str(each.token_count),
            str(each.slice_count),
            str(each.tail_tokens),
            str(each.cuts),
            str(each.revision),
            output.age(each.used_at),
            output.ahead(each.expires_at),
        )
    console = output.console()
    console.print(rows if listed else "there are no sessions")
    if has_more:
        console.print(f"... and more; --limit 0 shows all, {limit} are shown")
