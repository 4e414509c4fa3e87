"""Placement policies: pure functions of (state, now). No I/O, no clock, no lock, no tier.

A policy decides, and a store carries the decision out. ``placement`` is the interface of all policies, over ``items``
(sessions, shared prefixes). Each policy has one file.
"""

from collections.abc import Callable
from functools import partial

from kvservice.policy.fifo import FifoPolicy
from kvservice.policy.foresight import ForesightPolicy
from kvservice.policy.lookahead import LookaheadPolicy
from kvservice.policy.lru import LruPolicy
from kvservice.policy.placement import Placement
from kvservice.policy.s3fifo import S3FifoPolicy

#: Constructors of the policies over items, by name. Each run needs its own instance.
PLACEMENTS: dict[str, Callable[[], Placement]] = {
    "lru": LruPolicy,
    "fifo": FifoPolicy,
    "s3fifo": S3FifoPolicy,
    "lookahead": LookaheadPolicy,
    "foresight": ForesightPolicy,
    "foresight-unlearned": partial(ForesightPolicy, learning=False),
}

#: The policies that a daemon can use. In a daemon, `lru` ranks single blocks, without items.
DAEMON_POLICIES = ("lru", "fifo", "s3fifo", "lookahead", "foresight")


def daemon_policy(name: str) -> Placement | None:
    """A new policy for a daemon; None for `lru`."""
    return None if name == "lru" else PLACEMENTS[name]()


__all__ = [
    "DAEMON_POLICIES",
    "PLACEMENTS",
    "FifoPolicy",
    "ForesightPolicy",
    "LookaheadPolicy",
    "LruPolicy",
    "Placement",
    "S3FifoPolicy",
    "daemon_policy",
]
