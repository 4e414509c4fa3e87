"""What the daemon counts, as plain numbers that every module may change: on the event loop's thread.

The metrics read them on other threads. ``Status`` reports the totals that are single numbers, by these names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Durations:
    """A histogram of durations. `observe` takes a third of a microsecond."""

    __slots__ = ("_counts", "bounds_s", "sum_s")

    def __init__(self, bounds_s: Sequence[float] = _BOUNDS_S) -> None:
        """`bounds_s` are the upper bounds of the buckets, ascending; a last bucket has no bound."""
        self.bounds_s = tuple(bounds_s)
        self.sum_s = 0.0
        self._counts = [0] * (len(bounds_s) + 1)

    def observe(self, duration_s: float) -> None:
        self._counts[bisect_left(self.bounds_s, duration_s)] += 1
        self.sum_s += duration_s

    def counts(self) -> list[int]:
        """The number of durations in each bucket. May be called from any thread."""
        return self._counts.copy()


class DurationsBy(dict[tuple[str, ...], Durations]):
    """A histogram per combination of label values."""

    def __missing__(self, labels: tuple[str, ...]) -> Durations:
        made = self[labels] = Durations()
        return made


@dataclass(slots=True)
class Counters:
    """Totals since the daemon's start. ``metrics/table.py`` says what each one counts."""

    lookup_blocks_asked: int = 0
    lookup_blocks_hit: int = 0
    load_blocks: int = 0
    load_bytes: int = 0
    load_tokens: int = 0
    located_blocks: int = 0
    located_bytes: int = 0
    located_tokens: int = 0
    device_blocks: int = 0
    device_bytes: int = 0
    device_tokens: int = 0
    bulk_blocks: int = 0
    bulk_bytes: int = 0
    bulk_tokens: int = 0
    loads_failed: int = 0
    save_blocks_stored: int = 0
    save_blocks_already_stored: int = 0
    save_blocks_refused: int = 0
    save_bytes: int = 0
    saves_abandoned: int = 0
    written_behind_blocks: int = 0
    written_behind_bytes: int = 0
    promoted_blocks: int = 0
    promoted_bytes: int = 0
    read_through_bytes: int = 0
    evicted_dram_blocks: int = 0
    evicted_ssd_blocks: int = 0  # Also from the tiers below SSD.
    lost_unwritten_blocks: int = 0
    discarded_blocks: int = 0
    quarantined_blocks: int = 0
    scrubbed_bytes: int = 0
    verified_ahead_bytes: int = 0
    storage_errors: int = 0
    leases_granted: int = 0
    leases_expired: int = 0
    tls_reloads: int = 0
    tls_reloads_refused: int = 0
    sessions_begun: int = 0
    sessions_expired: int = 0
    session_changes_refused: int = 0
    hints_received: int = 0
    hints_unknown: int = 0
    hints_invalid: int = 0
    hints_over_limit: int = 0
    policy_failures: int = 0
    read_ahead_blocks: int = 0
    read_ahead_bytes: int = 0
    read_ahead_unused_blocks: int = 0
    hint_promoted_blocks: int = 0
    hint_promoted_bytes: int = 0
    hint_readiness_sent: int = 0

    # By label values, for the metrics only.
    asked_blocks: Counter[int] = field(default_factory=Counter)  # Of lookups, by layout id.
    hit_blocks: Counter[tuple[int, str]] = field(default_factory=Counter)  # By layout id and the fastest tier.
    hit_tokens: Counter[int] = field(default_factory=Counter)  # By layout id.
    misses: Counter[tuple[int, str]] = field(default_factory=Counter)  # By layout id and reason.
    tier_read_bytes: Counter[str] = field(default_factory=Counter)  # By tier.
    tier_written_bytes: Counter[str] = field(default_factory=Counter)
    tier_written_behind_blocks: Counter[str] = field(default_factory=Counter)
    lookup_times: Durations = field(default_factory=Durations)
    first_layer_times: DurationsBy = field(default_factory=DurationsBy)  # Of loads, by path and the slowest tier.
    load_times: DurationsBy = field(default_factory=DurationsBy)
    save_times: DurationsBy = field(default_factory=DurationsBy)  # By path and durability.
    promotion_times: DurationsBy = field(default_factory=DurationsBy)  # By reason.

    def as_dict(self) -> dict[str, int]:
        """The totals that are single numbers."""
        return {name: getattr(self, name) for name in TOTALS}


TOTALS = tuple(each.name for each in fields(Counters) if each.type == "int")
