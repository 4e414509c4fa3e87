"""Tests the promises of the policies: one experiment per file, each with a ``measure(options)`` that returns a section.

``python -m benchmarks.policies`` runs them and writes their tables into ``docs/policies-experiments.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    quick: bool = False
    traces: Path | None = None  # A folder with traces that are not in the repository.
    pictures: Path | None = None  # Where pictures go; None: none are drawn.


#: In the order of the page.
EXPERIMENTS = (
    "goals",
    "seconds",
    "overload",
    "optimum_gap",
    "tiers",
    "capacity_rule",
    "arrivals",
    "overflow",
    "cost",
    "short_queues",
    "no_queue",
    "typing_events",
    "shared_prefixes",
    "speed",
)
