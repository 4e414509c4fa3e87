"""The interface of placement policies.

A policy scores *items*: a session's KV, a shared prefix, or, in the daemon, a single block. The blocks of an item are
ordered: a tier holds a prefix of the item, and evicts its end first. The store (the daemon's, or the simulator's
model) reports events to the policy, and asks it what to evict and what to promote. The answers of a policy depend
only on these events and on the time that each call passes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from enum import StrEnum
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName


class Recency(Protocol):
    """The columns that a policy by recency reads. The daemon's `BlockTable` has them, with single blocks as items."""

    access_seq: NDArray[np.int64]  # Greater is later; within one lookup a prefix is later than its suffix.

    @property
    def unwanted_on_ssd(self) -> NDArray[np.bool_]:
        """Evicted from SSD, and not used since."""


class Hint(StrEnum):
    """What an application reports about a session before its next request."""

    TYPING = "typing"
    TOOL_CALL = "tool_call"  # A tool call started: the next request follows its end.
    ENDED = "ended"


#: Kinds of a hint: 0 is of no known kind.
HINT_KINDS = 8


def hint_kind(name: str) -> int:
    """A small number for a tool's name or a stop reason, the same in every process; 0 for an empty name."""
    return 1 + zlib.crc32(name.encode()) % (HINT_KINDS - 1) if name else 0


class Promotion(NamedTuple):
    """A copy from SSD to DRAM that a policy wants."""

    row: int
    deadline_s: float  # When the bytes are needed. The promotion with the earliest deadline is read first.
    worth: float = math.inf  # Only items with a lower `retention` are evicted for it.


ItemsT = TypeVar("ItemsT", contravariant=True)


@runtime_checkable
class Policy(Protocol, Generic[ItemsT]):
    """Scores items. Never changes them."""

    @property
    def name(self) -> str: ...

    @property
    def ranking_lasts_s(self) -> float:
        """For how long the order of rows stays right that were not used since."""

    def scores(self, items: ItemsT, tier: TierName, now_s: float) -> Callable[[Rows], NDArray[np.float64]]:
        """What scores rows in `tier`, as they are now, as an array of the shape [rows].

        The lowest are evicted first, ties in any order. The rows have bytes in `tier` and are not held. The
        result may be called from any thread.
        """

    def wants_in_dram(self, items: ItemsT, row: int, now_s: float) -> bool:
        """Whether an item that is read from SSD gets space in DRAM, for which other items are evicted."""

    def wants_on_ssd(self, items: ItemsT, row: int, now_s: float) -> bool:
        """Whether an item in DRAM is copied to SSD, for which other items are evicted there."""
