"""``kvctl ls``: what is stored."""

from __future__ import annotations

from kvservice_client.cli import output
from kvservice_client.cli.options import (
    Address,
    AsJson,
    LayoutOption,
    Limit,
    TierOption,
    Timeout,
    checked_digits,
    connect,
    first_of,
    layout_of,
)
from kvservice_client.client import DEFAULT_ADDRESS


def ls(
    tier: TierOption = None,
    layout: LayoutOption = "",
    limit: Limit = 100,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """List stored blocks, one row per shard."""
    digits = checked_digits(layout, "layout") if layout else ""
    with connect(address, timeout) as client:
        found = client.admin.list_blocks(tier, layout_of(client, digits))
        blocks, has_more = first_of(found, limit)
    if as_json:
        output.print_json({"blocks": [output.plain(block) for block in blocks], "has_more": has_more})
        return
    numbers = ("tokens", "size", "used", "hits", "leases")
    rows = output.table("key", "layout", "tokens", "size", "tiers", "used", "hits", "leases", right=numbers)
    for block in blocks:
        rows.add_row(
            block.key.hex(),
            block.layout_fingerprint.hex()[:8],
            str(block.token_count),
            output.size(block.size_bytes),
            output.tiers(block),
            output.age(block.used_at),
            str(block.hits),
            str(block.leases),
        )
    console = output.console()
    console.print(rows if blocks else "nothing is stored")
    if has_more:
        console.print(f"... and more; --limit 0 shows all, {limit} are shown")
