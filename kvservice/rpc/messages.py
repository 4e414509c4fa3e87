"""Conversions that several RPCs of BlockService share: fields of requests and of answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

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
    """The chain and the shard of a save, and whether it must be durable on SSD. Raises InvalidRequest."""
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


def residency_runs(runs: Iterable[Run]) -> list[pb.ResidencyRun]:
    return [pb.ResidencyRun(count=count, dram=dram, ssd=ssd) for count, dram, ssd in runs]


def checksums_of(data: bytes) -> NDArray[np.uint64]:
    if len(data) % 8:
        raise InvalidRequest("checksums must have 8 bytes each", field="checksums")
    return np.frombuffer(data, "<u8").astype(np.uint64)


def shard_of(request: _WithShard) -> Shard | None:
    return Shard.from_proto(request.shard) if request.HasField("shard") else None
