"""Shared by the measuring programs: their arguments, and Markdown pages in which each run replaces its own section."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from kvservice import __version__


def parser_of(program: str, about: str | None, known: Iterable[str], quick: str) -> argparse.ArgumentParser:
    """A parser for the names of runs, `--quick` and `--write`."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all of them if none is given")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the results into this Markdown file")
    return parser


def checked(parser: argparse.ArgumentParser, what: str, known: Sequence[str]) -> argparse.Namespace:
    """The arguments of this process. Ends it with code 2 for an unknown name, and for a page that cannot be written."""
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no {what} is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    check_page(parser, "--write", arguments.write)
    arguments.names = arguments.names or list(known)
    return arguments


def check_page(parser: argparse.ArgumentParser, name: str, path: Path | None) -> None:
    """End the program with code 2 if this argument names a file that cannot be written.

    Called before the measurements, because afterwards they would be lost.
    """
    if path is not None and (why := why_not_writable(path)):
        parser.error(f"{name}: {why}")


def why_not_writable(path: Path) -> str:
    """Why no file can be written there; empty if one can."""
    if path.is_dir():
        return f"{path} is a folder: name a file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}: create it, or name another file"
    place = path if path.exists() else path.parent
    return "" if os.access(place, os.W_OK) else f"{place} may not be written by this user: name another file"


def check_folder(parser: argparse.ArgumentParser, name: str, path: Path) -> None:
    """End the program with code 2 if this argument is no folder."""
    if not path.is_dir():
        parser.error(f"{name}: {path} is no folder")


def check_least(parser: argparse.ArgumentParser, name: str, value: int) -> None:
    """End the program with code 2 if this argument is not at least 1."""
    if value < 1:
        parser.error(f"{name} must be at least 1")


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
        return f"version {__version__}"


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
