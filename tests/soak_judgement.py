"""What a soak is judged by: figures that grow, heartbeats that are late, and how much was moved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.event_loop import LateBeat

SLOPE_MAX_PER_H = 0.01
LATE_S, LATE_P99_S = 0.02, 0.01
PACE_MIN = 0.7  # Of the limit, what each tenth of the time must reach.

# The figures that could grow, and their least step. Less than a step is not judged: Python's allocator takes
# memory by the MiB, and there is no half of a file.
STEPS = {"private_mib": 1.0, "shared_mib": 1.0, "files": 1.0, "threads": 1.0, "leases": 1.0}
_TENDS = 23  # Kendall's S of ten values: without a trend it is as high in one series of 40.


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    private_mib: float
    shared_mib: float
    files: float
    threads: float
    leases: float
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one figure, from the least values in tenths of the time: not every sample has what is used for a moment."""

    per_h: float  # Of its mean: the median of the slopes between any two tenths, which a few odd values do not move.
    total: float  # In its own unit, from the middle of the first three tenths to that of the last three.
    tendency: int  # Kendall's S: how many pairs of tenths rise, less those that fall. At most 45.

    def is_too_fast(self, step: float) -> bool:
        """More than the goal, by more than a step, and by a trend that is no coincidence."""
        return self.per_h > SLOPE_MAX_PER_H and self.total > step and self.tendency >= _TENDS


def growth(samples: Sequence[Sample], name: str) -> Growth:
    parts = [part for part in np.array_split(np.arange(len(samples)), 10) if len(part)]
    least = [min((samples[at] for at in part), key=lambda each: float(getattr(each, name))) for part in parts]
    values = np.array([getattr(each, name) for each in least], np.float64)
    hours = np.array([each.at_s for each in least]) / 3600
    first, second = np.triu_indices(len(least), 1)
    if not len(first):
        return Growth(0.0, 0.0, 0)
    rises = values[second] - values[first]
    per_h = float(np.median(rises / (hours[second] - hours[first]))) / max(values.mean(), 1.0)
    return Growth(per_h, float(np.median(values[-3:]) - np.median(values[:3])), int(np.sign(rises).sum()))


@dataclass(slots=True)
class Soak:
    """Everything that was seen, and what is wrong with it."""

    limit_bytes_per_s: float
    samples: list[Sample]
    beats: int  # Heartbeats in all.
    late: list[LateBeat]
    paused_share: float  # Of the time, how long the host gave no processor.
    orders: int
    cold: int  # Orders whose blocks were evicted before.
    missed: int
    judges_growth: bool  # What a trial grows by in some minutes says nothing about an hour.
    leases_max: int
    growths: dict[str, Growth] = field(init=False)
    rates: list[float] = field(init=False)  # In tenths of the time, of the limit.

    def __post_init__(self) -> None:
        settled = self.samples[len(self.samples) // 3 :]
        self.growths = {name: growth(settled, name) for name in STEPS}
        tenth = max(1, len(self.samples) // 10)
        parts = [(self.samples[at], self.samples[at + tenth]) for at in range(0, len(self.samples) - tenth, tenth)]
        self.rates = [
            (last.moved_bytes - first.moved_bytes) / (last.at_s - first.at_s) / self.limit_bytes_per_s
            for first, last in parts
        ]

    def problems(self) -> list[str]:
        """A sentence for each goal that was missed."""
        found = list[str]()
        if min(self.rates) < PACE_MIN:
            found.append(f"a tenth of the time moved {min(self.rates):.2f} of the limit: the goal is {PACE_MIN}")
        if not self.cold:
            found.append("nothing was read from SSD")
        if self.missed > 0.05 * self.orders:
            found.append(f"{self.missed} of {self.orders} orders were misses: SSD did not keep up")
        # That of an operation, and one whose release is under way.
        if max(each.leases for each in self.samples) > self.leases_max:
            found.append(f"{max(each.leases for each in self.samples):g} leases at one time")
        if self.judges_growth:
            found += [
                f"{name} grows by {grown.per_h:.1%} per hour ({grown.total:.1f} in the last two thirds)"
                for name, grown in self.growths.items()
                if grown.is_too_fast(STEPS[name])
            ]
        if late := [each for each in self.late if each.charged_s > LATE_S]:
            worst = max(late, key=lambda each: each.charged_s)
            found.append(f"{len(late)} of {self.beats} heartbeats were later than 20 ms, the worst: {worst}")
        if (over := sum(each.charged_s > LATE_P99_S for each in self.late)) > 0.01 * self.beats:
            found.append(f"{over} of {self.beats} heartbeats, more than 1 %, were later than 10 ms")
        return found

    def summary(self) -> str:
        def counts(*delays_s: float) -> str:
            longest = max(delays_s, default=0.0)
            bounds = (LATE_P99_S, LATE_S)
            over = ", ".join(f"{sum(each > bound for each in delays_s)} > {bound * 1e3:g} ms" for bound in bounds)
            return f"{over}, longest {longest * 1e3:.1f} ms"

        return "\n".join(
            [
                f"limit {self.limit_bytes_per_s / 1e9:.2f} GB/s, of it in tenths of the time: "
                + " ".join(f"{each:.2f}" for each in self.rates),
                f"{self.orders} orders, {self.cold} of them evicted before, {self.missed} misses",
                "per hour: "
                + ", ".join(f"{name} {grown.per_h:+.2%} (S {grown.tendency})" for name, grown in self.growths.items()),
                f"in the end: {self.samples[-1]}",
                f"{self.beats} heartbeats; their delay: {counts(*(each.late_s for each in self.late))}",
                f"  without pauses of the host, judged: {counts(*(each.charged_s for each in self.late))}",
                f"  without waits for processors: {counts(*(each.own_s for each in self.late))}",
                f"  without both: {counts(*(each.own_s - each.paused_s for each in self.late))}",
                f"the host gave no processor for {self.paused_share:.1%} of the time",
            ]
        )

    def write(self, path: Path) -> None:
        """Everything as JSON: the samples and the late heartbeats as series."""
        path.write_text(json.dumps({"problems": self.problems(), **asdict(self)}, indent=1))
