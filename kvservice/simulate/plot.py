"""Plots of results. matplotlib is an optional dependency: only the functions that draw import it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvservice.simulate.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")

_BOUNDS = ("none", "ages-only", "ages-and-answers", "optimum", "infinite")  # Drawn as dashed lines.


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def against_capacity(
    file: Path, lines: Sequence[tuple[str, Sequence[Result]]], capacities_gb: Sequence[float], *, tier: str, title: str
) -> None:
    """Plot one line per policy over a tier's capacities in GiB: hits on time, hits, and times to first token.

    `lines` are (name, one result per capacity). Raises OSError if `file` cannot be written.
    """
    panels: list[tuple[str, str]] = [
        ("dram_on_time", "in DRAM on time, of turns with history"),
        ("hit_rate_history", "in DRAM or on SSD, of turns with history"),
        ("ttft_p50_s", "time to first token, p50 (s)"),
        ("ttft_p99_s", "time to first token, p99 (s)"),
        ("service_ttft_p50_s", "the same without the queue, p50 (s)"),
        ("service_ttft_p99_s", "the same without the queue, p99 (s)"),
    ]
    series = [
        (text, [(name, [getattr(each, field) for each in results]) for name, results in lines])
        for field, text in panels
    ]
    draw(file, series, capacities_gb, f"{'DRAM' if tier == 'dram' else 'SSD'} (GiB)", title)


def draw(
    file: Path,
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[float]]]]],
    x: Sequence[float],
    x_label: str,
    title: str,
) -> None:
    """Draw panels in rows of two. A panel has a label and lines `(name, y)` over `x`, with `x` at equal distances.

    Raises OSError if `file` cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    # No random ids and no date, so that the same results give the same file.
    with rc_context({"svg.hashsalt": "kvservice", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.5, 0.6 + 3.2 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title)
        handles: list[Any] = []
        for place, (label, lines) in enumerate(panels):
            axes = figure.add_subplot(rows, min(2, len(panels)), place + 1)
            handles = [_line(axes, name, y) for name, y in lines]
            _finish(axes, label, x, x_label)
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
        metadata = {"Date": None} if file.suffix == ".svg" else {"CreationDate": None} if file.suffix == ".pdf" else {}
        figure.savefig(file, metadata=metadata)


def _line(axes: Axes, name: str, y: Sequence[float]) -> Any:
    (line,) = axes.plot(
        range(len(y)), y, marker="o", markersize=3, linestyle="--" if name in _BOUNDS else "-", label=name
    )
    return line


def _finish(axes: Axes, label: str, x: Sequence[float], x_label: str) -> None:
    axes.set_title(label, fontsize=9)
    axes.set_xticks(range(len(x)), [f"{value:g}" for value in x])
    axes.set_xlabel(x_label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
