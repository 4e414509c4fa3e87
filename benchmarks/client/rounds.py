"""A round: the limit, ours, the limit again. If the two limits differ, the round is repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

SPREAD_MAX = 0.15


@dataclass(frozen=True, slots=True)
class Limit:
    """The machine's best speed around one round, reached with `setting`."""

    value: float
    setting: str
    spread: float  # The difference of the two measures, as a share of the larger.


@dataclass(frozen=True, slots=True)
class Round:
    limit: Limit
    ours: Mapping[str, float]
    attempts: int


def compare(
    limit: Callable[[], Mapping[str, float]],
    ours: Callable[[], Mapping[str, float]],
    *,
    attempts_max: int,
    before: Mapping[str, float] | None = None,
) -> Round:
    """Rounds until the limit's spread is at most 15 %; the quietest one if none is that quiet.

    `limit` measures by setting; the best setting counts, averaged over before and after.
    `before` is a measure of the limit that was made already.
    """
    quietest: Round | None = None
    before = limit() if before is None else before
    for attempt in range(1, attempts_max + 1):
        values = ours()
        after = limit()
        found = Round(_limit(before, after), values, attempt)
        if quietest is None or found.limit.spread < quietest.limit.spread:
            quietest = found
        if found.limit.spread <= SPREAD_MAX:
            break
        before = after
    assert quietest is not None
    return Round(quietest.limit, quietest.ours, attempt)


def _limit(before: Mapping[str, float], after: Mapping[str, float]) -> Limit:
    best_before, best_after = max(before.values()), max(after.values())
    largest = max(best_before, best_after)
    source = before if best_before == largest else after
    setting = next(name for name, value in source.items() if value == largest)
    return Limit((best_before + best_after) / 2, setting, abs(best_before - best_after) / largest)
