"""What every placement policy answers, and what it is told.

A policy scores *items*: a session's KV, a shared prefix, or a single block where nothing groups blocks.
Within an item the blocks are ordered: a tier holds a prefix of it, and gives up its end first. Whoever
moves the bytes (the daemon's mover, the simulator) tells the policy what happens and asks what shall
leave and what shall come. A policy is a function of what it was told and of the time that it is given.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName


class Recency(Protocol):
    """What a policy that goes by recency alone reads. The daemon's `BlockTable` is one, with single blocks as items."""

    access_seq: NDArray[np.int64]  # Greater is later; within one lookup a prefix is later than its suffix.
    unwanted_on_ssd: NDArray[np.bool_]  # Was evicted from SSD, and not used since.


class Hint(StrEnum):
    """What an application says about a session before its next request comes."""

    TYPING = "typing"
    TOOL_CALL = "tool_call"  # A tool call began: the request comes when it has ended.
    ENDED = "ended"


class Promotion(NamedTuple):
    """A copy from SSD to DRAM that a policy wants."""

    row: int
    deadline_s: float  # When the bytes are needed. The earliest is read first.
    worth: float = math.inf  # What is worth at least as much (by `retention`) does not leave for it.


ItemsT = TypeVar("ItemsT", contravariant=True)


class Policy(Protocol, Generic[ItemsT]):
    """Says what is worth keeping. Never changes the items."""

    name: ClassVar[str]

    def retention(self, items: ItemsT, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        """The worth of keeping each of `rows` in `tier`. The lowest leave first; ties leave in any order.

        `rows` have bytes in `tier`, and nothing holds them. May be called from any thread.
        """

    def wants_in_dram(self, items: ItemsT, row: int, now_s: float) -> bool:
        """Whether what is being loaded from SSD shall get a place in DRAM, evicting others."""

    def wants_on_ssd(self, items: ItemsT, row: int, now_s: float) -> bool:
        """Whether what is in DRAM shall be copied to SSD, evicting others."""
