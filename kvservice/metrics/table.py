"""Every metric of the daemon's own, by subject: the HELP texts and docs/reference/metrics.md come from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from kvservice.metrics import storage, traffic
from kvservice.metrics.rows import Metric

SUBJECTS: Mapping[str, Sequence[Metric]] = {
    "Lookups": traffic.LOOKUPS,
    "Loads": traffic.LOADS,
    "Saves": traffic.SAVES,
    "The bulk port": traffic.BULK,
    "Calls": traffic.CALLS,
    "Clients, leases, sessions and requests": traffic.CLIENTS,
    "Hints": traffic.HINTS,
    "Tiers and blocks": storage.TIERS,
    "Evictions and losses": storage.LOSSES,
    "Copies to the slower tier": storage.WRITES,
    "Copies to DRAM": storage.PROMOTIONS,
    "GPUs": storage.CUDA,
    "The daemon": storage.DAEMON,
}
METRICS: Sequence[Metric] = tuple(chain.from_iterable(SUBJECTS.values()))
