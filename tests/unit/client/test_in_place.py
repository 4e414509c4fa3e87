"""Blocks in place in the arena: which places a client takes from a daemon, and what it keeps for the next load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from weakref import ref

import numpy as np
import pytest

from kvservice_api.errors import InvalidFrame
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import BlockChain, Durability, Layout, Shard
from kvservice_client.arena_map import ArenaMap
from kvservice_client.transports.base import LoadOrder, SaveSet
from kvservice_client.transports.in_place import InPlace
from kvservice_client.transports.reservation import Reservation
from kvservice_client.transports.stored_forms import copy_tables

LAYOUT = Layout("in place", "float16", layers=80, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=16)
WHOLE = Shard.whole(LAYOUT)
ID = bytes(16)
ARENA = np.zeros(1 << 20, np.uint8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": [1 << 20]},
        {"offsets": [2**63 - 4096]},  # Its end would not fit into 64 bits.
        {"offsets": [2**64 - 4096]},
        {"offsets": []},
        {"shards": WHOLE.encode()[1:]},
        {"shards": b""},
        {"shards": Shard(0, 81, 0, 1).encode()},
        {"shards": Shard(0, 80, 0, 2).encode()},
        {"shards": Shard(1, 80, 0, 1).encode()},
        {"token_counts": [2**32 - 1]},
        {"generations": [1, 2]},
    ],
    ids=str,
)
def test_places_that_are_not_of_the_requested_blocks_in_the_arena_are_refused(wrong: dict[str, Any]) -> None:
    order = LoadOrder(ID, 1, 0, None, LAYOUT, WHOLE, [16], lambda: True)
    arena = cast(ArenaMap, SimpleNamespace(arena_id=ID, data=ARENA))
    right = {"offsets": [4096], "generations": [1], "trailer_checksums": [1], "token_counts": [16]}
    given = {"shards": WHOLE.encode(), **right, **wrong}
    with pytest.raises(InvalidFrame):
        InPlace(arena, order, pb.LocateBlocksResponse(arena_id=ID, **given))


@pytest.mark.parametrize(
    ("blocks", "offsets"),
    [([0], [1 << 20]), ([0], [2**64 - 4096]), ([2], [4096]), ([0, 1], [4096]), ([0], [4096, 65536])],
    ids=str,
)
def test_space_that_is_not_for_blocks_of_the_save_in_the_arena_is_refused(
    blocks: list[int], offsets: list[int]
) -> None:
    saved = SaveSet(ID, [BlockChain(bytes(32), (b"1" * 32, b"2" * 32), (16, 16))], Durability.DRAM, LAYOUT, WHOLE)
    with pytest.raises(InvalidFrame):
        Reservation(saved, pb.ReserveBlocksResponse(blocks=blocks, offsets=offsets), ARENA, _never, _never, _never)


def _never(*_: object) -> Any:
    raise AssertionError


def test_the_tables_of_a_small_load_are_made_once() -> None:
    first, second = (copy_tables(LAYOUT, WHOLE, WHOLE.encode() * 100, (16,) * 100) for _ in range(2))
    assert first is second


def test_the_tables_of_a_large_load_take_no_memory_after_it() -> None:
    """Those of 16,384 blocks of 80 layers have 100 MiB."""
    tables = copy_tables(LAYOUT, WHOLE, WHOLE.encode() * 104, (16,) * 104)
    slices, runs = ref(tables.slices), ref(tables.runs)
    del tables
    assert slices() is None and runs() is None
