"""``kvctl explain``: why a block is where it is, or why a request was a miss."""

from __future__ import annotations

import string
from typing import Annotated

import typer
from rich.console import Console

from kvservice_api.keys import KEY_BYTES
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import output, reasons
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS


def explain(
    what: Annotated[
        str, typer.Argument(metavar="KEY|REQUEST", help="A block's key, 64 hexadecimal digits; or a request's id.")
    ],
    is_request: Annotated[bool, typer.Option("--request", help="It is a request's id, even if it looks else.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Tell where a block is and why, or why it is not there; or what became of a request."""
    if not what:
        raise typer.BadParameter("give a block's key or a request's id", param_hint="KEY|REQUEST")
    answer: pb.ExplainedBlock | pb.ExplainedRequest
    with connect(address, timeout) as client:
        if _is_key(what) and not is_request:
            answer = client.admin.explain_block(bytes.fromhex(what))
        else:
            answer = client.admin.explain_request(what)
    if as_json:
        output.print_json(output.plain(answer))
    elif isinstance(answer, pb.ExplainedBlock):
        _print_block(answer, output.console())
    else:
        _print_request(answer, output.console())


def _is_key(text: str) -> bool:
    return len(text) == 2 * KEY_BYTES and set(text) <= set(string.hexdigits)


def _print_block(block: pb.ExplainedBlock, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False)

    say(f"block {block.key.hex()}")
    if not block.shards:
        say(f"not stored: {reasons.miss(block.miss)}")
    for shard in block.shards:
        stored = shard.block
        part = stored.shard
        say(
            f"stored at {output.when(stored.stored_at)}: layers {part.layer_begin}..{part.layer_end}, "
            f"heads {part.head_begin}..{part.head_end}, {stored.token_count} tokens, {output.size(stored.size_bytes)}"
        )
        for place in shard.places:
            say(f"  {reasons.arrival(place)}")
        if stored.HasField("pinned_until"):
            say(f"  pinned until {output.when(stored.pinned_until)}")
        if stored.leases or shard.holds:
            say(f"  kept in place by {stored.leases} leases and {shard.holds} running transfers")
        say(f"  used last at {output.when(stored.used_at)}, {stored.hits} hits")
    past = block.events if block.shards else block.events[1:]
    for event in past:
        say(f"before: {reasons.event(event)}")


def _print_request(request: pb.ExplainedRequest, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False)

    say(f"request {request.request_id}")
    for lookup in request.lookups:
        layout, shard = lookup.layout, lookup.shard
        say(
            f"lookup at {output.when(lookup.at)} by {lookup.client_name or 'no attached client'}: layout "
            f"{lookup.layout_fingerprint.hex()[:16]} ({f'{layout.model_id} {layout.model_revision}'.strip()}), "
            f"layers {shard.layer_begin}..{shard.layer_end}, heads {shard.head_begin}..{shard.head_end}"
        )
        say(
            f"  {lookup.hit_blocks} of {lookup.asked_blocks} blocks were there: {lookup.hit_blocks_in_dram} in dram, "
            f"{lookup.hit_blocks_on_ssd} on ssd only"
        )
        for load in lookup.loads:
            moved = "in place" if load.in_place else output.size(load.sent_bytes)
            say(
                f"  load of {load.blocks} blocks, {load.layers} layers: {load.outcome}, {moved} in "
                f"{load.took_ms:.1f} ms, {load.blocks_from_dram} blocks from dram, {load.blocks_from_ssd} from ssd"
            )
        if lookup.loads_more:
            say(f"  and {lookup.loads_more} more loads")
        if lookup.HasField("miss"):
            say(f"  the rest was a miss, for block {lookup.miss.key.hex()}:")
            say(f"  {reasons.miss(lookup.miss, lookup.other_layouts)}")
            if lookup.miss.HasField("stored_since"):
                say(f"  it is stored since {output.when(lookup.miss.stored_since)}")
    if request.lookups_more:
        say(f"and {request.lookups_more} more lookups")
