"""What a row of the table of metrics is, and the ways to make one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvservice.bulk.port import BulkPort
from kvservice.counters import Counters, Durations
from kvservice.device.cuda_ipc import CudaIpc
from kvservice.metrics.heartbeat import Heartbeat
from kvservice.rpc.calls import CallCounts
from kvservice.rpc.tls import Certificates
from kvservice.store.types import StoreFacts, StoreGauges
from kvservice_api.layout import Layout

PREFIX = "kvservice_"
PATHS = ("stream", "in_place", "cuda_ipc", "bulk")
_LAYOUT_DIGITS = 16  # As `kvctl explain` shows fingerprints.

Labels = tuple[str, ...]
Samples = Mapping[Any, float | Durations]  # By `Labels`, of any length: the keys of a Mapping are invariant.


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the values are, at one time. The dictionaries may change during the reading: copy them."""

    version: str
    counters: Counters
    facts: StoreFacts
    gauges: StoreGauges
    calls: CallCounts
    heartbeat: Heartbeat
    certificates: Certificates | None
    cuda_ipc: CudaIpc
    bulk: BulkPort

    @property
    def layouts(self) -> Mapping[int, str]:
        """By id: the value of the label `layout`."""
        return {each: label(layout) for each, (layout, _) in self.gauges.layouts.items()}

    @property
    def tiers(self) -> Sequence[str]:
        return list(self.gauges.blocks)


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is without the prefix. `totals` are the names in ``Status`` of what the metric has, if there are any.

    `read` is called on a thread of the metrics: it reads plain values, and copies of dictionaries.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    use: str
    labels: Labels
    read: Callable[[Sources], Samples]
    totals: Sequence[str] = field(default=())


def label(layout: Layout) -> str:
    """The value of the label `layout`: the first digits of the fingerprint, in hexadecimal."""
    return layout.fingerprint.hex()[:_LAYOUT_DIGITS]


def from_zero(known: Iterable[Labels], samples: Samples, zero: float | Durations = 0) -> Samples:
    """The samples, and `zero` for known labels without one: `rate` does not see the event that begins a series."""
    return {**dict.fromkeys(known, zero), **samples}


def total(name: str, meaning: str, use: str, of: str = "") -> Metric:
    """A counter of one of the daemon's totals, `of`; without it of the total with the metric's name."""
    field_name = of or name.removesuffix("_total")

    def read(from_: Sources) -> Samples:
        return {(): getattr(from_.counters, field_name)}

    return Metric(name, "counter", meaning, use, (), read, (field_name,))


def totals(name: str, meaning: str, use: str, by: str, **of: str) -> Metric:
    """A counter with one label, `by`: its values, and the daemon's total of each."""

    def read(from_: Sources) -> Samples:
        return {(value,): getattr(from_.counters, name) for value, name in of.items()}

    return Metric(name, "counter", meaning, use, (by,), read, tuple(of.values()))


def gauge(name: str, meaning: str, use: str, read: Callable[[Sources], float]) -> Metric:
    return Metric(name, "gauge", meaning, use, (), lambda from_: {(): read(from_)})


def histogram(name: str, meaning: str, use: str, labels: Labels, read: Callable[[Sources], Samples]) -> Metric:
    return Metric(name, "histogram", meaning, use, labels, read)
