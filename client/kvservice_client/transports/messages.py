"""Conversions: a save order to the header message, and the answer to the result."""

from __future__ import annotations

from kvservice_api.status import from_status
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2
from kvservice_client.transports.base import Durability, SaveOrder, SaveResult

_DURABILITY = {Durability.DRAM: types_pb2.DURABILITY_DRAM, Durability.SSD: types_pb2.DURABILITY_SSD}


def save_header(order: SaveOrder) -> pb.SaveHeader:
    return pb.SaveHeader(
        client_id=order.client_id,
        layout_fingerprint=order.layout.fingerprint,
        shard=order.shard.to_proto(),
        parent_key=order.parent_key,
        keys=order.keys,
        last_block_tokens=order.token_counts[-1],
        durability=_DURABILITY[order.durability],
    )


def save_result(answer: pb.SaveBlocksResponse) -> SaveResult:
    refused = [(each.block, from_status(each.status)) for each in answer.refused]
    return SaveResult(answer.stored, answer.already_stored, refused)
