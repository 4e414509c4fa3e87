"""Typing hints for generated load: true ones ahead of each request, and wrong ones among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvservice.simulate.workload import Hints

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
    lead = np.minimum(rng.uniform(least, most, len(hinted)), think_s[hinted])

    thinking = np.cumsum(think_s[hinted])
    wrong = round(len(hinted) * false_share / (1 - false_share)) if len(hinted) and thinking[-1] > 0 else 0
    moments = rng.uniform(0.0, thinking[-1] if wrong else 0.0, wrong)
    which = np.minimum(np.searchsorted(thinking, moments, side="right"), len(hinted) - 1)
    since_answer = moments - (thinking[which] - think_s[hinted[which]])

    # In the order of the answers that they follow, then of time: the order in which one session says them.
    answer = np.concatenate([hinted, hinted[which]]) - 1
    at = np.concatenate([think_s[hinted] - lead, since_answer])
    order = np.lexsort((at, answer))
    return Hints(
        turn=np.concatenate([hinted, -hinted[which]])[order],  # -answer - 1
        kind=np.full(len(order), _TYPING, np.int8),
        lead_s=np.concatenate([lead, since_answer])[order],
    )
