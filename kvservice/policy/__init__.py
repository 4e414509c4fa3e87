"""Placement policies: pure functions of (state, now). No I/O, no clock, no lock, no tier.

A policy decides, a mover carries out. ``base`` is the interface, ``placement`` what policies over ``items``
(sessions, shared prefixes) hear and answer besides; one file a policy.
"""

from collections.abc import Callable
from functools import partial

from kvservice.blocks import BlockTable
from kvservice.policy.base import Policy
from kvservice.policy.fifo import FifoPolicy
from kvservice.policy.foresight import ForesightPolicy
from kvservice.policy.lookahead import LookaheadPolicy
from kvservice.policy.lru import LruPolicy
from kvservice.policy.placement import Placement
from kvservice.policy.s3fifo import S3FifoPolicy

#: By name, what makes each policy over items. Each run has an instance of its own.
PLACEMENTS: dict[str, Callable[[], Placement]] = {
    "lru": LruPolicy,
    "fifo": FifoPolicy,
    "s3fifo": S3FifoPolicy,
    "lookahead": LookaheadPolicy,
    "foresight": ForesightPolicy,
    "foresight-unlearned": partial(ForesightPolicy, learning=False),
}

#: Those that also rank single blocks: what the daemon can run.
POLICIES: dict[str, type[Policy[BlockTable]]] = {"lru": LruPolicy}

__all__ = [
    "PLACEMENTS",
    "POLICIES",
    "FifoPolicy",
    "ForesightPolicy",
    "LookaheadPolicy",
    "LruPolicy",
    "Placement",
    "Policy",
    "S3FifoPolicy",
]
