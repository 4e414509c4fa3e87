"""Values that messages of several services have."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from kvservice.store.types import Run
from kvservice_api.v1 import blocks_pb2 as pb


def residency_runs(runs: Iterable[Run]) -> list[pb.ResidencyRun]:
    return [pb.ResidencyRun(count=count, dram=dram, ssd=ssd) for count, dram, ssd in runs]


def timestamp(wall_ms: int) -> Timestamp:
    return Timestamp(seconds=wall_ms // 1000, nanos=wall_ms % 1000 * 1_000_000)


def known_timestamp(wall_ms: int) -> Timestamp | None:
    """None where 0 stands for a time that is not known."""
    return timestamp(wall_ms) if wall_ms else None
