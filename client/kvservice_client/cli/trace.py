"""``kvctl trace record``: write a live load to a file that ``kvctl simulate`` replays."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvservice_api.errors import Cancelled
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.admin import TRACE_MAX_S
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, checked_digits, connect, layout_of, seconds
from kvservice_client.client import DEFAULT_ADDRESS

VERSION = 1  # Of the file.


def trace(
    action: Annotated[Literal["record"], typer.Argument(metavar="record", help="What to do.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Is created, or replaced.")],
    duration: Annotated[
        str, typer.Option("--for", metavar="TIME", help="Such as 60s or 2h.", show_default="until ctrl-C, at most 30d")
    ] = "",
    layout: Annotated[
        str, typer.Option("--layout", metavar="FINGERPRINT", help="Its turns.", show_default="the first turn's")
    ] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Record the daemon's load for `kvctl simulate --trace FILE`: a line per turn of a conversation, once it has ended.

    A line has the arrival, the tokens of prompt and answer, and the chain of blocks as numbers that are new in every
    recording. It has no tokens, keys, names or ids. `--for`, ctrl-C and the daemon's stop end the recording.
    """
    duration_s = seconds(duration, "--for") if duration else TRACE_MAX_S
    digits = checked_digits(layout, "--layout") if layout else ""
    turns, last = 0, pb.RecordTraceResponse()
    try:
        opened = file.open("a")  # It is emptied once the daemon records.
    except OSError as error:
        print(f"kvctl: {file} cannot be written: {error.strerror}. Name another file.", file=sys.stderr)
        raise typer.Exit(1) from None
    with opened, connect(address, timeout) as client:
        try:
            with output.progress() as progress:
                task = progress.add_task("recording", total=None)
                steps = client.admin.record_trace(layout_of(client, digits), duration_s)
                for count, last in enumerate(steps):
                    if not count and file.is_file():
                        opened.truncate(0)
                    if last.turns and not turns:
                        _write(opened, _header(last.layout))
                    for turn in last.turns:
                        _write(opened, _line(turn))
                    turns += len(last.turns)
                    opened.flush()
                    progress.update(task, description=f"recording ({turns} turns, {last.dropped} dropped)")
        except (KeyboardInterrupt, Cancelled):
            pass  # Turns that run now are not in the file.
    if as_json:
        output.print_json({"file": str(file), "turns": turns, "dropped": last.dropped, "done": last.done})
    else:
        dropped = f"; {last.dropped} more were dropped" if last.dropped else ""
        print(f"recorded {turns} turns in {file}{dropped}")


def _header(layout: pb.RecordedLayout) -> dict[str, Any]:
    return {
        "kvservice_trace": VERSION,
        "block_tokens": layout.block_tokens,
        "kv_bytes_per_token": layout.kv_bytes_per_token,
    }


def _line(turn: pb.RecordedTurn) -> dict[str, Any]:
    return {
        "t": round(turn.arrived_s, 6),
        "prompt_tokens": turn.prompt_tokens,
        "answer_tokens": turn.answer_tokens,
        "hash_ids": list(turn.hash_ids),
    }


def _write(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, separators=(",", ":")) + "\n")
