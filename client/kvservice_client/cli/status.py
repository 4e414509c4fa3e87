"""``kvctl status``: the daemon's state."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from kvservice_api.errors import BulkUnavailable
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS, Client


def status(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """Show tiers, index, clients and traffic."""
    with connect(address, timeout) as client:
        answer = client.admin.status()
        bulk_port, bulk_refused_because = _bulk(client)
    if as_json:
        bulk = {"bulk_port": bulk_port, "bulk_refused_because": bulk_refused_because}
        output.print_json(output.plain(answer) | bulk)
        return
    console = output.console()
    since = output.age(answer.started_at)
    console.print(
        f"kvservice {answer.version} at {address}: {answer.state}, up {since}, store {answer.store_id.hex()}",
        markup=False,
    )
    console.print(
        f"{answer.blocks:,} blocks of {answer.layouts} layouts, {answer.sessions:,} sessions, "
        f"{answer.clients} clients, {answer.leases} leases, {answer.uploads} uploads"
    )
    asked, hit = (answer.counters[f"lookup_blocks_{name}"] for name in ("asked", "hit"))
    if asked:
        console.print(f"hit rate {hit / asked:.1%}: {hit:,.0f} of {asked:,.0f} blocks that lookups asked for")
    console.print()
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
    if answer.cuda.registrations:
        console.print(
            f"cuda_ipc: GPU memory of {answer.cuda.registrations} workers is open, "
            f"{output.size(answer.cuda.arena_registered_bytes)} of DRAM is registered with CUDA"
        )
    if answer.cuda.failed:
        console.print(f"[bold red]cuda_ipc is not offered any more:[/] {escape(answer.cuda.refused_because)}")
    elif answer.cuda.refused_because:
        console.print(f"cuda_ipc is not offered: {answer.cuda.refused_because}", markup=False)
    if not bulk_port:
        console.print("there is no bulk port: gRPC carries KV bytes between hosts")
    elif bulk_refused_because:
        console.print(f"bulk port {bulk_port}, not used from here: {bulk_refused_because}", markup=False)
    else:
        console.print(f"bulk port {bulk_port}, reached from here")
    if answer.set_aside_extents:
        console.print(
            f"{output.size(answer.set_aside_bytes)} of DRAM in {answer.set_aside_extents} extents are set aside: "
            "clients whose connection ended may still be writing there",
            markup=False,
        )
    counters = output.table("since the start", "", right=("",))
    for name, value in sorted(answer.counters.items()):
        if value:
            counters.add_row(*_counted(name, value))
    if counters.row_count:
        console.print()
        console.print(counters)


def _bulk(client: Client) -> tuple[int, str]:
    """The daemon's bulk port, 0 if it has none, and why this client cannot use it."""
    port = client.capabilities().bulk_port
    try:
        client.check_bulk()
    except BulkUnavailable as error:
        return port, error.message
    return port, ""


def _counted(name: str, value: float) -> tuple[str, str]:
    """A counter in words, and its value with its unit, which the name has as its last word or before ``max``."""
    words = name.replace("_", " ")
    if name.endswith("_bytes"):
        return words, output.size(value)
    if "_ms_" in name:
        return words.replace(" ms ", " "), f"{value:,.1f} ms"
    return words, f"{value:,.0f}"


def _spaces(answer: pb.StatusResponse) -> Table:
    """Used and available space, and what the settings ask for: while a tier is prepared it has less."""
    index, tiers = answer.index, output.tier_statuses(answer)
    columns = ("used", "of", "configured", "share", "blocks")
    spaces = output.table("space", *columns, right=columns)
    for name, tier in tiers.items():
        configured = output.size(tier.configured_bytes) if tier.configured_bytes else "-"
        share = _share(tier.used_bytes, tier.capacity_bytes)
        sizes = (output.size(tier.used_bytes), output.size(tier.capacity_bytes), configured)
        spaces.add_row(name, *sizes, share, f"{tier.blocks:,}")
    for name, used, size in (
        ("index of dram", index.volatile_used_bytes, index.volatile_map_bytes),
        ("index of ssd", index.durable_used_bytes, index.durable_map_bytes),
    ):
        spaces.add_row(name, output.size(used), output.size(size), output.size(size), _share(used, size), "")
    return spaces


def _share(used: int, size: int) -> str:
    return f"{used / size:.1%}" if size else "-"
