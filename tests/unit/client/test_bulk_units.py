"""How a transfer over the bulk port is cut: into messages, and onto connections."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from kvservice_api.bulk import MessageKind, pack_header
from kvservice_client import BlockChain, Durability, Layout, Shard
from kvservice_client.retry import Deadline
from kvservice_client.transports import bulk, bulk_transfer
from kvservice_client.transports.base import SaveOrder
from kvservice_client.transports.bulk import BulkTransport
from tests.bulk_daemon import BulkDaemon
from tests.daemon import SOON_S

MIB = 1 << 20
LAYOUT = Layout("mebibytes", "uint8", layers=2, kv_heads=8, k_head_dim=128, v_head_dim=128, block_tokens=512)


@pytest.mark.parametrize(("connections", "sizes"), [(1, [8, 8, 4]), (2, [8, 8, 4]), (3, [4, 4, 4, 4, 4])])
def test_messages_are_smaller_where_many_connections_share_them(
    monkeypatch: pytest.MonkeyPatch, connections: int, sizes: list[int]
) -> None:
    sent: list[int] = []

    def packed(kind: MessageKind, size_bytes: int, **at: Any) -> bytes:
        if kind is MessageKind.DATA:
            sent.append(size_bytes // MIB)
        return pack_header(kind, size_bytes, **at)

    monkeypatch.setattr(bulk, "pack_header", packed)
    monkeypatch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: connections)
    chain = BlockChain(bytes(32), tuple(bytes([number]) * 32 for number in range(10)), (512,) * 10)
    layers = [[np.full(MIB, 7, np.uint8)] * 10] * 2
    order = SaveOrder(bytes(16), [chain], Durability.DRAM, LAYOUT, Shard.whole(LAYOUT), layers, MIB)
    with BulkDaemon() as daemon:
        daemon.wanted, daemon.slices = list(range(10)), [[bytearray(MIB) for _ in range(10)] for _ in range(2)]
        transport = BulkTransport(daemon.connection())
        transport.save(order, Deadline(SOON_S))
        transport.close()
    assert sorted(sent) == sorted(sizes)


@pytest.mark.parametrize(
    ("size_bytes", "processors", "with_tls", "connections"),
    [
        (32 * MIB, 2, False, 1),
        (64 * MIB, 2, False, 2),
        (32 * MIB, 2, True, 2),
        (32 * MIB, 4, False, 2),
        (8 * MIB, 4, False, 1),
    ],
)
def test_a_second_connection_near_by_is_for_large_transfers_where_processors_are_few(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int, processors: int, with_tls: bool, connections: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(processors)))
    assert bulk_transfer._connections(size_bytes, 5e-6, with_tls=with_tls) == connections
