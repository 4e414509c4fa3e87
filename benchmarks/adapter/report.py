"""One measurement's figures: as an object for programs, as a table for people."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table, where_and_when, write_section


@dataclass(frozen=True, slots=True)
class Figure:
    name: str  # With its unit last: prefill_ms.
    value: float | bool
    goal: str = ""  # "at least 0.3"; empty if there is none.
    note: str = ""

    @property
    def text(self) -> str:
        return str(self.value).lower() if isinstance(self.value, bool) else f"{self.value:.4g}"


@dataclass(slots=True)
class Section:
    """The results of one measurement. `about` says in some sentences what was done."""

    name: str
    title: str
    about: str
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, value: float | bool, goal: str = "", note: str = "") -> None:
        self.figures.append(Figure(name, value, goal, note))

    def __getitem__(self, name: str) -> float:
        return next(figure.value for figure in self.figures if figure.name == name)

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        for figure in found["figures"]:
            if not math.isfinite(figure["value"]):  # Nothing was measured; JSON has no NaN.
                figure["value"] = None
        return found

    def markdown(self, command: str) -> str:
        rows = [(f"`{each.name}`", each.text, each.goal, each.note) for each in self.figures]
        head = [f"### {self.title}", "", f"{where_and_when()} Reproduce with `{command}`.", "", self.about, ""]
        return "\n".join([*head, *markdown_table(("Measure", "Figure", "Goal", ""), rows)])

    def write_into(self, path: Path, command: str) -> None:
        write_section(path, f"adapter bench {self.name}", self.markdown(command))
