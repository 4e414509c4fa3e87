"""The results of one run as Markdown: tables, and the goals with what became of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.report import cpu, markdown_table, now


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that must be at least `least`, or at most `most`."""

    text: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool:
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    @property
    def row(self) -> tuple[str, str, str, str]:
        limit = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        return self.text, limit, f"{self.value:.3f}", "met" if self.is_met else "missed"


@dataclass(slots=True)
class Part:
    """One table with what was done. `errors` say which of its measurements failed, and why."""

    title: str
    about: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note an error, and print at once where it occurred, so that the other measurements are made.

        An interrupt is noted, and raised.
        """
        try:
            yield
        except Exception as error:
            self.errors.append(f"{what}: {type(error).__name__}: {error}")
            traceback.print_exc()
        except BaseException as error:
            self.errors.append(f"{what}: {type(error).__name__}")
            raise

    def markdown(self) -> list[str]:
        lines = [f"#### {self.title}", "", self.about, ""]
        if self.rows:
            lines += [*markdown_table(self.columns, self.rows), ""]
        return [*lines, *(f"Not measured: {error}\n" for error in self.errors)]


def page(parts: Sequence[Part], machine: str, commit: str, command: str) -> str:
    """The whole section."""
    lines = ["### The GPU path", "", f"Commit {commit}, {now()}, {cpu()}. {machine} Reproduce with `{command}`.", ""]
    for part in parts:
        lines += part.markdown()
    goals = [goal for part in parts for goal in part.goals]
    if goals:
        lines += ["#### Goals", "", *markdown_table(("Measure", "Goal", "Figure", ""), [goal.row for goal in goals])]
    return "\n".join(lines).rstrip()
