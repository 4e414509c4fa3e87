"""What several RPCs of BlockService read from their requests and write into their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import TierName
from kvservice.store.types import SAVE_BLOCKS_MAX, Run, SaveHeader, SaveOutcome
from kvservice_api.errors import InvalidRequest, KVError
from kvservice_api.keys import split_keys
from kvservice_api.layout import Shard
from kvservice_api.status import to_status
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import sessions_pb2, types_pb2

_WithShard = (
    pb.LookupPrefixRequest
    | pb.SaveHeader
    | pb.LoadBlocksRequest
    | pb.LocateBlocksRequest
    | pb.AdoptLeaseRequest
    | sessions_pb2.GetSessionRequest
)

_ON_SSD: Mapping[int, bool] = {
    types_pb2.DURABILITY_UNSPECIFIED: False,
    types_pb2.DURABILITY_DRAM: False,
    types_pb2.DURABILITY_SSD: True,
}


def save_header(header: pb.SaveHeader) -> tuple[SaveHeader, bool]:
    """What is to be saved, and whether it is durable on SSD only. Raises InvalidRequest."""
    if header.durability not in _ON_SSD:  # Never promise less than was asked for.
        raise InvalidRequest(f"no durability has the number {header.durability}", field="durability")
    keys = split_keys(header.keys, field="keys", count_max=SAVE_BLOCKS_MAX)
    save = SaveHeader(header.layout_fingerprint, shard_of(header), header.parent_key, keys, header.last_block_tokens)
    return save, _ON_SSD[header.durability]


def save_response(outcome: SaveOutcome) -> pb.SaveBlocksResponse:
    return pb.SaveBlocksResponse(
        stored=len(outcome.stored),
        already_stored=len(outcome.already_stored),
        refused=refused_blocks(outcome.refused),
    )


def refused_blocks(refused: Mapping[int, KVError]) -> list[pb.RefusedBlock]:
    return [pb.RefusedBlock(block=block, status=to_status(error)) for block, error in sorted(refused.items())]


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


def checksums_of(data: bytes) -> NDArray[np.uint64]:
    if len(data) % 8:
        raise InvalidRequest("checksums must have 8 bytes each", field="checksums")
    return np.frombuffer(data, "<u8").astype(np.uint64)


def shard_of(request: _WithShard) -> Shard | None:
    return Shard.from_proto(request.shard) if request.HasField("shard") else None
