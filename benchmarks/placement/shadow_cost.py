"""What a policy in the shadow costs: ``python -m benchmarks.placement.shadow_cost``. Takes some minutes."""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np

from kvservice.blocks import NO_ROW
from kvservice.placement.block_items import BlockItems
from kvservice.placement.item_tree import IN_DRAM, ON_SSD, BlockChanges
from kvservice.placement.shadow import ShadowStore
from kvservice.policy import PLACEMENTS
from kvservice.policy.items import Conditions

_ITEMS, _BLOCKS, _TURNS = 20_000, 4, 2_000
_BLOCK_BYTES = 1 << 20
_TURN_S, _LOOK_TURNS = 0.01, 10  # 100 turns per second, and ten looks.


def measured(name: str, *, is_shadow: bool) -> tuple[float, float]:
    """Bytes per item, and seconds per turn with its part of the looks."""
    all_bytes = _ITEMS * _BLOCKS * _BLOCK_BYTES
    conditions = Conditions(all_bytes // 5, 2 * all_bytes, 5e9)
    policy = PLACEMENTS[name]()
    store = ShadowStore(policy, conditions) if is_shadow else policy
    rows = np.arange(_ITEMS * _BLOCKS).reshape(_ITEMS, _BLOCKS)
    tracemalloc.start()
    items = BlockItems(store, conditions, _ITEMS * _BLOCKS)
    for number, chain in enumerate(rows):
        items.changed(_stored(chain, in_dram=number % 5 == 0), 0.0)
    for _ in range(_ITEMS // 1000):
        items.settle(0.0)
    if isinstance(store, ShadowStore):
        store.begin(items.items, 0.0)
    size_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    random = np.random.default_rng(1)
    began_s = time.perf_counter()
    for turn in range(_TURNS):
        now_s, chain = turn * _TURN_S, rows[int(random.integers(_ITEMS))]
        items.looked_up(chain, now_s)
        items.leased(chain)
        items.released(chain)
        items.settle(now_s)
        if turn % _LOOK_TURNS == 0:
            items.reads(now_s)
    return size_bytes / _ITEMS, (time.perf_counter() - began_s) / _TURNS


def _stored(chain: np.ndarray[tuple[int], np.dtype[np.int64]], *, in_dram: bool) -> BlockChanges:
    same = np.ones(_BLOCKS, np.int64)
    parents = np.concatenate([[NO_ROW], chain[:-1]])
    tiers, is_whole = same * (ON_SSD | (IN_DRAM if in_dram else 0)), same.astype(np.bool_)
    return BlockChanges(
        chain, 0 * same, is_whole, ~is_whole, tiers, _BLOCK_BYTES * same, 16 * same, is_whole, parents, chain, chain
    )


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.placement.shadow_cost", description=__doc__).parse_args()
    print(f"{_ITEMS} items of {_BLOCKS} blocks")
    for name in ("lru", "lookahead", "foresight"):
        for is_shadow in (False, True):
            item_bytes, turn_s = measured(name, is_shadow=is_shadow)
            what = "in the shadow" if is_shadow else "alone"
            print(f"{name:<10} {what:<14} {item_bytes:5.0f} bytes an item, {1e6 * turn_s:5.0f} us a turn")


if __name__ == "__main__":
    main()
