"""Blocks in their place in the arena: what a client keeps for the next load of as many blocks."""

from __future__ import annotations

from weakref import ref

from kvservice_client import Layout, Shard
from kvservice_client.transports.in_place import tables_of

LAYOUT = Layout("in place", "float16", layers=80, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=16)
WHOLE = Shard.whole(LAYOUT)


def test_the_tables_of_a_small_load_are_made_once() -> None:
    first, second = (tables_of(LAYOUT, WHOLE, (WHOLE,) * 100, (16,) * 100) for _ in range(2))
    assert first[0] is second[0] and first[1] is second[1]


def test_the_tables_of_a_large_load_take_no_memory_after_it() -> None:
    """Those of 16,384 blocks of 80 layers have 100 MiB."""
    slices, runs = map(ref, tables_of(LAYOUT, WHOLE, (WHOLE,) * 104, (16,) * 104))
    assert slices() is None and runs() is None
