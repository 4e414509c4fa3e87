"""What policies and the stores that ask them exchange.

A policy scores *items*: a session's KV, or a shared prefix. The blocks of an item are ordered: a tier holds a prefix of
the item, and evicts its end first. The store (the daemon's, or the simulator's model) reports events to the policy, and
asks it what to evict and what to promote. The answers of a policy depend only on these events and on the time that
each call passes.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple


class Hint(StrEnum):
    """What an application reports about a session before its next request."""

    TYPING = "typing"
    TOOL_CALL = "tool_call"  # A tool call started: the next request follows its end.
    ENDED = "ended"


class Promotion(NamedTuple):
    """A copy from SSD to DRAM that a policy wants."""

    row: int
    deadline_s: float  # When the bytes are needed. The promotion with the earliest deadline is read first.
    worth: float = math.inf  # Only items with a lower `retention` are evicted for it.
