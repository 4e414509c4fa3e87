"""What several RPCs of BlockService read from their requests and write into their answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.store import BlockStore
from kvservice.store.transfers.upload import SaveOutcome, SaveRequest
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import split_keys
from kvservice_api.layout import Shard
from kvservice_api.status import to_status
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2

_WithShard = (
    pb.LookupPrefixRequest | pb.SaveHeader | pb.LoadBlocksRequest | pb.LocateBlocksRequest | pb.AdoptLeaseRequest
)

# Claiming and recording more in one save would keep the event loop for over 5 ms.
SAVE_BLOCKS_MAX = 256
SAVE_SLICES_MAX = 32768
ON_SSD: Mapping[int, bool] = {
    types_pb2.DURABILITY_UNSPECIFIED: False,
    types_pb2.DURABILITY_DRAM: False,
    types_pb2.DURABILITY_SSD: True,
}


def save_request(store: BlockStore, caller: Caller, header: pb.SaveHeader) -> tuple[Client, SaveRequest]:
    """Who saves what. Raises InvalidRequest, Draining, UnknownLayout, UnknownClient."""
    if header.durability not in ON_SSD:  # Never promise less than was asked for.
        raise InvalidRequest(f"no durability has the number {header.durability}", field="durability")
    keys = split_keys(header.keys, field="keys", count_max=SAVE_BLOCKS_MAX)
    client, request = store.save_request(
        caller,
        header.layout_fingerprint,
        shard_of(header),
        header.parent_key,
        keys,
        header.last_block_tokens,
    )
    layers = request.shard.layers
    if len(keys) * layers > SAVE_SLICES_MAX:
        raise InvalidRequest(
            f"{len(keys)} blocks of {layers} layers are {len(keys) * layers} slices; "
            f"at most {SAVE_SLICES_MAX} are allowed in one save",
            field="keys",
        )
    return client, request


def save_response(outcome: SaveOutcome) -> pb.SaveBlocksResponse:
    refused = [
        pb.RefusedBlock(block=block, status=to_status(error)) for block, error in sorted(outcome.refused.items())
    ]
    return pb.SaveBlocksResponse(
        stored=len(outcome.stored), already_stored=len(outcome.already_stored), refused=refused
    )


def checksums_of(data: bytes) -> NDArray[np.uint64]:
    if len(data) % 8:
        raise InvalidRequest("checksums must have 8 bytes each", field="checksums")
    return np.frombuffer(data, "<u8").astype(np.uint64)


def shard_of(request: _WithShard) -> Shard | None:
    return Shard.from_proto(request.shard) if request.HasField("shard") else None


def block_range(first: int, count: int, end: int, what: str) -> range:
    """`count` from `first` on, 0 meaning all that are left."""
    last = first + count if count else end
    if not first < last <= end:
        raise InvalidRequest(f"{what}s {first}..{last} are not in the lease's {end}", field=f"first_{what}")
    return range(first, last)
