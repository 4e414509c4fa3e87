"""What policies and the stores that ask them exchange.

A policy scores *items*: a session's KV, or a shared prefix. The blocks of an item are ordered: a tier holds a prefix of
the item, and evicts its end first. The store (the daemon's, or the simulator's model) reports events to the policy, and
asks it what to evict and what to promote. The answers of a policy depend only on these events and on the time that
each call passes.
"""

from __future__ import annotations

import math
import zlib
from enum import StrEnum
from typing import NamedTuple


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
