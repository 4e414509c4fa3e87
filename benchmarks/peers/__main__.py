"""``python -m benchmarks.peers``: KVService beside Redis, LMCache, Mooncake and NIXL, and beside this machine's limits.

Each round puts blocks that are new, reads them back, and compares every byte, with each system in turn; the order
rotates from round to round. What was measured is kept in `.peers/results.json`, and the table has all of it: so the
groups may be measured one at a time. Figures are compared with those of the same run only. Systems whose environment is
missing (`python -m benchmarks.peers.environments`) are named in the table as skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import leftovers
from benchmarks.peers import report
from benchmarks.peers.environments import FOLDER
from benchmarks.peers.results import NoResults, Results, groups_of
from benchmarks.peers.rounds import Outcome, run
from benchmarks.peers.systems import CLIENTS, GROUPS, MIB, SIZES, Group, System, named
from benchmarks.report import check_folder, check_least, check_page

_QUICK_BYTES = 32 * MIB


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [group.name for group in GROUPS]
    made.add_argument("--group", action="append", choices=names, help="measure this one; all if none is given")
    made.add_argument("--only", metavar="NAMES", help="these systems, with commas, and the limits; nothing is kept")
    made.add_argument("--clients", type=int, action="append", choices=CLIENTS, help="so many clients; 1 and 4")
    sizes = [size // MIB for size in SIZES]
    made.add_argument("--size", type=int, action="append", choices=sizes, help="blocks of so many MiB; all sizes")
    made.add_argument("--rounds", type=int, default=7, help="of which the medians are shown, after one more; 7")
    made.add_argument("--quick", action="store_true", help="blocks of 4 MiB, 32 MiB in all, one round; nothing is kept")
    made.add_argument("--directory", type=Path, help="a folder on the disk to measure; the system's temporary one")
    made.add_argument("--results", type=Path, default=FOLDER / "results.json", help="where the figures are kept")
    made.add_argument("--report", action="store_true", help="measure nothing: write what is kept")
    made.add_argument("--write", type=Path, metavar="FILE", help="also write the table into this Markdown file")
    made.add_argument("--plot", type=Path, metavar="FILE", help="also draw the speeds into this SVG file")
    made.add_argument("--json", action="store_true", help="print the figures for programs")
    return made


def main() -> int:
    """Measure, print and write."""
    parsing = parser()
    given = parsing.parse_args()
    groups = groups_of(given.group or [group.name for group in GROUPS])
    try:
        only = named([name for name in given.only.split(",") if name]) if given.only else set()
    except ValueError as error:
        parsing.error(f"--only: {error}")
    measured_here = {system.name for group in groups for system in group.systems}
    if only and not only & measured_here:
        parsing.error(f"--only: the groups that are measured have {', '.join(sorted(measured_here))}")
    check_page(parsing, "--write", given.write)
    check_page(parsing, "--plot", given.plot)
    if given.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parsing.error("--plot needs matplotlib")
    if given.directory is not None:
        check_folder(parsing, "--directory", given.directory)
    check_least(parsing, "--rounds", given.rounds)
    leftovers.begin(given.directory)
    is_kept = not given.quick and not only  # The systems of a kept table were measured in the same minutes.
    try:
        results = Results.read(given.results) if is_kept else Results()
        if is_kept and not given.report:
            results.save(given.results)  # Now, not after the first measurements.
    except (NoResults, OSError) as error:
        parsing.error(f"--results: {error}")
    if given.report and not results.cells:
        parsing.error(f"--report: {given.results} has no figures yet; without --report they are measured")
    command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    sizes = [size * MIB for size in given.size or ([4] if given.quick else [size // MIB for size in SIZES])]
    for group in [] if given.report else groups:
        chosen = replace(group, bytes_moved=_QUICK_BYTES) if given.quick else group
        systems = [system for system in group.systems if not only or system.kind == "limit" or system.name in only]
        if only and not any(system.name in only for system in systems):
            continue
        print(f"{group.title}: {', '.join(system.name for system in systems)}", file=sys.stderr, flush=True)

        results.begin(chosen, command)

        def keep(outcome: Outcome, group: Group = chosen, systems: Sequence[System] = systems) -> None:
            results.add(group, outcome, systems)
            if is_kept:
                results.save(given.results)

        keep(
            run(
                chosen,
                systems=systems,
                clients=given.clients or ((1,) if given.quick else CLIENTS),
                sizes=sizes,
                rounds=1 if given.quick else given.rounds,
                directory=given.directory,
                keep=keep,
            )
        )
    if given.plot is not None:
        report.draw(results, given.plot)
    if given.write is not None:
        report.write(results, given.write, given.plot)
    print(json.dumps(results.as_json()) if given.json else report.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
