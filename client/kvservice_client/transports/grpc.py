"""Frames on a gRPC stream: works between all hosts, and needs two copies more than shared memory."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress

import numpy as np

from kvservice_api.errors import InvalidFrame, KVError
from kvservice_api.frames import HEAD_BYTES_MAX, decode_frame, encode_frame
from kvservice_api.keys import BlockChain
from kvservice_api.malloc import keep_large_buffers
from kvservice_api.status import from_status
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2
from kvservice_client.buffers import Bytes
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import Durability, LoadOrder, SaveOrder, SaveResult, SaveSet, Transport

_PAYLOAD_BYTES_WANTED = 2 * 2**20  # Larger frames leave the processor's caches before they are copied again.
_KEPT_FREE_BYTES = 256 * 2**20
_DURABILITY = {Durability.DRAM: types_pb2.DURABILITY_DRAM, Durability.SSD: types_pb2.DURABILITY_SSD}


class GrpcTransport(Transport):
    """Every daemon offers it, and it carries every order."""

    name = "grpc"

    def __init__(self, connection: Connection) -> None:
        self._channel = connection.channel

    def check_offered(self, deadline: Deadline) -> None:
        """Every daemon offers it."""

    def close(self) -> None:
        """Orders share no resources."""

    def load(self, order: LoadOrder, deadline: Deadline) -> Generator[Bytes, None, None]:
        keep_large_buffers(_KEPT_FREE_BYTES)
        request = pb.LoadBlocksRequest(
            client_id=order.client_id,
            lease_id=order.lease_id,
            first_block=order.first_block,
            block_count=order.block_count,
            first_layer=order.first_layer,
        )
        messages = self._channel.stream_frames(BLOCKS + "LoadBlocks", request, deadline)
        try:
            for layer in range(order.first_layer, order.layer_count):
                target, starts = order.buffer(layer), order.block_starts(layer)
                size = starts[-1]
                filled = 0
                while filled < size:
                    message = next(messages, None)
                    if message is None:
                        raise InvalidFrame(f"the load ended within layer {layer}")
                    frame = decode_frame(message)
                    end = filled + len(frame.payload)
                    in_place = frame.layer == layer and frame.first_block < order.block_count
                    if not in_place or starts[frame.first_block] + frame.first_offset_bytes != filled or end > size:
                        raise InvalidFrame(f"the load did not continue at byte {filled} of layer {layer}")
                    np.copyto(target[filled:end], np.frombuffer(frame.payload, np.uint8))
                    filled = end
                yield target
            with suppress(KVError):  # All bytes have arrived: let the daemon end the call instead of cancelling it.
                next(messages, None)
        finally:
            messages.close()

    def save(self, order: SaveOrder, deadline: Deadline) -> tuple[list[SaveResult], int]:
        keep_large_buffers(_KEPT_FREE_BYTES)
        answer = self._channel.send_frames(BLOCKS + "SaveBlocks", _messages(order), pb.SaveBlocksResponse, deadline)
        return save_results(answer, order.chains), order.size_bytes


def save_header(saved: SaveSet) -> pb.SaveHeader:
    """The message that opens a save, by stream or in place."""
    first, *more = saved.chains
    return pb.SaveHeader(
        client_id=saved.client_id,
        layout_fingerprint=saved.layout.fingerprint,
        shard=saved.shard.to_proto(),
        parent_key=first.parent,
        keys=first.packed_keys,
        last_block_tokens=first.token_counts[-1],
        durability=_DURABILITY[saved.durability],
        more=[
            pb.SaveChain(parent_key=each.parent, keys=each.packed_keys, last_block_tokens=each.token_counts[-1])
            for each in more
        ],
    )


def save_results(answer: pb.SaveBlocksResponse, chains: Sequence[BlockChain]) -> list[SaveResult]:
    """The result of each chain of a save."""
    refused = {each.block: from_status(each.status) for each in answer.refused}
    results, first = [], 0
    for chain in chains:
        end = first + len(chain)
        # Daemons that take one chain name no stored blocks.
        stored = answer.stored if len(chains) == 1 else sum(first <= each < end for each in answer.stored_blocks)
        errors = [(block - first, error) for block, error in refused.items() if first <= block < end]
        results.append(SaveResult(stored, len(chain) - stored - len(errors), errors))
        first = end
    return results


def _messages(order: SaveOrder) -> Iterator[bytes]:
    yield pb.SaveBlocksRequest(header=save_header(order)).SerializeToString()
    payload_bytes = min(order.max_frame_bytes - HEAD_BYTES_MAX, _PAYLOAD_BYTES_WANTED)
    for layer in range(len(order.layers)):
        yield from _frames(order, layer, payload_bytes)
    yield pb.SaveBlocksRequest(commit=pb.SaveCommit(checksums=order.checksums())).SerializeToString()


def _frames(order: SaveOrder, layer: int, payload_bytes: int) -> Iterator[bytes]:
    """Cut a layer into frames. Small slices share a frame; a large slice is spread over several. Each slice is summed
    right before it is copied into its first frame.
    """
    pieces: list[memoryview] = []
    space = payload_bytes
    first_block = first_offset = 0
    for block, data in enumerate(order.layers[layer]):
        order.sum_slice(layer, block)
        view, offset = data.data, 0
        while offset < len(view):
            if not pieces:
                first_block, first_offset = block, offset
            piece = view[offset : offset + space]
            pieces.append(piece)
            offset += len(piece)
            space -= len(piece)
            if not space:
                yield encode_frame(layer, first_block, first_offset, pieces)
                pieces, space = [], payload_bytes
    if pieces:
        yield encode_frame(layer, first_block, first_offset, pieces)
