"""``kvctl top``: a daemon's current activity."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded
from kvservice_api.interrupts import interruptible
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS, Client

_RATES = (
    "load_blocks load_bytes located_blocks located_bytes save_blocks_stored save_bytes save_blocks_refused "
    "evicted_dram_blocks evicted_ssd_blocks lost_unwritten_blocks promoted_blocks promoted_bytes "
    "written_behind_blocks written_behind_bytes quarantined_blocks storage_errors"
).split()
_SHOWN = (  # Activity, counter of blocks, counter of bytes.
    ("loads by stream", "load_blocks", "load_bytes"),
    ("read in place", "located_blocks", "located_bytes"),
    ("saves", "save_blocks_stored", "save_bytes"),
    ("saves refused", "save_blocks_refused", ""),
    ("promoted to dram", "promoted_blocks", "promoted_bytes"),
    ("written to ssd", "written_behind_blocks", "written_behind_bytes"),
    ("evicted from dram", "evicted_dram_blocks", ""),
    ("evicted from ssd", "evicted_ssd_blocks", ""),
)


_BAR_WIDTH_MIN = 8


@dataclass(frozen=True, slots=True)
class StatusDelta:
    """The changes between two samples."""

    status: pb.StatusResponse
    per_second: dict[str, float]
    hit_ratio: float | None  # None if there were no lookups.

    @classmethod
    def between(cls, before: pb.StatusResponse, after: pb.StatusResponse, elapsed_s: float) -> StatusDelta:
        """If the daemon was restarted meanwhile, the changes since its start."""
        old = before.counters if before.boot_epoch == after.boot_epoch else {}

        def grown(name: str) -> float:
            return after.counters[name] - old.get(name, 0.0)

        asked = grown("lookup_blocks_asked")
        ratio = grown("lookup_blocks_hit") / asked if asked else None
        return cls(after, {name: grown(name) / elapsed_s for name in _RATES}, ratio)

    def as_json(self) -> dict[str, Any]:
        status = output.plain(self.status)
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **{name: status[name] for name in "state dram ssd blocks clients leases uploads".split()},
            "per_second": {name: round(value, 3) for name, value in self.per_second.items()},
            "hit_ratio": None if self.hit_ratio is None else round(self.hit_ratio, 4),
            "event_loop_delay_ms": self.status.counters["event_loop_delay_ms_recent"],
            "event_loop_delay_ms_max": self.status.counters["event_loop_delay_ms_max"],
        }


def top(
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two samples.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Number of samples; 0 means until interrupted.")] = 0,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show the daemon's current activity, repeatedly. With --json one line per sample."""
    with connect(address, timeout) as client, suppress(KeyboardInterrupt), interruptible():
        if as_json:
            for view in _views(client, interval, count):
                print(json.dumps(view.as_json()), flush=True)
        else:
            _watch(client, address, interval, count)


def _views(client: Client, interval_s: float, count: int) -> Iterator[StatusDelta]:
    before, before_s = client.admin.status(), time.monotonic()
    number = 0
    while not count or number < count:
        time.sleep(interval_s)  # The requested number of samples is reached.
        after, after_s = client.admin.status(), time.monotonic()
        yield StatusDelta.between(before, after, after_s - before_s)
        before, before_s = after, after_s
        number += 1


def _watch(client: Client, address: str, interval_s: float, count: int) -> None:
    """On a terminal the samples replace each other, also over a restart of the daemon. Elsewhere only the last is
    shown.
    """
    is_terminal = sys.stdout.isatty()  # There a sample has to fit, or the next one cannot replace it.
    screen = Console(highlight=False) if is_terminal else output.console()
    with Live(console=screen, auto_refresh=False, transient=False) as live:
        shown = 0
        while not count or shown < count:
            try:
                for view in _views(client, interval_s, count - shown if count else 0):
                    live.update(_picture(view, address, screen.width), refresh=True)
                    shown += 1
            except (DaemonUnavailable, DeadlineExceeded) as error:
                if not shown:
                    raise
                live.update(f"[bold red]{escape(error.message)}[/]", refresh=True)
                time.sleep(interval_s)  # The daemon may answer again at the next sample.


def _picture(view: StatusDelta, address: str, width: int) -> RenderableType:
    """What one sample shows, in lines of at most `width` characters; 40 are enough."""
    status = view.status
    delay = f"{status.counters['event_loop_delay_ms_recent']:.1f} ms"
    hits = "-" if view.hit_ratio is None else f"{view.hit_ratio:.1%}"
    head = (
        f"kvservice {status.version} at {escape(address)}: [bold]{status.state}[/], up {output.age(status.started_at)}"
    )
    counts = (
        f"{status.blocks} blocks, {status.clients} clients, {status.leases} leases, {status.uploads} uploads, "
        f"hit ratio {hits}, event loop late by at most {delay}"
    )
    parts: list[RenderableType] = [head, counts, "", _tiers(status, width), "", _rates(view)]
    for name, tier in output.tier_statuses(status).items():
        if tier.refusing_because:
            parts.append(f"[bold red]{name.upper()} takes no new blocks:[/] {escape(tier.refusing_because)}")
    return Group(*parts)


def _tiers(status: pb.StatusResponse, width: int) -> Table:
    tiers = {name: tier for name, tier in output.tier_statuses(status).items() if tier.capacity_bytes}
    shares = {name: tier.used_bytes / tier.capacity_bytes for name, tier in tiers.items()}
    columns = {
        "tier": list(tiers),
        "used": [output.size(tier.used_bytes) for tier in tiers.values()],
        "of": [output.size(tier.capacity_bytes) for tier in tiers.values()],
        "blocks": [f"{tier.blocks:,}" for tier in tiers.values()],
        "share": [f"{share:.1%}" for share in shares.values()],
    }
    free = width - sum(1 + max(map(len, [name, *cells])) for name, cells in columns.items())
    if free < 0:
        del columns["share"]
    table = output.table(*columns, right=("used", "of", "blocks", "share"))
    if free > _BAR_WIDTH_MIN:
        table.add_column("")
    for row, share in zip(zip(*columns.values(), strict=True), shares.values(), strict=True):
        bars = [ProgressBar(1.0, share, width=min(30, free))] if free > _BAR_WIDTH_MIN else []
        table.add_row(*row, *bars)
    return table


def _rates(view: StatusDelta) -> Table:
    table = output.table("per second", "blocks", "bytes", right=("blocks", "bytes"))
    for what, blocks, size in _SHOWN:
        table.add_row(what, f"{view.per_second[blocks]:,.1f}", output.size(view.per_second[size]) if size else "")
    return table
