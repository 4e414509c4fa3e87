"""Values that messages of several services have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from kvservice.blocks import TierName
from kvservice.store.types import Run
from kvservice_api.errors import InvalidRequest
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2

TIER_NUMBERS = {TierName.DRAM: types_pb2.TIER_DRAM, TierName.SSD: types_pb2.TIER_SSD}
_TIER_OF_NUMBER = {number: name for name, number in TIER_NUMBERS.items()}


def tier_of(number: types_pb2.Tier, name: str, known: Sequence[TierName]) -> TierName:
    """The tier that a request names, which is one of `known` or a standard one. Raises InvalidRequest."""
    tier = TierName(name) if name else _TIER_OF_NUMBER.get(number)
    if not name and not number:
        raise InvalidRequest(f"name the tier: this store has {', '.join(known)}", field="tier")
    if tier is None or (tier not in known and tier not in TIER_NUMBERS):
        asked = repr(name) if name else f"the number {number}"
        raise InvalidRequest(f"no tier has {asked}; this store has {', '.join(known)}", field="tier")
    return tier


def residency_runs(runs: Iterable[Run]) -> list[pb.ResidencyRun]:
    return [pb.ResidencyRun(count=count, dram=dram, ssd=ssd) for count, dram, ssd in runs]


def timestamp(wall_ms: int) -> Timestamp:
    return Timestamp(seconds=wall_ms // 1000, nanos=wall_ms % 1000 * 1_000_000)


def known_timestamp(wall_ms: int) -> Timestamp | None:
    """None where 0 stands for a time that is not known."""
    return timestamp(wall_ms) if wall_ms else None
