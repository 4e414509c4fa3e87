"""``kvctl scrub``: verify everything that is stored."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, TierOption, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS


def scrub(
    tier: TierOption = None,
    mib_per_second: Annotated[int, typer.Option(min=0, help="Reading speed; 0 means the daemon's setting.")] = 0,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 7 * 86400.0,
    as_json: AsJson = False,
) -> None:
    """Read and verify all blocks, and drop damaged ones. Exit code 1 if there was damage."""
    last = pb.ScrubResponse()
    with connect(address, timeout) as client, output.progress() as progress:
        task = progress.add_task("scrubbing", total=None)
        for last in client.admin.scrub(tier, mib_per_second * 2**20, timeout):
            speed = f"scrubbing ({output.size(last.bytes_checked)}, {last.damaged} damaged)"
            progress.update(task, description=speed, total=last.blocks_total, completed=last.blocks_checked)
    if as_json:
        output.print_json(output.plain(last))
    else:
        checked = f"{last.blocks_checked} copies of blocks, {output.size(last.bytes_checked)}"
        dropped = "; their blocks are dropped from every tier" if last.damaged else ""
        print(f"checked {checked}: {last.damaged} damaged{dropped}")
    if last.damaged:
        raise typer.Exit(1)
