"""What the simulator plays: turns in order, the items that each one reads, and the hints before it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: `Workload.arrives_s` of a turn that comes a think time after the answer before it.
AFTER_ANSWER = math.nan


@dataclass(frozen=True, slots=True)
class Hints:
    """Hints by the turn that they follow, then by time.

    One with `turn` >= 0 comes `lead_s` before the request of that turn, which is not its session's first.
    One with `turn` < 0 comes `lead_s` after the end of the answer of turn `-turn - 1`: it is a wrong one, or a
    session's last word.
    """

    turn: NDArray[np.int64]
    kind: NDArray[np.int8]  # See `kvservice.policy.items.HINTS`.
    lead_s: NDArray[np.float64]  # 0 or more.

    @staticmethod
    def none() -> Hints:
        return Hints(np.empty(0, np.int64), np.empty(0, np.int8), np.empty(0, np.float64))


@dataclass(frozen=True, slots=True)
class Workload:
    """Turns, numbered so that those of a session stand together, one after the other.

    Two kinds. *Sessions*: every turn reads one item, the session's, which grows by `new_tokens` and
    `output_tokens`; `path_*` are empty. *Shared prefixes*: turn `n` reads the items
    `path_items[path_begins[n] : path_begins[n + 1]]`, from the first block on; each is a run of blocks that no
    request enters or leaves in its middle, `item_blocks` long, so that a block and its item are used alike; every
    turn is a session of its own, and its `new_tokens` are the whole prompt. The last block may not be full.
    """

    name: str
    session: NDArray[np.int32]  # Of each turn, ascending; sessions are numbered from 0, by their first request.
    arrives_s: NDArray[np.float64]  # When its request comes, or AFTER_ANSWER.
    think_s: NDArray[np.float64]  # From the end of the session's answer before it, where it is AFTER_ANSWER.
    new_tokens: NDArray[np.int32]  # Of the request, without its history.
    output_tokens: NDArray[np.int32]
    hints: Hints = field(default_factory=Hints.none)
    block_tokens: int = 0  # 0 for sessions.
    path_begins: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    path_items: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    item_blocks: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    context_tokens: int = 0  # The model's window: what is over it is cut by half from the front. 0: no limit.

    @property
    def turns(self) -> int:
        return len(self.session)

    @property
    def sessions(self) -> int:
        return int(self.session.max()) + 1 if len(self.session) else 0

    @property
    def shares_prefixes(self) -> bool:
        return self.block_tokens > 0
