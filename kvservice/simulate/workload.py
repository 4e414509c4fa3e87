"""The simulator's input: turns in order, the items that each turn reads, and hints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: `Workload.arrives_s` of a turn that arrives one think time after the session's previous answer.
AFTER_ANSWER = math.nan


@dataclass(frozen=True, slots=True)
class Hints:
    """Hints, sorted by the turn that they follow, then by time. All arrays have the shape [hints].

    A hint with `turn` >= 0 is sent `lead_s` before the request of that turn, which is not its session's first.
    A hint with `turn` < 0 is sent `lead_s` after the end of the answer of turn `-turn - 1`: it is a wrong hint, or the
    last hint of a session.
    """

    turn: NDArray[np.int64]
    #: An index into `kvservice.policy.items.HINTS`, plus `len(HINTS)` times `kvservice.policy.base.hint_kind`.
    kind: NDArray[np.int8]
    lead_s: NDArray[np.float64]  # 0 or more.

    @staticmethod
    def none() -> Hints:
        """No hints: empty arrays."""
        return Hints(np.empty(0, np.int64), np.empty(0, np.int8), np.empty(0, np.float64))


@dataclass(frozen=True, slots=True)
class Workload:
    """Turns, numbered so that the turns of a session are consecutive and in order. There are two kinds:

    * *Sessions*: every turn reads one item, its session's, which grows by `new_tokens` and `output_tokens`. The
      `path_*` arrays and `item_blocks` are empty.
    * *Shared prefixes*: turn `n` reads the items `path_items[path_begins[n] : path_begins[n + 1]]`, from the first
      block on. An item is a run of `item_blocks` blocks, and a request reads either all of them or none. Every turn
      is a session of its own, and its `new_tokens` are the whole prompt. The last block may be partial.
    """

    name: str
    session: NDArray[np.int32]  # [turns], ascending. Sessions are numbered from 0, by their first request.
    arrives_s: NDArray[np.float64]  # [turns]: when the request arrives, or AFTER_ANSWER.
    think_s: NDArray[np.float64]  # [turns]: seconds from the session's previous answer, for AFTER_ANSWER.
    new_tokens: NDArray[np.int32]  # [turns]: tokens of the request, without its history.
    output_tokens: NDArray[np.int32]
    hints: Hints = field(default_factory=Hints.none)
    block_tokens: int = 0  # 0 for sessions.
    path_begins: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    path_items: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    item_blocks: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    kv_bytes_per_token: int = 0  # As recorded; 0: unknown.
    context_tokens: int = 0  # The model's window: what is over it is cut by half from the front. 0: no limit.
    notes: tuple[str, ...] = ()  # Sentences for the user: what was left out or derived when the load was read.

    @property
    def turns(self) -> int:
        return len(self.session)

    @property
    def sessions(self) -> int:
        return int(self.session.max()) + 1 if len(self.session) else 0

    @property
    def shares_prefixes(self) -> bool:
        return self.block_tokens > 0
