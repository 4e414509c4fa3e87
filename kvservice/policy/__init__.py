"""Placement policies: pure functions of (state, now). No I/O, no clock, no lock, no tier.

A policy decides, the store's mover carries out. ``base`` is the interface; one file a policy.
"""

from kvservice.policy.base import Policy
from kvservice.policy.lru import LruPolicy

POLICIES: dict[str, type[Policy]] = {"lru": LruPolicy}

__all__ = ["POLICIES", "LruPolicy", "Policy"]
