"""Output of the simulator's verbs: tables, one JSON document with ``--json``, and progress on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from threading import Timer
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvservice.simulate.result import Result

_WIDTH = 100_000  # Wider than any row: a terminal breaks the lines that are longer than it is wide.
_SILENT_S = 2.0


def print_json(document: object) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def as_json(result: Result) -> dict[str, Any]:
    """All fields of the result. A value that is not finite is None, because JSON has no infinity."""
    return {name: plain(value) for name, value in asdict(result).items()}


def plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_results(results: Iterable[Result]) -> None:
    """Print one row per result, with the figures that differ between policies."""
    columns = (
        "hits", "of history", "on time", "late", "ssd", "again", "miss", "ttft p50", "p99", "read", "unused",
        "written", "dropped", "queue",
    )  # fmt: skip
    rows = table("policy", *columns, "turns/s", right=(*columns, "turns/s"))
    first = None
    for each in results:
        first = first or each
        rows.add_row(
            each.policy,
            *map(share, (each.hit_rate, each.hit_rate_history, each.dram_on_time, each.dram_late, each.ssd)),
            *map(share, (each.recomputed_hits, each.miss)),
            seconds(each.ttft_p50_s),
            seconds(each.ttft_p99_s),
            size(each.read_gb),
            size(each.promoted_unused_gb),
            size(each.ssd_written_gb),
            size(each.writes_dropped_gb),
            f"{each.queue_p50:.0f}",
            f"{each.turns_simulated_per_s:,.0f}",
        )
    out = console()
    out.print(rows)
    if first is not None:
        out.print(
            f"\n{first.turns:,} turns were measured, {first.turns_with_history:,} of them with history: on time, late, "
            f"ssd and miss are shares of these.\nagain is the share that was on SSD and was computed again, because "
            f"that is faster than a read.\nunused was promoted and evicted before any use. dropped left DRAM before it "
            f"was written to SSD.\nTime to first token is measured from the request, with the queue."
        )


def print_notes(notes: Sequence[str]) -> None:
    """Print one line per note on the load, after an empty line."""
    if notes:
        console().print("\n" + "\n".join(f"Note: {note}" for note in notes), markup=False)


def share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


def seconds(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:,.1f} s"


def size(size_gb: float) -> str:
    return f"{size_gb / 1024:,.1f} TiB" if size_gb >= 1024 else f"{size_gb:.4g} GiB"


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return made


def console() -> Console:
    """For stdout. It neither cuts nor breaks a line."""
    return Console(highlight=False, width=_WIDTH)


class Simulations:
    """Shows what is simulated, on stderr: beside a bar on a terminal. Elsewhere as lines, of a run that takes seconds.

    A context manager.
    """

    def __init__(self, total: int | None) -> None:
        """`total` is the number of simulations; None if it is not known."""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=total)
        self._what = ""
        self._writes_lines = False
        self._timer = Timer(_SILENT_S, self._begin_lines)
        self._timer.daemon = True

    def begins(self, policy: str, dram_gb: float, ssd_gb: float) -> None:
        self._what = f"simulating {policy} with {size(dram_gb)} of DRAM and {size(ssd_gb)} of SSD"
        self._progress.update(self._task, description=self._what)
        if self._writes_lines:
            self._write()

    def ended(self) -> None:
        self._progress.advance(self._task)

    def _begin_lines(self) -> None:
        self._writes_lines = True
        self._write()

    def _write(self) -> None:
        print(f"kvctl: {self._what}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        self._progress.start()
        if self._progress.disable:
            self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        self._progress.stop()
