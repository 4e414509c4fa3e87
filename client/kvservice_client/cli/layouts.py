"""``kvctl layouts``: the layouts that the store knows."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice_api.v1 import types_pb2
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Limit, Timeout, connect, first_of
from kvservice_client.client import DEFAULT_ADDRESS


def layouts(
    limit: Limit = 100, address: Address = DEFAULT_ADDRESS, timeout: Timeout = 5.0, as_json: AsJson = False
) -> None:
    """List layouts, with the blocks that are stored of each."""
    with connect(address, timeout) as client:
        listed, has_more = first_of(client.admin.list_layouts(), limit)
    if as_json:
        output.print_json({"layouts": [output.plain(each) for each in listed], "has_more": has_more})
        return
    columns = ("fingerprint", "model", "dtype", "layers", "heads", "tokens per block", "blocks", "size")
    rows = output.table(*columns, right=columns[3:])
    for each in listed:
        layout = each.layout
        groups: Sequence[types_pb2.LayerGroup | types_pb2.Layout] = layout.groups or [layout]
        rows.add_row(
            each.fingerprint.hex(),
            layout.model_id,
            _each(groups, "dtype"),
            str(sum(group.layers for group in groups)),
            _each(groups, "kv_heads"),
            str(layout.block_tokens),
            str(each.blocks),
            output.size(each.size_bytes),
        )
    console = output.console()
    console.print(rows if listed else "no layout was opened")
    if has_more:
        console.print(f"... and more; --limit 0 shows all, {limit} are shown")


def _each(groups: Sequence[types_pb2.LayerGroup | types_pb2.Layout], field: str) -> str:
    return ", ".join(dict.fromkeys(str(getattr(group, field)) for group in groups))
