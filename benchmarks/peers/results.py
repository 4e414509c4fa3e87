"""The figures of a run, kept in a file, so that groups may be measured one after another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.peers.rounds import Measured, Outcome
from benchmarks.peers.systems import GROUPS, Group, System
from benchmarks.report import commit, cpu, now

DIRECTIONS = ("put", "get")
_GOAL_BYTES = 4 << 20  # Blocks smaller than this have no goal.
# Our get, the in-process cache's get beside it, and the goal. The first three compare gets of one kind. In the last one
# a load copies every byte, and the cache reads one byte of each page.
_BESIDE_CACHE = (
    ("view", "local-view", "in place, viewed before: at least the in-process cache's speed in place"),
    ("first-view", "local-view", "in place, first view: at least the in-process cache's speed in place"),
    ("shm", "local-cpu", "a load's speed: at least the in-process cache's, copied out"),
    ("shm", "local-view", "a load's speed: at least the in-process cache's in place, every page touched"),
)


@dataclass
class Cell:
    """One system, clients, size and direction of a group. Speeds in GB/s (10^9 bytes)."""

    gbps: float
    cpu_s_per_gb: float
    rounds: int
    run: int = 0  # Its place in the runs of the group.


class NoResults(Exception):
    """A file has no results. Says why."""


@dataclass
class Results:
    """Of each group: cells by (system, clients, size, direction), why systems were skipped, and its runs.

    Cells are compared with those of the same run only: another one may have been of another commit and machine.
    """

    cells: dict[str, dict[tuple[str, int, int, str], Cell]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    runs: dict[str, list[str]] = field(default_factory=dict)  # Commit, time, machine and command of each.

    def begin(self, group: Group, command: str) -> None:
        """What is added from now on is of a new run."""
        about = f"Commit {commit()}, {now()}, {cpu()}; {group.bytes_moved >> 20} MiB in all for each figure. "
        about += f"Reproduce with `{command}`."
        self.runs.setdefault(group.name, []).append(about)

    def add(self, group: Group, outcome: Outcome, measured: Iterable[System]) -> None:
        """Replace what was known of these systems, where it was measured again.

        A system that was skipped now has no cells of earlier runs any more.
        """
        run = len(self.runs[group.name]) - 1
        cells = self.cells.setdefault(group.name, {})
        for key in [key for key, cell in cells.items() if key[0] in outcome.skipped and cell.run != run]:
            del cells[key]
        skipped = self.skipped.setdefault(group.name, {})
        for system in measured:
            skipped.pop(system.name, None)
        skipped.update(outcome.skipped)
        for each in outcome.measured:
            cells[_key(each)] = Cell(each.gbps, each.cpu_s_per_gb, len(each.seconds), run)

    def limit(self, group: Group, run: int, clients: int, size: int, direction: str) -> float | None:
        """The fastest of the group's limits in this run."""
        limits = self._of(group, "limit", run, clients, size, direction).values()
        return max((cell.gbps for cell in limits), default=None)

    def goals(self, group: Group) -> list[tuple[str, str, str]]:
        """Each goal, how many cells meet it and which peers are not in it, and the cell that is farthest from it."""
        directions = ("get",) if group.name == "ssd" else DIRECTIONS
        cells = self.cells.get(group.name, {})
        speed, cpu_time = _Goal(), _Goal()
        of_ours = [system.name for system in group.systems if system.kind == "ours"]
        for clients, size, direction, in_place in product(
            sorted({key[1] for key in cells}),
            sorted({key[2] for key in cells if key[2] >= _GOAL_BYTES}),
            directions,
            (False, True),
        ):
            measured = [(name, clients, size, direction) for name in of_ours]
            runs = [cells[key].run for key in measured if key in cells]
            if not runs:
                continue
            at = (max(runs), clients, size, direction)
            ours = list(self._of(group, "ours", *at, in_place=in_place).values())
            peers = self._of(group, "peer", *at, in_place=in_place)
            limit = self.limit(group, *at)
            if not ours or limit is None:
                continue
            fastest = max(ours, key=lambda cell: cell.gbps)
            where = _where(direction, size, clients) + (", in place" if in_place else "")
            missing = _missing(group, peers, in_place=in_place)
            if not peers:
                continue
            best = max(cell.gbps for cell in peers.values())
            wanted = {"remote": min(1.2 * best, 0.9 * limit), "same-host": best, "ssd": 1.2 * best}[group.name]
            speed.add(fastest.gbps / wanted, where, missing)
            thriftiest = min(cell.cpu_s_per_gb for cell in peers.values())
            cpu_time.add(thriftiest / max(fastest.cpu_s_per_gb, 1e-9), where, missing)
        wanted_speed = {
            "remote": "1.2 x the best peer, or 0.9 x the limit if that is less",
            "same-host": "the best peer",
            "ssd": "1.2 x the best peer",
        }[group.name]
        found = [
            (f"speed: at least {wanted_speed}", *speed.summary()),
            ("CPU seconds per GB: at most the thriftiest peer's", *cpu_time.summary()),
        ]
        if group.name == "same-host":
            found += self._beside_cache(group)
        return found

    def _beside_cache(self, group: Group) -> list[tuple[str, str, str]]:
        cells, found = self.cells.get(group.name, {}), []
        for ours, theirs, title in _BESIDE_CACHE:
            goal = _Goal()
            for (name, clients, size, direction), cell in cells.items():
                other = cells.get((theirs, clients, size, direction))
                if (name, direction) != (ours, "get") or size < _GOAL_BYTES or other is None or other.run != cell.run:
                    continue
                goal.add(cell.gbps / other.gbps, _where(direction, size, clients), set())
            found.append((title, *goal.summary()))
        return found

    def _of(
        self, group: Group, kind: str, run: int, clients: int, size: int, direction: str, *, in_place: bool = False
    ) -> dict[str, Cell]:
        """By system."""
        cells = self.cells.get(group.name, {})
        found = {}
        for system in group.systems:
            cell = cells.get((system.name, clients, size, direction))
            if system.kind == kind and system.is_in_place == in_place and cell is not None and cell.run == run:
                found[system.name] = cell
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            group: {
                "runs": self.runs[group],
                "skipped": self.skipped[group],
                "measured": [
                    {
                        **dict(zip(("system", "clients", "block_bytes", "direction"), key, strict=True)),
                        "gbps": round(cell.gbps, 4),
                        "cpu_s_per_gb": round(cell.cpu_s_per_gb, 4),
                        "rounds": cell.rounds,
                        "run": cell.run,
                    }
                    for key, cell in cells.items()
                ],
            }
            for group, cells in self.cells.items()
        }

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Empty if there is no such file. Raises NoResults if it has something else."""
        found = cls()
        try:
            for group, of_group in json.loads(path.read_text()).items() if path.exists() else ():
                found.runs[group], found.skipped[group] = of_group["runs"], of_group["skipped"]
                found.cells[group] = {
                    (each["system"], each["clients"], each["block_bytes"], each["direction"]): Cell(
                        each["gbps"], each["cpu_s_per_gb"], each["rounds"], each["run"]
                    )
                    for each in of_group["measured"]
                }
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise NoResults(
                f"{path} has no figures of this program ({type(error).__name__}: {error}): "
                "name another file, or delete it"
            ) from error
        return found


def _key(measured: Measured) -> tuple[str, int, int, str]:
    return measured.system, measured.clients, measured.block_bytes, measured.direction


def _where(direction: str, size: int, clients: int) -> str:
    return f"{direction} of {size >> 20} MiB, {clients} client{'s' if clients > 1 else ''}"


def _missing(group: Group, peers: Mapping[str, Cell], *, in_place: bool) -> set[str]:
    """The peers that would be compared, and were not measured."""
    wanted = {system.name for system in group.systems if system.kind == "peer" and system.is_in_place == in_place}
    return wanted - set(peers)


@dataclass
class _Goal:
    found: list[tuple[float, str]] = field(default_factory=list)  # Of the goal; of which cell.
    missing: set[str] = field(default_factory=set)

    def add(self, ratio: float, where: str, missing: set[str]) -> None:
        self.found.append((ratio, where))
        self.missing |= missing

    def summary(self) -> tuple[str, str]:
        if not self.found:
            return "not measured", ""
        ratio, where = min(self.found)
        met = f"{sum(ratio >= 1 for ratio, _ in self.found)} of {len(self.found)}"
        without = f", without {', '.join(sorted(self.missing))}" if self.missing else ""
        return met + without, f"{ratio:.2f} of it: {where}"


def groups_of(names: Iterable[str]) -> list[Group]:
    wanted = set(names)
    return [group for group in GROUPS if group.name in wanted]
