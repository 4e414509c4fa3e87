"""What ``kvservice check`` found: its problems, per tier what was verified, and the lines that say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Problem:
    """`key` is an object's (block key and shard), a layout's fingerprint, a session's name in the index, or empty."""

    tier: str
    key: str
    what: str


@dataclass(slots=True)
class TierReport:
    """`not_checked` says why a tier was skipped; the other fields are then zero."""

    not_checked: str = ""
    blocks: int = 0
    bytes_checked: int = 0
    capacity_bytes: int = 0
    used_bytes: int = 0
    free_bytes: int = 0


@dataclass(slots=True)
class Report:
    """What a check found, and what its repair did."""

    store: str
    store_id: str = ""
    layouts: int = 0
    sessions: int = 0
    tiers: dict[str, TierReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    repaired: int = 0
    given_up: list[str] = field(default_factory=list)  # What was lost with the missing SSD files.
    made_anew: list[str] = field(default_factory=list)  # What was replaced by its salvaged content.
    notes: list[str] = field(default_factory=list)  # What a new index lacks, and what an interrupted repair left.

    def lines(self) -> Iterator[str]:
        """The report for people."""
        yield f"store    {self.store}, id {self.store_id or 'unknown'}"
        yield f"layouts  {self.layouts}, sessions {self.sessions}"
        for name, tier in self.tiers.items():
            if tier.not_checked:
                yield f"{name:<8} not checked: {tier.not_checked}"
                continue
            yield (
                f"{name:<8} {tier.blocks} blocks, {_mib(tier.bytes_checked)} verified; {_mib(tier.used_bytes)} of "
                f"{_mib(tier.capacity_bytes)} used, {_mib(tier.free_bytes)} free"
            )
        for problem in self.problems:
            yield f"problem  {problem.tier} {problem.key}{': ' if problem.key else ''}{problem.what}"
        for what in self.given_up:
            yield f"given up {what}"
        for what in self.made_anew:
            yield f"made new {what}"
        for what in self.notes:
            yield f"note     {what}"
        if not self.problems:
            yield "clean" if not self.made_anew else "a new index was made; what it has is clean"
        else:
            yield f"{len(self.problems)} problems found, {self.repaired} repaired"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
