"""Typing hints for load that has none: true ones ahead of each request, and wrong ones among them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvservice.simulate.workload import Hints, Workload

_TYPING = 1  # Its place in `kvservice.policy.items.HINTS`.


def typing_hints(
    session: NDArray[np.int32],
    think_s: NDArray[np.float64],
    lead_s: tuple[float, float] | None,
    false_share: float,
    rng: np.random.Generator,
) -> Hints:
    """A hint `lead_s` (least, most) ahead of each turn but a session's first, and not before the answer has ended.

    `false_share` of all hints are wrong: `P / (1 - P)` for each true one, at random moments of sessions that think.
    A moment is as likely in a longer think time, so it is what an observer sees who looks at random.
    Turns of a session stand together. Raises ValueError for leads and shares that cannot be.
    """
    if lead_s is None:
        if false_share:
            raise ValueError("false hints are a share of all hints: there must be typing hints, too")
        return Hints.none()
    least, most = lead_s
    if not 0 <= least <= most < np.inf:
        raise ValueError(f"a typing hint needs a lead of A to B seconds with 0 <= A <= B, not {least} to {most}")
    if not 0 <= false_share < 1:
        raise ValueError(f"the share of false hints must be 0 or more and below 1, not {false_share}")
    hinted = np.flatnonzero(session[1:] == session[:-1]) + 1
    thinks = think_s[hinted]
    lead = np.minimum(rng.uniform(least, most, len(hinted)), thinks)

    # One clock that runs through all think times, one after the other: a moment of it is a moment of a session that
    # thinks, and its order is that of the answers and, after each, of time.
    ends = np.cumsum(thinks)
    begins = np.concatenate([[0.0], ends])[: len(ends)]
    true = np.maximum(ends - lead, begins)
    wrong = np.empty(0)
    if len(ends) and ends[-1] > 0:
        wrong = rng.uniform(0.0, ends[-1], round(len(hinted) * false_share / (1 - false_share)))
    which = np.minimum(np.searchsorted(ends, wrong, side="right"), len(ends) - 1)
    order = np.argsort(np.concatenate([true, wrong]), kind="stable")
    return Hints(
        turn=np.concatenate([hinted, -hinted[which]])[order],  # `hinted - 1` is the turn whose answer it follows.
        kind=np.full(len(order), _TYPING, np.int8),
        lead_s=np.concatenate([lead, wrong - begins[which]])[order],
    )


def with_typing_hints(workload: Workload, lead_s: tuple[float, float], false_share: float, seed: int) -> Workload:
    """A trace of sessions with hints as `typing_hints` makes them. Where a trace tells no think times, the time from
    a request to the next is taken for one: a wrong hint may then come later than it would have.

    Raises ValueError for shared prefixes, where nothing is known of who types, and for a trace with hints of its own.
    """
    if workload.shares_prefixes:
        raise ValueError("shared prefixes have no sessions that somebody could type in")
    if len(workload.hints.turn):
        raise ValueError("the trace has hints of its own")
    arrives = workload.arrives_s
    since_request = np.diff(arrives, prepend=arrives[:1])
    gaps = np.where(np.isnan(since_request), workload.think_s, since_request)
    gaps[np.flatnonzero(np.diff(workload.session, prepend=-1))] = 0.0
    hints = typing_hints(workload.session, gaps, lead_s, false_share, np.random.default_rng(seed))
    return replace(workload, hints=hints)
