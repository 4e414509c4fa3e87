"""One group: all of its systems in turns, in an order that rotates from round to round."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.environments import NotInstalled
from benchmarks.peers.processes import Driver, Skipped
from benchmarks.peers.systems import Group, System

_OPEN_S = 90.0
_TURN_S = 60.0


@dataclass
class Measured:
    """One system, number of clients, block size and direction. Lists have one value per round."""

    system: str
    clients: int
    block_bytes: int
    direction: str  # "put" or "get".
    moved_bytes: int
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def gbps(self) -> float:
        return self.moved_bytes / median(self.seconds) / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        return median(self.cpu_s) / self.moved_bytes * 1e9

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "gbps": round(self.gbps, 4), "cpu_s_per_gb": round(self.cpu_s_per_gb, 4)}


@dataclass
class Outcome:
    """What was measured of a group, and why the other systems were not."""

    measured: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def run(
    group: Group,
    *,
    systems: Sequence[System],
    clients: Collection[int],
    sizes: Sequence[int],
    rounds: int,
    directory: Path | None = None,
    keep: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Measure; the first of `rounds` + 1 rounds of each size warms up and does not count.

    `keep` is called after each size with all that was measured so far, so that an interrupted run loses little.

    A system that fails is left out from then on, with what it said; what was measured of it before stays.
    """
    outcome = Outcome()
    with ExitStack() as stack:
        running: dict[str, Driver] = {}
        for system in systems:
            try:
                driver = stack.enter_context(Driver(system, directory))
                driver.start(group.stored_bytes)
            except (Skipped, NotInstalled) as error:
                _skip(outcome, system.name, error)
                continue
            running[system.name] = driver
        for count in clients:
            opened = partial(_open, running, group, count)
            _each(outcome, running, "open", opened)
            for size in sizes:
                _measure(outcome, running, group, count, size, rounds)
                keep(outcome)
    return outcome


def _open(running: dict[str, Driver], group: Group, clients: int, name: str) -> None:
    running[name].ask("open", _OPEN_S, clients=clients, bytes=group.bytes_per_client(clients))


def _measure(outcome: Outcome, running: dict[str, Driver], group: Group, clients: int, size: int, rounds: int) -> None:
    blocks = group.blocks_per_client(size, clients)
    found = {
        (name, direction): Measured(name, clients, size, direction, clients * blocks * size)
        for name in running
        for direction in ("put", "get")
    }
    for number in range(rounds + 1):
        names = list(running)
        first = number % max(1, len(names))

        def turn(name: str, number: int = number) -> None:
            answer = running[name].ask("turn", _TURN_S, name=secrets.token_hex(8), block_bytes=size, blocks=blocks)
            for direction, values in answer.items():
                if number:
                    found[name, direction].seconds.append(values["seconds"])
                    found[name, direction].cpu_s.append(values["cpu_s"])

        _each(outcome, running, f"{size >> 20} MiB, {clients} clients", turn, names[first:] + names[:first])
    outcome.measured += [each for each in found.values() if len(each.seconds) == rounds]


def _each(outcome: Outcome, running: dict[str, Driver], what: str, work: Any, names: Sequence[str] = ()) -> None:
    for name in names or list(running):
        try:
            work(name)
        except Skipped as error:
            _skip(outcome, name, f"at {what}: {error}")
            with suppress(OSError):
                running.pop(name).close()


def _skip(outcome: Outcome, name: str, why: object) -> None:
    outcome.skipped[name] = str(why)
    print(f"{name}: skipped: {why}", file=sys.stderr, flush=True)
