"""``kvctl policy``: show and switch the policy that decides which blocks are in which tier."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS

_NAMES = "lru, fifo, s3fifo, lookahead or foresight"


def policy(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help=f"Use this one until the restart: {_NAMES}.", show_default=False)
    ] = "",
    shadow: Annotated[
        str, typer.Option("--shadow", metavar="NAME", help="Run this one beside it without effect; none ends that.")
    ] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show which policy decides what stays in DRAM and on SSD, and what it knows; switch it; compare another one.

    A shadow is a model: it shows for the same requests what another policy would have had in DRAM. Leave it on for as
    long as sessions take to return, then read its answer.
    """
    with connect(address, timeout) as client:
        answer = client.admin.set_policy(name, shadow)
    if as_json:
        output.print_json(output.plain(answer))
        return
    print(f"policy {answer.policy}, since {output.when(answer.since)}")
    if answer.configured != answer.policy:
        print(f"  the configuration says {answer.configured} (mover.policy): a restart begins with that")
    if answer.items:
        print(f"  knows {answer.items} items of {answer.blocks} blocks; queued requests read {answer.queued_items}")
        print(f"  its last ranking took {answer.ranking_ms:.1f} ms, its last look {answer.look_ms:.1f} ms")
        unused = f"{answer.read_ahead_unused:.0%} of the blocks left DRAM unused"
        print(f"  read ahead on a guess: {output.size(answer.read_ahead_bytes)}, {unused}")
    else:
        print(f"  knows {answer.blocks} blocks")
    if answer.HasField("shadow"):
        _print_shadow(answer)


def _print_shadow(answer: pb.SetPolicyResponse) -> None:
    shadow = answer.shadow
    print(f"shadow {shadow.policy}, since {output.when(shadow.since)}: {shadow.requests} requests")
    columns = ("all in dram", "found in dram", "on ssd only", "missing", "read ahead")
    table = output.table("", *columns, right=columns)
    for name, found in ((answer.policy, shadow.real), (f"{shadow.policy}, modelled", shadow.shadow)):
        sizes = (found.dram_bytes, found.ssd_bytes, found.missing_bytes, found.read_ahead_bytes)
        table.add_row(f"  {name}", f"{found.requests_in_dram} requests", *map(output.size, sizes))
    output.console().print(table)
