"""Typing hints for load without hints: true hints before requests, and wrong hints at random times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvservice.simulate.workload import Hints, Workload

_TYPING = 1  # The index of the typing hint in `kvservice.policy.items.HINTS`.


def typing_hints(
    session: NDArray[np.int32],
    think_s: NDArray[np.float64],
    lead_s: tuple[float, float] | None,
    false_share: float,
    rng: np.random.Generator,
) -> Hints:
    """A hint per turn, `lead_s` (least, most) seconds before it but after the previous answer; none for first turns.

    A share `false_share` of all hints is wrong: `P / (1 - P)` per true hint, at times that are uniform over all think
    time. A long think time therefore has more of them than a short one. The turns of a session are consecutive.
    Raises ValueError for leads and shares out of range.
    """
    if lead_s is None:
        if false_share:
            raise ValueError("false hints are a share of all hints: there must be typing hints, too")
        return Hints.none()
    least, most = lead_s
    if not 0 <= least <= most < np.inf:
        raise ValueError(f"the lead of a typing hint must be A to B seconds with 0 <= A <= B, not {least} to {most}")
    if not 0 <= false_share < 1:
        raise ValueError(f"the share of false hints must be 0 or more and below 1, not {false_share}")
    hinted = np.flatnonzero(session[1:] == session[:-1]) + 1
    thinks = think_s[hinted]
    lead = np.minimum(rng.uniform(least, most, len(hinted)), thinks)

    # One time axis with all think times, one after the other. A point on it is a time in one session's think time, and
    # its order is the order of the answers, then of the time after each answer.
    ends = np.cumsum(thinks)
    begins = np.concatenate([[0.0], ends])[: len(ends)]
    true = np.maximum(ends - lead, begins)
    wrong = np.empty(0)
    if len(ends) and ends[-1] > 0:
        wrong = rng.uniform(0.0, ends[-1], round(len(hinted) * false_share / (1 - false_share)))
    which = np.minimum(np.searchsorted(ends, wrong, side="right"), len(ends) - 1)
    order = np.argsort(np.concatenate([true, wrong]), kind="stable")
    return Hints(
        turn=np.concatenate([hinted, -hinted[which]])[order],  # Turn `hinted - 1` is the one before the hint.
        kind=np.full(len(order), _TYPING, np.int8),
        lead_s=np.concatenate([lead, wrong - begins[which]])[order],
    )


def with_typing_hints(workload: Workload, lead_s: tuple[float, float], false_share: float, seed: int) -> Workload:
    """A trace of sessions with the hints of `typing_hints`.

    If a trace has no think times, the time between two requests takes their place. A wrong hint may then be later than
    with think times. Raises ValueError for shared prefixes, which have no sessions, and for a trace with its own hints.
    """
    if workload.shares_prefixes:
        raise ValueError("a trace of shared prefixes has no sessions, so no user of it types")
    if len(workload.hints.turn):
        raise ValueError("the trace has hints of its own")
    arrives = workload.arrives_s
    since_request = np.diff(arrives, prepend=arrives[:1])
    gaps = np.where(np.isnan(since_request), workload.think_s, since_request)
    gaps[np.flatnonzero(np.diff(workload.session, prepend=-1))] = 0.0
    hints = typing_hints(workload.session, gaps, lead_s, false_share, np.random.default_rng(seed))
    return replace(workload, hints=hints)
