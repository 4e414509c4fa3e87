"""A client without the library, which writes into the arena in place, step by step."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from kvservice_api.image import BlockGeometry, block_geometry, checksum
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2
from kvservice_client.arena_map import ArenaMap, WriterLock
from kvservice_client.buffers import Bytes
from tests.integration.known_blocks import SMALL, layers_of
from tests.integration.wire import Wire

_numbers = itertools.count(1)


class InPlaceWriter:
    """The reservations and writes of one attached client."""

    def __init__(self, wire: Wire, layout: Layout = SMALL, *, locked: bool = True) -> None:
        self.wire = wire
        self.layout = layout
        found = wire.capabilities()
        self.directory = Path(found.arena_directory)
        self.arena = ArenaMap(self.directory, found.arena_id, found.arena_capacity_bytes)
        self.client_id = wire.client_id
        self.lock = WriterLock(self.directory, wire.client_id) if locked else None

    def header(self, chain: BlockChain, durability: types_pb2.Durability = types_pb2.DURABILITY_DRAM) -> pb.SaveHeader:
        return pb.SaveHeader(
            client_id=self.client_id,
            layout_fingerprint=self.layout.fingerprint,
            parent_key=chain.parent,
            keys=chain.packed_keys,
            durability=durability,
        )

    def reserve(self, chain: BlockChain, number: int = 0, **header: types_pb2.Durability) -> Reserved:
        """A reservation of the whole chain."""
        number = number or next(_numbers)
        request = pb.ReserveBlocksRequest(header=self.header(chain, **header), reservation_id=number)
        return Reserved(self, chain, number, self.wire.blocks.ReserveBlocks(request))


class Reserved:
    """An answered reservation."""

    def __init__(self, writer: InPlaceWriter, chain: BlockChain, number: int, answer: pb.ReserveBlocksResponse) -> None:
        self.writer = writer
        self.chain = chain
        self.number = number
        self.answer = answer
        self.offsets = dict(zip(answer.blocks, answer.offsets, strict=True))
        self._slices = layers_of(writer.layout, chain)

    def place(self, block: int, layer: int) -> Bytes:
        """The slice's memory in the arena."""
        begin, end = self._geometry.slice_range(layer)
        return self.writer.arena.writable()[self.offsets[block] + begin : self.offsets[block] + end]

    def write(self, layers: range | None = None) -> None:
        """Write the right bytes: of these layers, or of all."""
        for layer in layers or range(self.writer.layout.layers):
            for block in self.offsets:
                np.copyto(self.place(block, layer), self._slices[layer][block])

    def scribble(self) -> None:
        """Fill the place of every block with bytes that are not the block's."""
        for block in self.offsets:
            self.writer.arena.writable()[self.offsets[block] :][: self._geometry.image_bytes] = 0xEE

    def commit(self, client_id: bytes = b"") -> pb.SaveBlocksResponse:
        sums = [[checksum(layer[block].data) for layer in self._slices] for block in self.offsets]
        request = pb.CommitBlocksRequest(
            client_id=client_id or self.writer.client_id,
            reservation_id=self.number,
            checksums=np.array(sums, "<u8").tobytes(),
        )
        answer: pb.SaveBlocksResponse = self.writer.wire.blocks.CommitBlocks(request)
        return answer

    def abandon(self, client_id: bytes = b"") -> None:
        request = pb.AbandonBlocksRequest(client_id=client_id or self.writer.client_id, reservation_id=self.number)
        self.writer.wire.blocks.AbandonBlocks(request)

    @property
    def _geometry(self) -> BlockGeometry:
        layout = self.writer.layout
        return block_geometry(layout, Shard.whole(layout), layout.block_tokens)
