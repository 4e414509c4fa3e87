"""``kvctl discard``: drop blocks everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_client.cli import output
from kvservice_client.cli.options import (
    Address,
    AsJson,
    LayoutOption,
    Timeout,
    checked_digits,
    connect,
    keys_of,
    layout_of,
)
from kvservice_client.client import DEFAULT_ADDRESS


def discard(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Keys of blocks, or how those of stored blocks begin."),
    ] = None,
    layout: LayoutOption = "",
    everything: Annotated[bool, typer.Option("--everything", help="All blocks of all layouts.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before many blocks are dropped.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Drop blocks from every tier: by key, all of one layout, or everything."""
    if sum([bool(keys), bool(layout), everything]) != 1:
        raise typer.BadParameter("give keys, --layout or --everything, and only one of them")
    wanted = [checked_digits(key, "key") for key in keys or ()]
    digits = checked_digits(layout, "layout") if layout else ""
    if not (wanted or yes):
        what = f"all blocks of layout {layout}" if layout else "all blocks"
        typer.confirm(f"Drop {what} at {address}?", abort=True, err=True)
    with connect(address, timeout) as client, output.progress() as progress:
        if wanted:
            answer = client.admin.discard(keys_of(client, wanted))
        else:
            total = client.admin.status().blocks if everything else None
            task = progress.add_task("discarding", total=total)
            answer = client.admin.discard_all(
                layout_of(client, digits) or None, lambda count: progress.update(task, completed=count)
            )
    if as_json:
        output.print_json(output.plain(answer))
    else:
        print(f"discarded {answer.discarded}" + (f", {answer.missing} were not stored" if wanted else ""))
