"""``kvctl inspect``: all about one block."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_api.layout import Layout
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, checked_digits, connect, keys_of
from kvservice_client.client import DEFAULT_ADDRESS


def inspect(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="The block's key, or how it begins: 6 to 64 hexadecimal digits.")
    ],
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show one block: its layout, and the place of each of its shards."""
    digits = checked_digits(key, "key")
    with connect(address, timeout) as client:
        answer = client.admin.inspect(keys_of(client, [digits])[0])
    if as_json:
        output.print_json(output.plain(answer))
        return
    console, layout, first = output.console(), answer.layout, answer.shards[0]
    console.print(f"key     {first.key.hex()}")
    console.print(f"parent  {first.parent_key.hex()}")
    console.print(f"layout  {first.layout_fingerprint.hex()}")
    about = Layout.from_proto(layout)
    tokens = f"{about.block_tokens} tokens per block"
    console.print(f"        {about.model_id} {about.model_revision}: {about.layers} layers, {tokens}", markup=False)
    for group in about.groups:
        console.print(
            f"        {group.layers} layers: {group.attention}, {group.kv_heads} KV heads, "
            f"{group.k_head_dim}+{group.v_head_dim} {group.dtype}",
            markup=False,
        )
    console.print()
    numbers = ("tokens", "size", "hits", "leases")
    rows = output.table("layers", "heads", "tokens", "size", "tiers", "stored", "used", "hits", "leases", right=numbers)
    for block in answer.shards:
        rows.add_row(
            f"{block.shard.layer_begin}..{block.shard.layer_end}",
            f"{block.shard.head_begin}..{block.shard.head_end}",
            str(block.token_count),
            output.size(block.size_bytes),
            output.tiers(block),
            f"{output.age(block.stored_at)} ago",
            f"{output.age(block.used_at)} ago",
            str(block.hits),
            str(block.leases),
        )
    console.print(rows)
    for block in answer.shards:
        if block.HasField("pinned_until"):
            console.print(f"pinned until {output.when(block.pinned_until)}")
