"""``kvctl status``: the daemon's state."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS


def status(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """Show tiers, index, clients and traffic."""
    with connect(address, timeout) as client:
        answer = client.admin.status()
    if as_json:
        output.print_json(output.plain(answer))
        return
    console = output.console()
    since = output.age(answer.started_at)
    console.print(
        f"kvservice {answer.version} at {address}: {answer.state}, up {since}, store {answer.store_id.hex()}",
        markup=False,
    )
    console.print(
        f"{answer.blocks} blocks of {answer.layouts} layouts, {answer.clients} clients, "
        f"{answer.leases} leases, {answer.uploads} uploads\n"
    )
    if answer.hint_streams:
        console.print(f"{answer.queued_requests} queued requests of {answer.hint_streams} clients that send hints\n")
    console.print(_spaces(answer))
    for name, tier in output.tier_statuses(answer).items():
        if tier.short_because:
            sizes = f"{output.size(tier.capacity_bytes)} instead of {output.size(tier.configured_bytes)}"
            console.print(
                f"[yellow]{name.upper()} is smaller than configured, {sizes}:[/] {escape(tier.short_because)}"
            )
        if tier.refusing_because:
            console.print(f"[bold red]{name.upper()} takes no new blocks:[/] {escape(tier.refusing_because)}")
    if answer.set_aside_extents:
        console.print(
            f"{output.size(answer.set_aside_bytes)} of DRAM in {answer.set_aside_extents} extents are set aside: "
            "clients whose connection ended may still be writing there",
            markup=False,
        )
    counters = output.table("since the start", "", right=("",))
    for name, value in sorted(answer.counters.items()):
        if value:
            counters.add_row(name, f"{value:,.15g}")
    if counters.row_count:
        console.print()
        console.print(counters)


def _spaces(answer: pb.StatusResponse) -> Table:
    """Used and available space."""
    index, tiers = answer.index, output.tier_statuses(answer)
    spaces = output.table("space", "used", "of", "share", "blocks", right=("used", "of", "share", "blocks"))
    for name, used, capacity, blocks in (
        *((name, tier.used_bytes, tier.capacity_bytes, str(tier.blocks)) for name, tier in tiers.items()),
        ("index of dram", index.volatile_used_bytes, index.volatile_map_bytes, ""),
        ("index of ssd", index.durable_used_bytes, index.durable_map_bytes, ""),
    ):
        share = f"{used / capacity:.1%}" if capacity else "-"
        spaces.add_row(name, output.size(used), output.size(capacity), share, blocks)
    return spaces
