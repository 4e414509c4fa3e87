"""One experiment's figures: tables and goals, in a section of its own in a Markdown page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import markdown_table, where_and_when, write_section


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal and its measured figure. `is_met` is None if there is no goal."""

    what: str
    goal: str
    figure: str
    is_met: bool | None


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class Section:
    """The results of one experiment. `about` says in some sentences what was done."""

    name: str
    title: str
    about: str
    goals: list[Goal] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # Names of files beside the page.
    commands: list[str] = field(default_factory=list)  # Commands of `kvctl simulate` for some of the runs.
    notes: list[str] = field(default_factory=list)
    needs_traces: bool = False

    def at_least(self, what: str, value: float, least: float, unit: str = "") -> None:
        self.goals.append(Goal(what, f"at least {least:g}{unit}", f"{_figure(value)}{unit}", value >= least))

    def at_most(self, what: str, value: float, most: float, unit: str = "") -> None:
        self.goals.append(Goal(what, f"at most {most:g}{unit}", f"{_figure(value)}{unit}", value <= most))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.tables.append(Table(title, columns, rows))

    def markdown(self, command: str, seconds: float) -> str:
        lines = [
            f"### {self.title}",
            "",
            f"{where_and_when()} Reproduce with `{command}` ({seconds:.0f} s).",
            "",
            self.about,
            "",
        ]
        if self.goals:
            rows = [(each.what, each.goal, each.figure, _mark(each.is_met)) for each in self.goals]
            lines += [*markdown_table(("", "Goal", "Figure", "Met"), rows), ""]
        for table in self.tables:
            lines += [*([table.title, ""] if table.title else []), *markdown_table(table.columns, table.rows), ""]
        lines += [line for note in self.notes for line in (note, "")]
        if self.commands:
            lines += ["The command of one of these runs:", "", "```sh", *self.commands, "```", ""]
        lines += [f"![{self.title}]({name})" for name in self.pictures]
        return "\n".join(lines).rstrip()

    def write_into(self, page: Path, markdown: str) -> None:
        """Replace the page's section of this experiment, or append it."""
        write_section(page, f"experiment {self.name}", markdown, title="Placement policies")


_LEAST = 5e-4  # Smaller values are shown as 0.


def percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def _figure(value: float) -> str:
    return "-" if not math.isfinite(value) else "0" if abs(value) < _LEAST else f"{value:.4g}"


def _mark(is_met: bool | None) -> str:
    return "" if is_met is None else "yes" if is_met else "**no**"
