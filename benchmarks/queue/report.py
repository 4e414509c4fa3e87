"""The results as a table, and as a picture that needs no other package."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from benchmarks.queue.conversations import Served, Way
from benchmarks.report import markdown_table

_COLUMNS = (
    "Way",
    "mean (s)",
    "p99 (s)",
    "mean, of computing again",
    "p99, of computing again",
    "in DRAM",
    "load (ms)",
)
_BAR, _GAP, _LEFT, _WIDTH = 14, 10, 190, 420  # In pixels.
_COLOURS = {"mean": "#4477aa", "p99": "#bbbbbb"}


class Row(NamedTuple):
    """One way: medians over rounds. Ratios are to the same round of the first way."""

    name: str
    mean_s: float
    p99_s: float
    mean_ratio: float
    p99_ratio: float
    in_dram: float  # Share of requests whose whole stored history was in DRAM when the engine decided to load it.
    load_s: float  # The median load.


def rows_of(results: Mapping[Way, Sequence[Sequence[Served]]]) -> list[Row]:
    """The first way computes everything again."""
    base = None
    rows = []
    for way, rounds in results.items():
        times = [[each.ttft_s for each in served] for served in rounds]
        means, p99s = [statistics.fmean(each) for each in times], [float(np.percentile(each, 99)) for each in times]
        base = base or (means, p99s)
        ratios = [
            statistics.median(own / other for own, other in zip(mine, theirs, strict=True))
            for mine, theirs in zip((means, p99s), base, strict=True)
        ]
        requests = [each for served in rounds for each in served]
        in_dram = statistics.fmean(each.tier == "dram" for each in requests)
        load_s = statistics.median(each.load_s for each in requests)
        mean_s, p99_s = statistics.median(means), statistics.median(p99s)
        rows.append(Row(way.name, mean_s, p99_s, ratios[0], ratios[1], in_dram, load_s))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    return markdown_table(
        _COLUMNS,
        (
            (
                row.name,
                f"{row.mean_s:.2f}",
                f"{row.p99_s:.2f}",
                f"{row.mean_ratio:.3f}",
                f"{row.p99_ratio:.3f}",
                f"{row.in_dram:.0%}",
                f"{row.load_s * 1e3:.0f}",
            )
            for row in rows
        ),
    )


def picture(rows: Sequence[Row], title: str) -> str:
    """An SVG with two bars per way: the mean, and p99."""
    longest = max(row.p99_s for row in rows)
    height = 60 + len(rows) * (2 * _BAR + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 70}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for place, (name, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + place * 80
        parts.append(
            f'<rect x="{x}" y="30" width="10" height="10" fill="{colour}"/><text x="{x + 14}" y="40">{name}</text>'
        )
    for number, row in enumerate(rows):
        top = 50 + number * (2 * _BAR + _GAP)
        parts.append(f'<text x="{_LEFT - 8}" y="{top + _BAR + 4}" text-anchor="end">{escape(row.name)}</text>')
        for place, (seconds, colour) in enumerate(zip((row.mean_s, row.p99_s), _COLOURS.values(), strict=True)):
            y, width = top + place * _BAR, seconds / longest * _WIDTH
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{_LEFT + width + 5:.1f}" y="{y + _BAR - 3}">{seconds:.2f} s</text>')
    return "\n".join([*parts, "</svg>", ""])
