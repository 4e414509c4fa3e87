"""Writes measurements into Markdown pages: each run replaces its own section of a page and nothing else."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path


def write_section(path: Path, name: str, markdown: str, *, title: str = "Benchmarks") -> None:
    """Replace the section `name` of the page at `path`, or append it. A page that is missing begins with `title`."""
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    section = f"{begin}\n{markdown}\n{end}"
    text = path.read_text() if path.exists() else f"# {title}\n"
    marked = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    text = marked.sub(lambda _: section, text) if marked.search(text) else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(text)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]


def where_and_when() -> str:
    """The commit, the time and the machine: the first sentence of each section."""
    return f"Commit {commit()}, {now()}, {cpu()}."


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


@cache
def commit() -> str:
    """The commit of this checkout. Read once per process, because the tree may change during a long run."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {metadata.version('kvservice')}"


def cpu() -> str:
    """The processor's model and its number of cores, as Linux names them."""
    model, cores = platform.processor() or platform.machine(), 0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model, cores = line.partition(":")[2].strip(), cores + 1
    except OSError:
        pass
    return f"{model}, {cores} cores" if cores else model
