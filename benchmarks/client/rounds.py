"""A round: the limit, ours, the limit again. If the two limits differ, the round is repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


Turn = tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]  # The limit's, ours, the limit's again.


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

    def turns() -> Iterator[Turn]:
        last = limit() if before is None else before
        while True:
            values = ours()
            after = limit()
            yield last, values, after
            last = after

    found = quietest(turns(), attempts_max=attempts_max)
    assert found is not None
    return found


def quietest(turns: Iterable[Turn], *, attempts_max: int) -> Round | None:
    """The same for turns that are measured otherwise; None if there is none."""
    best: Round | None = None
    attempt = 0
    for attempt, (before, values, after) in enumerate(turns, 1):
        found = Round(_limit(before, after), values, attempt)
        if best is None or found.limit.spread < best.limit.spread:
            best = found
        if found.limit.spread <= SPREAD_MAX or attempt == attempts_max:
            break
    return None if best is None else Round(best.limit, best.ours, attempt)


def _limit(before: Mapping[str, float], after: Mapping[str, float]) -> Limit:
    best_before, best_after = max(before.values()), max(after.values())
    largest = max(best_before, best_after)
    source = before if best_before == largest else after
    setting = next(name for name, value in source.items() if value == largest)
    return Limit((best_before + best_after) / 2, setting, abs(best_before - best_after) / largest)
