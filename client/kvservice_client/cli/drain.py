"""``kvctl drain``: make a daemon ready for its host to be switched off."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS


def drain(
    undo: Annotated[bool, typer.Option("--undo", help="Accept saves again.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Refuse new saves, and write the blocks that are only in DRAM to SSD. Loads continue.

    Exit code 1 if some blocks are still only in DRAM, or if the drain was undone meanwhile.
    """
    with connect(address, timeout) as client:
        last = client.admin.undo_drain() if undo else _watched(client.admin.drain(timeout))
    if as_json:
        output.print_json(output.plain(last))
    elif undo:
        print("the daemon accepts saves again")
    else:
        print(_summary(last))
    if not undo and (last.blocks_only_in_dram or not last.done):
        raise typer.Exit(1)


def _watched(messages: Iterator[pb.DrainResponse]) -> pb.DrainResponse:
    """The last message; the others are shown as progress."""
    last = pb.DrainResponse()
    try:
        with output.progress() as progress:
            task = progress.add_task("draining", total=None)
            total = 0
            for last in messages:
                total = max(total, last.unwritten)
                what = f"draining ({last.uploads} saves run)" if last.uploads else "draining"
                if last.waiting_because:
                    what = f"draining (waiting: {last.waiting_because})"
                progress.update(task, description=what, total=total or None, completed=total - last.unwritten)
    except KeyboardInterrupt:
        print("kvctl: the daemon continues to drain; `kvctl drain --undo` ends that", file=sys.stderr)
        raise typer.Exit(130) from None
    return last


def _summary(last: pb.DrainResponse) -> str:
    if not last.done:
        return "not drained: the drain was undone meanwhile"
    if not last.blocks_only_in_dram:
        return f"drained: everything is on SSD; {last.loads} loads run"
    left = f"{last.blocks_only_in_dram} blocks ({output.size(last.bytes_only_in_dram)})"
    return f"drained, but {left} are only in DRAM: they survive the daemon's end, not the host's"
