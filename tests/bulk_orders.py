"""Orders for the client's bulk transport, and what a `BulkDaemon` sends for them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from kvservice_api.image import checksum, layer_starts
from kvservice_client import BlockChain, Durability, Layout, Shard
from kvservice_client.buffers import Bytes
from kvservice_client.retry import TransferDeadline
from kvservice_client.transports.base import LoadOrder, SaveOrder
from kvservice_client.transports.bulk import BulkTransport
from tests.bulk_daemon import BulkDaemon, Unit
from tests.clock import ClientClock
from tests.daemon import NEVER_S

TINY = Layout("tiny", "uint8", layers=3, kv_heads=1, k_head_dim=1, v_head_dim=0, block_tokens=4)
ODD = Layout("odd", "float32", layers=5, kv_heads=3, k_head_dim=33, v_head_dim=17, block_tokens=96)
LARGE = Layout("large", "float16", layers=6, kv_heads=6, k_head_dim=128, v_head_dim=128, block_tokens=512)  # 1.5 MiB.
ID = bytes(16)


def order_of(layout: Layout, token_counts: list[int], *, into: bool = True, first_layer: int = 0) -> LoadOrder:
    starts = layer_starts(layout, Shard.whole(layout), token_counts)
    buffers = [np.zeros(each[-1], np.uint8) for each in starts] if into else None
    return LoadOrder(
        ID, 1, 0, buffers, layout, Shard.whole(layout), token_counts, lambda: True, first_layer=first_layer
    )


def content(order: LoadOrder) -> list[Bytes]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 256, order.block_starts(each)[-1], np.uint8) for each in range(order.layer_count)]


def units_of(order: LoadOrder, layers: list[Bytes], slices_each: int = 1) -> list[Unit]:
    """Of so many slices, which run on into the next layers."""
    slices = [
        (layer, block, layers[layer][begin:end].tobytes())
        for layer in range(order.first_layer, order.layer_count)
        for block, (begin, end) in enumerate(pairwise(order.block_starts(layer)))
    ]
    cut = [slices[at : at + slices_each] for at in range(0, len(slices), slices_each)]
    return [(*some[0][:2], b"".join(data for _, _, data in some)) for some in cut]


def checksums_of(order: LoadOrder, units: list[Unit]) -> dict[int, bytes]:
    """Of the slices of each unit."""
    found = {}
    for number, (layer, block, data) in enumerate(units):
        sums = b""
        while data:
            starts = order.block_starts(layer)
            size = starts[block + 1] - starts[block]
            sums += checksum(data[:size]).to_bytes(8, "little")
            block, data = block + 1, data[size:]
            if block == order.block_count:
                layer, block = layer + 1, 0
        found[number] = sums
    return found


def whole(seconds: float = NEVER_S) -> TransferDeadline:
    return TransferDeadline(seconds, ClientClock())


def save_order(layout: Layout, counts: list[int]) -> SaveOrder:
    load = order_of(layout, counts, into=False)
    layers = [
        [layer[a:b] for a, b in pairwise(load.block_starts(number))] for number, layer in enumerate(content(load))
    ]
    chain = BlockChain(bytes(32), tuple(bytes([number]) * 32 for number in range(len(counts))), tuple(counts))
    return SaveOrder(ID, [chain], Durability.DRAM, layout, Shard.whole(layout), layers, 2**20)


Large = tuple[BulkDaemon, BulkTransport, LoadOrder, list[Bytes]]
